"""JSON as RFC 8259 has it, from files that a stranger wrote.

Python's own parser is more generous: it takes NaN, UTF-16, halves of surrogate pairs and keys
that stand twice, of which another reader may believe the other one.
"""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn

from carnice_build.errors import CheckpointError


class DuplicateKey(ValueError):
    """An object has `key` twice."""

    def __init__(self, key: str) -> None:
        super().__init__(f"the key {key!r} stands twice")
        self.key = key


def parse_json(content: bytes) -> Any:
    """The value; ValueError or RecursionError when `content` is not strictly JSON."""
    text = content.decode("utf-8")
    value = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse, parse_float=_finite)
    if "\\ud" in text or "\\uD" in text:
        # Half a surrogate pair is no character; a UnicodeEncodeError is a ValueError.
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    return value


def json_object(where: str, content: bytes) -> dict[str, Any]:
    """The object that a small file holds; CheckpointError naming `where` when it holds none."""
    try:
        value = parse_json(content)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise CheckpointError("is not a JSON object", where=where)
    return value


def object_or_none(content: bytes) -> dict[str, Any] | None:
    """The object that Python's own parser, as most libraries use it, finds in a file, if any."""
    try:
        # Libraries open such files as UTF-8, without a mark in front.
        value = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise DuplicateKey(key)
            seen.add(key)
    return table


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _refuse(text)


def to_json(value: Any) -> bytes:
    """JSON as people read it."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
