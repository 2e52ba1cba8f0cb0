"""Byte counts as people write and read them."""

from __future__ import annotations

import re

_FACTORS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}

_MOST = 2**63
_LONGEST = 40
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?B)?\s*", re.IGNORECASE)


def parse_size(text: str | int) -> int:
    """Bytes in a size such as `5GB`, `512MiB` or `1000`.

    Raises ValueError when `text` is not a positive size.
    """
    shown = str(text)
    match = _SIZE.fullmatch(shown) if len(shown) <= _LONGEST else None
    if not match:
        raise ValueError(f"{text!r} is not a size such as 5GB or 512MiB")
    size = float(match[1]) * _FACTORS[(match[2] or "").upper()]
    if not 1 <= size < _MOST:
        raise ValueError(f"{text!r} is not a size of at least 1 B and less than 2**63 B")
    return int(size)


def format_size(count: float) -> str:
    """A byte count in decimal units with three significant digits, as model cards give it."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def format_both(count: int) -> str:
    """The same, and in GiB where that is one at least, as memory is counted."""
    binary = f" ({count / 2**30:.2f} GiB)" if count >= 2**30 else ""
    return f"{format_size(count)}{binary}"


def plural(count: int, noun: str) -> str:
    """`1 action`, `2 actions`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
