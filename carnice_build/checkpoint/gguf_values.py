"""What the metadata of a GGUF file may hold: numbers, truths, texts, and lists of one of these."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Value(NamedTuple):
    """A value and its kind, one of `KINDS` or, of a list, one in brackets: `[str]`."""

    kind: str
    value: Any


KINDS: Mapping[str, int] = {
    "u8": 0,
    "i8": 1,
    "u16": 2,
    "i16": 3,
    "u32": 4,
    "i32": 5,
    "f32": 6,
    "bool": 7,
    "str": 8,
    "u64": 10,
    "i64": 11,
    "f64": 12,
}
"""The number of each kind in a file (`gguf_type` in ggml's gguf.h); 9 is that of lists."""

LIST = 9

Metadata = Mapping[str, Value]
"""Values by key, in the order of the file."""
