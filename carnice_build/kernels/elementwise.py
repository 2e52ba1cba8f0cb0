"""Conversions and sums for small tensors (norms, biases), in plain numpy.

All arithmetic is float32, rounded once to the target, to nearest with ties to even.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ._floats import FORMATS, Array, first_non_finite, float_format, require
from ._floats import widen as widen


def add_scalar(source: Array, dtype: str, value: float, out: Array) -> int:
    """Write ``source + value`` to ``out``, both C-contiguous, of one shape and of ``dtype``.

    As in torch and in mlx, ``value`` is rounded to ``dtype`` first (1.0, which mlx-lm adds to
    norm weights, is exact in all three); the sum of the two is then taken in float32 and rounded
    to ``dtype``. A sum beyond the range of ``dtype`` becomes Inf.

    Returns -1, or the flat index of the first NaN or Inf in ``source``; ``out`` is then
    unspecified. Raises ValueError for an unknown dtype or arrays that do not fit it.
    """
    form = float_format(dtype)
    require("source", source, form.storage, source.shape)
    require("out", out, form.storage, source.shape)
    bad = first_non_finite(source, form)
    if bad < 0:
        with np.errstate(over="ignore"):
            addend = widen(narrow(np.full(1, value, np.float32), dtype), dtype)
            out[...] = narrow(widen(source, dtype) + addend, dtype)
    return bad


def cast(source: Array, source_dtype: str, target_dtype: str, out: Array) -> int:
    """Write ``source`` to ``out`` in another float format, both C-contiguous, of one shape.

    Equal to torch's ``.to()`` and mlx's ``astype`` on every finite value: denormals are
    kept, and a value that rounds beyond the target's range becomes Inf.

    Returns -1, or the flat index of the first NaN or Inf in ``source``; ``out`` is then
    unspecified. Raises ValueError for an unknown dtype or arrays that do not fit theirs.
    """
    form = float_format(source_dtype)
    require("source", source, form.storage, source.shape)
    require("out", out, float_format(target_dtype).storage, source.shape)
    bad = first_non_finite(source, form)
    if bad < 0:
        with np.errstate(over="ignore"):
            out[...] = narrow(widen(source, source_dtype), target_dtype)
    return bad


def narrow(values: NDArray[np.float32], dtype: str) -> Array:
    """Float32 values that are not NaN, rounded to ``dtype``."""
    if dtype == "BF16":
        return _bf16_bits(values)
    return values.astype(FORMATS[dtype].storage, copy=False)


def _bf16_bits(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The upper half of each bit pattern, after a carry from the lower half.

    Adding 0x7FFF carries exactly when the lower half is above one half; the lowest bit kept,
    added too, makes a tie carry when that bit is odd. A carry into the exponent is the right
    power of two, and past the largest finite value it is Inf.
    """
    bits = values.view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    return ((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)).astype(np.uint16)


def non_finite_index(source: Array, dtype: str) -> int:
    """The flat index of the first NaN or Inf in ``source``, C-contiguous and of ``dtype``, or -1.

    Raises ValueError for an unknown dtype.
    """
    return first_non_finite(source, float_format(dtype))


def zero_non_finite(source: Array, dtype: str) -> Array:
    """``source`` itself when all of it is finite, else a copy with 0 for each NaN and Inf.

    Raises ValueError for an unknown dtype.
    """
    form = float_format(dtype)
    if first_non_finite(source, form) < 0:
        return source
    out = source.copy()
    bits = out.reshape(-1).view(form.bits)
    mask = form.bits.type(form.exponent)
    bits[(bits & mask) == mask] = 0
    return out
