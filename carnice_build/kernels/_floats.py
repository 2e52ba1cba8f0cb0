"""How the three float formats of checkpoints lie in memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class FloatFormat:
    """One float format: ``storage`` is the numpy dtype tensors of it arrive in,
    ``bits`` the unsigned integer of the same width, and ``exponent`` the mask of its
    exponent bits, which are all set in Inf and NaN and in nothing else.
    """

    storage: np.dtype[Any]
    bits: np.dtype[Any]
    exponent: int


FORMATS = {
    "BF16": FloatFormat(np.dtype(np.uint16), np.dtype(np.uint16), 0x7F80),
    "F16": FloatFormat(np.dtype(np.float16), np.dtype(np.uint16), 0x7C00),
    "F32": FloatFormat(np.dtype(np.float32), np.dtype(np.uint32), 0x7F800000),
}


def float_format(dtype: str) -> FloatFormat:
    """The format of that name; ValueError for a name that is not in ``FORMATS``."""
    if dtype not in FORMATS:
        raise ValueError(f"dtype is {dtype!r}, expected one of {', '.join(FORMATS)}")
    return FORMATS[dtype]


def require(name: str, array: Array, storage: DTypeLike, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless the array is C-contiguous, aligned, and of that dtype and shape."""
    if array.dtype != np.dtype(storage) or array.shape != shape:
        raise ValueError(
            f"{name} is {array.dtype}{list(array.shape)}, expected {np.dtype(storage)}{list(shape)}"
        )
    if not (array.flags.c_contiguous and array.flags.aligned):
        raise ValueError(f"{name} must be C-contiguous and aligned")


def first_non_finite(array: Array, form: FloatFormat) -> int:
    """The flat index of the first NaN or Inf in a C-contiguous array, or -1."""
    mask = form.bits.type(form.exponent)
    bad = (array.reshape(-1).view(form.bits) & mask) == mask
    return int(bad.argmax()) if bad.any() else -1


def read_only(array: Array, form: FloatFormat) -> Array:
    """The bit patterns, never writable: numba would compile again for an array that is."""
    view = array.view(form.bits)
    view.flags.writeable = False
    return view


def blocks_per_row(shape: tuple[int, ...], size: int) -> int:
    """Blocks of ``size`` values in a row; ValueError for what is not rows of whole blocks."""
    if len(shape) != 2 or shape[1] % size:
        raise ValueError(f"shape {list(shape)} is not [rows, a multiple of {size}]")
    return shape[1] // size


def bad_index(first_block: int, blocks: Array, form: FloatFormat) -> int:
    """The flat index of the first NaN or Inf of ``blocks`` [n, size], from a block on; -1 for -1.

    That is the block which a kernel returned.
    """
    if first_block < 0:
        return -1
    return int(first_block) * int(blocks.shape[1]) + first_non_finite(blocks[first_block:], form)


def widen(array: Array, dtype: str) -> NDArray[np.float32]:
    """The same values in float32, which holds those of every format."""
    if dtype == "BF16":
        return (array.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return array.astype(np.float32, copy=False)
