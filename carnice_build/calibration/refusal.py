"""Which entry of a config transformers does not take, of which its own words often say nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from carnice_build.errors import CheckpointError

_MOST_SECONDS = 20.0
"""How long entries are tried; most models are made in less than one."""

_KEPT = ("model_type",)
"""Without which there is no model to try."""


def refused(
    config: Mapping[str, Any], error: Exception, make: Callable[[Mapping[str, Any]], object]
) -> CheckpointError:
    """The error for a config of which transformers raises `error`.

    It names the one entry without which `make`, which makes the model of a config, succeeds; those
    are tried first that stand in what transformers says.
    """
    words = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    entry = _entry(config, words, make)
    if entry is None:
        return CheckpointError(
            f"is no config that transformers takes: {words}", where="config.json"
        )
    return CheckpointError(
        f"config entry {entry} is {config[entry]!r}, which transformers does not take: {words}",
        where="config.json",
    )


def _entry(
    config: Mapping[str, Any], words: str, make: Callable[[Mapping[str, Any]], object]
) -> str | None:
    end = time.monotonic() + _MOST_SECONDS
    entries = [key for key in config if key not in _KEPT]
    for key in sorted(entries, key=lambda key: not _said(key, config[key], words)):
        if time.monotonic() > end:
            break
        try:
            make({name: value for name, value in config.items() if name != key})
        except Exception:
            continue
        return key
    return None


def _said(key: str, value: Any, words: str) -> bool:
    """Whether an entry, or something in it, stands in a message."""
    inner = value.values() if isinstance(value, dict) else [value]
    return key in words or any(isinstance(one, str) and one in words for one in inner)
