"""The numbers of `packed`, and how far asymmetric INT4 may be off.

A group spans R = max - min, 0 included, in 15 steps of s = p R / 15; w becomes s times a code less
a zero point.  The observer memoryless_minmax has p = 1, mse takes the best p from 0.81 on.

- Rounding to a code leaves half a step; so do codes that end before the range does, because the
  zero point is a whole number too.
- The arithmetic is that of the weight's type: for r, half a unit in its last place, the quotient
  and the sum are off by 16 r steps each, and s by r of itself, as much at 16 steps from zero.
  Where r is that of denormal numbers, it is half the smallest instead.
- With p < 1 an end is cut by (1 - p) of its distance from zero.

What AWQ smoothed is not compared: the folder does not tell by what its weights were multiplied.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from carnice_build.dtypes import NUMPY_NAME, TensorSpec
from carnice_build.formats.checks import Tensors
from carnice_build.formats.compressed_tensors.ops import PER_WORD, SUFFIXES
from carnice_build.formats.values import (
    HALF_PLACE,
    HALF_SMALLEST,
    Floats,
    Incomparable,
    as_float32,
    matrix,
    read_rows,
)
from carnice_build.graph import TensorData
from carnice_build.kernels import compressed, elementwise

_SMALLEST_SHARE = {"mse": 0.81, "memoryless_minmax": 1.0}
_PERMUTATION = "weight_g_idx"


class PackedValues:
    """A module dequantized by scale * (code - zero point)."""

    def __init__(self, tensors: Tensors, module: str, group: int) -> None:
        """Take `module`'s tensors; Incomparable when they do not fit together."""
        if f"{module}.{_PERMUTATION}" in tensors:
            raise Incomparable(f"the columns of {module} are in another order")
        try:
            self._tensors = [tensors[f"{module}.{suffix}"] for suffix in SUFFIXES[:3]]
        except KeyError:
            raise Incomparable(f"{module} is not in the format pack-quantized") from None
        rows, words = matrix(self._tensors[0].spec)
        self.shape = rows, words * PER_WORD
        self.dtype = self._tensors[1].spec.dtype
        grid = (rows, self.shape[1] // group)
        if self._tensors[1].spec.shape != grid:
            raise Incomparable(f"{module} is not of groups of {group}")
        if self._tensors[2].spec != TensorSpec("I32", (-(-rows // PER_WORD), grid[1])):
            raise Incomparable(f"{module} has no zero point for each group")
        whole = read_rows(self._tensors[2], self._tensors[2].spec, 0, -(-rows // PER_WORD)).array
        # Zero points are packed along rows, codes along columns.
        self._zeros = np.ascontiguousarray(_unpacked(whole.T)[:, :rows].T)
        self._group = group

    def rows(self, start: int, stop: int) -> Floats:
        """The rows from `start` to `stop`, dequantized."""
        packed, scales = (
            read_rows(tensor, tensor.spec, start, stop) for tensor in self._tensors[:2]
        )
        return _dequantized(packed.array, as_float32(scales), self._zeros[start:stop])


class BoundedValues(PackedValues):
    """Values with their bound."""

    tolerated = 0.0

    def __init__(self, tensors: Tensors, module: str, group: int, observer: str) -> None:
        """As `PackedValues`; `observer` says how the range of a group was found."""
        super().__init__(tensors, module, group)
        self._observer = observer

    def allowance(self, source: Floats, start: int) -> Floats:
        """See `QuantizedValues.allowance`."""
        groups = source.reshape(-1, self._group)
        return allowance(groups, self._observer, self.dtype).reshape(source.shape)


def allowance(groups: Floats, observer: str, dtype: str) -> Floats:
    """The most that each weight of `groups` [n, group size] may be off; see the module's text."""
    place, share = HALF_PLACE[dtype], _SMALLEST_SHARE[observer]
    low = np.minimum(groups.min(axis=1), 0)[:, None]
    high = np.maximum(groups.max(axis=1), 0)[:, None]
    step = (high - low) / 15
    rounding = 3 * 16 * place * step
    cut = np.maximum(groups - share * high, share * low - groups)
    # The ends of the codes lie up to half a step inside those of the range.
    allowed: Floats = np.maximum(cut, 0) + step / 2 + rounding + 32 * HALF_SMALLEST[dtype]
    return allowed.astype(np.float32)


def _unpacked(words: NDArray[np.int32]) -> NDArray[np.int8]:
    """Codes of -8..7, eight of each word along the last axis, the first one lowest."""
    shifts = np.arange(0, 32, 4, dtype=np.uint32)
    nibbles = (words.view(np.uint32)[..., None] >> shifts) & np.uint32(15)
    return (nibbles.astype(np.int8) - np.int8(8)).reshape(*words.shape[:-1], -1)


def _dequantized(packed: NDArray[np.int32], scales: Floats, zeros: NDArray[np.int8]) -> Floats:
    codes = _unpacked(packed).astype(np.float32).reshape(*scales.shape, -1)
    values: Floats = (codes - zeros.astype(np.float32)[..., None]) * scales[..., None]
    return values.reshape(len(scales), -1)


def round_trip(weight: Floats, group: int, observer: str) -> Floats:
    """A weight, float32, quantized in BF16 and dequantized."""
    rows, columns = weight.shape
    raw = np.empty(weight.shape, NUMPY_NAME["BF16"])
    elementwise.cast(weight, "F32", "BF16", raw)
    scales = np.empty((rows, columns // group), raw.dtype)
    zeros = np.empty(scales.shape, np.int8)
    packed = np.empty((rows, columns // PER_WORD), np.int32)
    observe = {"mse": compressed.mse_qparams, "memoryless_minmax": compressed.minmax_qparams}
    observe[observer](raw, "BF16", group, scales, zeros)
    compressed.quantize_affine(raw, "BF16", group, scales, zeros, packed)
    return _dequantized(packed, as_float32(TensorData("BF16", scales)), zeros)
