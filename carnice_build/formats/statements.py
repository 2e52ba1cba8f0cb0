"""Reading what a config states, whatever it holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def names(value: object) -> list[str]:
    """A list of names, empty when it is something else."""
    return [str(item) for item in value] if isinstance(value, list) else []


def statements(where: str, stated: Mapping[str, Any], wanted: Mapping[str, Any]) -> Iterator[str]:
    """What `where` states otherwise than is wanted."""
    for key, value in wanted.items():
        if stated.get(key) != value:
            yield f"{where} states {key} {stated.get(key)!r} instead of {value!r}"
