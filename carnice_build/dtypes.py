"""The element types of safetensors, by the names its headers use."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import prod

ITEM_SIZE: dict[str, int] = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "U16": 2,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "U32": 4,
    "I32": 4,
    "F32": 4,
    "U64": 8,
    "I64": 8,
    "F64": 8,
}
"""Bytes per element."""

WIDE_FLOATS = ("F32", "F16", "BF16")
"""The types in which weights are trained and published."""

FLOAT_NAMES: dict[str, str] = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
"""The same types by the names that configs, recipes and libraries give them."""

NUMPY_NAME: dict[str, str] = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "F8_E4M3": "uint8",
    "F8_E5M2": "uint8",
    "F8_E8M0": "uint8",
    "U16": "uint16",
    "I16": "int16",
    "F16": "float16",
    "BF16": "uint16",
    "U32": "uint32",
    "I32": "int32",
    "F32": "float32",
    "U64": "uint64",
    "I64": "int64",
    "F64": "float64",
}
"""The numpy type that carries the bits; BF16 and the F8 types travel as unsigned integers."""


@dataclass(frozen=True)
class TensorSpec:
    """What is known of a tensor before a byte of it is read."""

    dtype: str
    shape: tuple[int, ...]

    @cached_property
    def size(self) -> int:
        """Number of elements; 1 for a scalar."""
        return prod(self.shape)

    @cached_property
    def nbytes(self) -> int:
        """Bytes that the tensor takes on disk."""
        return self.size * ITEM_SIZE[self.dtype]

    @property
    def row_bytes(self) -> int:
        """Bytes of one index along the first axis; all bytes for a scalar."""
        return self.nbytes // self.shape[0] if self.shape and self.shape[0] else self.nbytes


@lru_cache(maxsize=4096)
def shared_spec(dtype: str, shape: tuple[int, ...]) -> TensorSpec:
    """One object for all tensors of a type and shape, of which a large model has few.

    What follows from a spec is counted once, and equal ones are seen to be so at once.
    """
    return TensorSpec(dtype, shape)
