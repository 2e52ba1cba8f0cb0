"""The numbers of E4M3 under a scale a block or one for all, and how far they may be off.

A block of largest magnitude A has the scale s = A / 448, rounded to its type, and each weight w
becomes s times the code nearest to w / s.  Rows come a few at a time, while A is that of a block,
so the bound is one under the scale that is there:

- Codes have three bits behind the point: one is off by at most 2^-4 of the power of two below
  w / s, and by 2^-10 where it is denormal.
- The quotient is rounded to the weight's type, and off by half a unit in its last place.
- Where s was rounded down, by half a unit at most, w lies beyond 448 s by 448 times that at most,
  and is cut to it.
- A scale that is larger than the block needs would allow more.  But the largest code of a block is
  448 whatever A is, since half a unit in the last place of s is far from the next code.  So where
  the codes of a block end at a smaller one, s counts as that much smaller; where they are all
  zero, weights may be as large as those whose scale is rounded to zero, and no larger.  (A
  denormal s may be rounded up by more; that is less than half the smallest number all the same.)
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from carnice_build.dtypes import NUMPY_NAME, WIDE_FLOATS, TensorSpec
from carnice_build.formats.checks import Tensors
from carnice_build.formats.compressed_tensors.storages.floats_ops import SUFFIXES
from carnice_build.formats.values import (
    HALF_PLACE,
    HALF_SMALLEST,
    Floats,
    Incomparable,
    as_float32,
    blocks,
    matrix,
    read_rows,
)
from carnice_build.graph import TensorData
from carnice_build.kernels import elementwise, fp8

_LARGEST_CODE = 448.0

_FLOAT32_SLACK = 1.001
"""The product of code and scale is rounded, and a weight halfway between codes goes either way."""

Block = tuple[int, int] | None
"""Rows and columns that share a scale; None for all."""


class BlockValues:
    """A module in E4M3, dequantized by code * scale, with its bound."""

    tolerated = 0.0

    def __init__(self, tensors: Tensors, module: str, block: Block) -> None:
        """Take `module`'s tensors; Incomparable when they do not fit together."""
        try:
            self._codes, scales = (tensors[f"{module}.{suffix}"] for suffix in SUFFIXES)
        except KeyError:
            raise Incomparable(f"{module} is not in FP8") from None
        self.shape = matrix(self._codes.spec)
        self.dtype = scales.spec.dtype
        self._height, self._width = block or self.shape
        grid = fp8.block_grid(self.shape, self._height, self._width)
        if self._codes.spec != TensorSpec("F8_E4M3", self.shape) or self.dtype not in WIDE_FLOATS:
            raise Incomparable(f"{module} is not in FP8")
        # Others write the scale of a whole weight as a scalar.
        if scales.spec.shape != grid and (block is not None or scales.spec.size != 1):
            raise Incomparable(f"{module} has no scale for each block")
        whole = TensorSpec(self.dtype, grid)
        self._scales = as_float32(read_rows(scales, whole, 0, grid[0]))
        self._used: dict[int, Floats] = {}

    def rows(self, start: int, stop: int) -> Floats:
        """The rows from `start` to `stop`, dequantized."""
        out = np.empty((stop - start, self.shape[1]), np.float32)
        scales = np.ascontiguousarray(self._scales[self._lines(start, stop)])
        fp8.dequantize_blocks(self._read(start, stop), scales, self._width, out)
        return out

    def allowance(self, source: Floats, start: int) -> Floats:
        """See `QuantizedValues.allowance`."""
        lines = self._lines(start, start + len(source))
        used = np.stack([self._scales_used(line) for line in lines.tolist()])
        scales = np.repeat(used, self._width, axis=1)[:, : self.shape[1]]
        return allowance(source, scales, self.dtype)

    def _read(self, start: int, stop: int) -> NDArray[np.uint8]:
        found: NDArray[np.uint8] = read_rows(self._codes, self._codes.spec, start, stop).array
        return found

    def _lines(self, start: int, stop: int) -> NDArray[np.int64]:
        """For each row, the number of its line of blocks."""
        return np.arange(start, stop) // self._height

    def _scales_used(self, line: int) -> Floats:
        """The scales of a line of blocks, as large as their largest codes say; 0 for no code."""
        if line not in self._used:
            first, last = line * self._height, min((line + 1) * self._height, self.shape[0])
            peaks = np.zeros(self.shape[1], np.uint8)
            for start, stop in blocks((last - first, self.shape[1])):
                codes = self._read(first + start, first + stop) & np.uint8(0x7F)
                # A code of NaN is found when it is compared.
                codes = np.minimum(codes, np.uint8(0x7E))
                peaks = np.maximum(peaks, codes.max(axis=0))
            edges = np.arange(0, self.shape[1], self._width)
            codes = np.maximum.reduceat(peaks, edges)[None, :]
            largest = np.empty(codes.shape, np.float32)
            ones = np.ones((1, 1), np.float32)
            fp8.dequantize_blocks(codes, ones, codes.shape[1], largest)
            # Rows come in order: what lies before them is done with.
            self._used = {line: self._scales[line] * (largest[0] / np.float32(_LARGEST_CODE))}
        return self._used[line]


def allowance(source: Floats, scales: Floats, dtype: str) -> Floats:
    """The most that each weight may be off under its own scale; see the module's text.

    `scales` are of the shape of `source`; 0 where all codes are zero.
    """
    place, smallest = HALF_PLACE[dtype], HALF_SMALLEST[dtype]
    wide = scales.astype(np.float64)
    used = np.where(wide > 0, wide, 1.0)
    magnitude = np.abs(source).astype(np.float64)
    code = np.minimum(magnitude / used, _LARGEST_CODE)
    power = np.exp2(np.floor(np.log2(np.maximum(code * (1 + place), 2.0**-6))))
    nearest = (power * (2.0**-4 + place) + smallest) * wide
    beyond = _LARGEST_CODE * np.maximum(wide * place, smallest)
    cut = np.minimum(magnitude - _LARGEST_CODE * wide, beyond)
    allowed = np.maximum(nearest, cut) * _FLOAT32_SLACK
    vanishing = np.where(wide > 0, smallest, _LARGEST_CODE * smallest)
    return (allowed + vanishing).astype(np.float32)


def round_trip(weight: Floats, block: Block) -> Floats:
    """A weight, float32 [rows, columns], quantized in BF16 and dequantized."""
    raw = np.empty(weight.shape, NUMPY_NAME["BF16"])
    elementwise.cast(weight, "F32", "BF16", raw)
    height, width = block or (weight.shape[0], weight.shape[1])
    codes = np.empty(weight.shape, np.uint8)
    scales = np.empty(fp8.block_grid(weight.shape, height, width), raw.dtype)
    fp8.quantize_blocks(raw, "BF16", height, width, codes, scales)
    lines = np.arange(len(weight)) // height
    out = np.empty_like(weight)
    wide = as_float32(TensorData("BF16", scales))
    fp8.dequantize_blocks(codes, np.ascontiguousarray(wide[lines]), width, out)
    return out
