"""The numbers of `row_floats`, and the bound of E4M3 under a scale a row.

A row of largest magnitude A has the scale s = A / 448, rounded to its type, and each weight w
becomes s times the code nearest to w / s.

- Codes have three bits behind the point: one is off by at most 2^-4 of the power of two below
  w / s, and by 2^-10 where it is denormal.
- The quotient and s are rounded to the weight's type: for r, half a unit in its last place, each is
  off by r of itself, or by half the smallest number of the type.
- Where s was rounded down, the row's largest weights lie beyond 448 s, and are cut to it.
- Where A / 448 rounds to zero, every weight of the row becomes zero.
"""

from __future__ import annotations

import numpy as np

from carnice_build.formats.checks import Tensors
from carnice_build.formats.compressed_tensors.storages.row_floats_ops import SUFFIXES
from carnice_build.formats.values import (
    HALF_PLACE,
    HALF_SMALLEST,
    Floats,
    Incomparable,
    as_float32,
    matrix,
    read_rows,
)
from carnice_build.kernels import fp8

_LARGEST_CODE = 448.0

_FLOAT32_SLACK = 1.001
"""A weight halfway between codes may go either way."""


class RowValues:
    """A module in FP8, dequantized by code * scale, with its bound."""

    tolerated = 0.0

    def __init__(self, tensors: Tensors, module: str) -> None:
        """Take `module`'s tensors; Incomparable when they do not fit together."""
        try:
            self._codes, self._scales = (tensors[f"{module}.{suffix}"] for suffix in SUFFIXES)
        except KeyError:
            raise Incomparable(f"{module} is not in FP8") from None
        self.shape = matrix(self._codes.spec)
        if self._codes.spec.dtype != "F8_E4M3" or self._scales.spec.shape != (self.shape[0], 1):
            raise Incomparable(f"{module} has no scale for each row")

    def rows(self, start: int, stop: int) -> Floats:
        """The rows from `start` to `stop`, dequantized."""
        codes = read_rows(self._codes, self._codes.spec, start, stop)
        scales = as_float32(read_rows(self._scales, self._scales.spec, start, stop))
        out = np.empty((stop - start, self.shape[1]), np.float32)
        fp8.dequantize_rows(codes.array, scales, out)
        return out

    def allowance(self, source: Floats, start: int) -> Floats:
        """See `QuantizedValues.allowance`."""
        return allowance(source, self._scales.spec.dtype)


def allowance(rows: Floats, dtype: str) -> Floats:
    """The most that each weight of `rows` [n, columns] may be off; see the module's text."""
    place, smallest = HALF_PLACE[dtype], HALF_SMALLEST[dtype]
    magnitude = np.abs(rows).astype(np.float64)
    exact = magnitude.max(axis=1, keepdims=True) / _LARGEST_CODE
    off = np.maximum(exact * place, smallest)
    vanishes = exact <= smallest
    low = np.where(vanishes, 1.0, exact - off)
    code = np.minimum(magnitude / low, _LARGEST_CODE)
    gap = np.exp2(np.floor(np.log2(np.maximum(code, 2.0**-6))) - 4) + code * place
    allowed = np.maximum(gap * (exact + off), magnitude - _LARGEST_CODE * low) * _FLOAT32_SLACK
    return (np.where(vanishes, magnitude, allowed) + smallest).astype(np.float32)


def round_trip(rows: Floats) -> Floats:
    """Rows, float32, quantized with a scale for each and dequantized."""
    codes, scales = np.empty(rows.shape, np.uint8), np.empty((len(rows), 1), np.float32)
    out = np.empty_like(rows)
    # Numbers that are not finite shall be seen where the model says them.
    if fp8.quantize_rows(rows, "F32", codes, scales) >= 0:
        return rows
    fp8.dequantize_rows(codes, scales, out)
    return out
