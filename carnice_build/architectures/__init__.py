"""One table per model family; `architecture_of` picks it by the config's `model_type`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from carnice_build.architectures.base import Architecture
from carnice_build.architectures.qwen3_5 import Qwen35
from carnice_build.errors import CheckpointError, nearest

_TABLES: Mapping[str, Callable[[Mapping[str, Any], str], Architecture]] = {
    Qwen35.name: Qwen35,
}


def architecture_of(config: Mapping[str, Any], where: str) -> Architecture:
    """The table for the checkpoint with this `config.json`, found at `where`."""
    model_type = str(config.get("model_type"))
    table = _TABLES.get(model_type)
    if table is None:
        raise CheckpointError(
            f"is of the unknown model_type {model_type!r}",
            where=where,
            expected=" or ".join(sorted(_TABLES)),
            nearest=nearest(model_type, _TABLES),
        )
    return table(config, where)
