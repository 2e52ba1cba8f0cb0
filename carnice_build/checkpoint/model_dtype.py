"""The type that a config.json states for a model, in which libraries and engines load it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from carnice_build.dtypes import FLOAT_NAMES

_KEYS = ("dtype", "torch_dtype")


def stated_dtype(config: Mapping[str, Any]) -> str | None:
    """The type as safetensors spells it, None when the config states none that it has.

    The root's comes before the text model's, as vLLM and transformers read it.
    """
    text = config.get("text_config")
    for section in (config, text if isinstance(text, dict) else {}):
        for key in _KEYS:
            if isinstance(section.get(key), str):
                return FLOAT_NAMES.get(section[key].removeprefix("torch."))
    return None


def with_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """`config` with this type wherever it states one, of a part of the model too, else at the top.

    `dtype` is BF16, F16 or F32.
    """
    name = next(name for name, spelling in FLOAT_NAMES.items() if spelling == dtype)
    changed = {
        key: {**value, **dict.fromkeys(_stating(value), name)} if isinstance(value, dict) else value
        for key, value in config.items()
    }
    changed |= dict.fromkeys(_stating(config), name)
    return changed if stated_dtype(changed) else {**changed, "dtype": name}


def _stating(section: Mapping[str, Any]) -> Iterator[str]:
    return (key for key in _KEYS if isinstance(section.get(key), str))
