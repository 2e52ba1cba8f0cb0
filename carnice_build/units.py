"""Byte counts, rates and durations as people write and read them."""

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


_RATE = re.compile(r"\s*(\d+(?:\.\d+)?\s*(?i:[KMGT]?))((?i:bit)|i?B)/s\s*")
"""Lines have Gb/s of bits, and some who write gb/s mean bytes: eight times as much."""


def parse_bandwidth(text: str) -> float:
    """Bytes in a second of a rate such as `10Gbit/s` or `1.2GB/s`.

    Raises ValueError when `text` is none.
    """
    match = _RATE.fullmatch(text) if len(text) <= _LONGEST else None
    if not match:
        raise ValueError(f"{text!r} is not a rate such as 10Gbit/s or 1.2GB/s")
    bits = match[2].lower() == "bit"
    try:
        return parse_size(f"{match[1]}{'B' if bits else match[2]}") / (8 if bits else 1)
    except ValueError:
        raise ValueError(f"{text!r} is not a rate from 1 B/s to 2**63 B/s") from None


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


def format_time(seconds: float) -> str:
    """A duration in the largest unit that says enough, with two or three digits."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    if seconds < 7200:
        return f"{seconds / 60:.{seconds < 600:d}f} min"
    return f"{seconds / 3600:.1f} h"


def plural(count: int, noun: str) -> str:
    """`1 action`, `2 actions`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
