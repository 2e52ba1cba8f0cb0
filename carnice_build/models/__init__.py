"""One table per model family; `architecture_of` picks it by the config's `model_type`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from carnice_build.errors import CheckpointError
from carnice_build.models.base import Architecture
from carnice_build.models.qwen3_5 import Qwen35

_TABLES: Mapping[str, Callable[[Mapping[str, Any], str], Architecture]] = {
    Qwen35.name: Qwen35,
}


def architecture_of(config: Mapping[str, Any], where: str) -> Architecture:
    """The table for the checkpoint with this `config.json`, found at `where`.

    CheckpointError for a family that has none: another name for it would only hide what it is.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in _TABLES:
        unknown = f"is of the unknown model_type {str(model_type)!r}"
        raise CheckpointError(
            unknown if "model_type" in config else "has no model_type",
            where=where,
            expected=f"one of a family that has a table here ({', '.join(sorted(_TABLES))}); "
            "CONTRIBUTING.md says how to add one",
        )
    return _TABLES[model_type](config, where)
