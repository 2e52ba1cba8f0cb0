"""The MTP heads that there is code for, by the names that family tables call them.

A table is data: it names code of this package, and no other.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

_DRAFTERS = {"qwen3_5": "carnice_build.models.qwen3_5_drafter"}
"""Modules with a class `Drafter`; each brings torch, so it is imported in workers alone."""


def drafter(
    name: str, text_config: Mapping[str, Any], attention: str, tensors: Mapping[str, Any]
) -> Any:
    """The head of this name as a torch module; see `Architecture.draft_head`."""
    return import_module(_DRAFTERS[name]).Drafter(text_config, attention, tensors)
