"""The MTP heads that there is code for, by the names that family tables call them.

A table is data: it names code of this package, and no other.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

MLX_DRAFTER = "qwen3_5_mtp"
"""The model type of a folder of an MTP head alone, as mlx-vlm has it."""

MLX_DRAFTED = frozenset({"qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text"})
"""Of what models mlx-vlm makes such a folder."""

_DRAFTERS = {"qwen3_5": "carnice_build.models.qwen3_5_drafter"}
"""Modules with a class `Drafter`; each brings torch, so it is imported in workers alone."""


def drafter(
    name: str, text_config: Mapping[str, Any], attention: str, tensors: Mapping[str, Any]
) -> Any:
    """The head of this name as a torch module; see `Architecture.draft_head`."""
    return import_module(_DRAFTERS[name]).Drafter(text_config, attention, tensors)
