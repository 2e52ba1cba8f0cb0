"""The numbers of NVFP4 under a global scale g, and how far they may be off.

A block of 16 with largest magnitude A has the scale s = E4M3(r), r = g A / 6, at most 448, and each
weight w becomes t times the code nearest to w / t, for t = s / g.

- A / 6 is rounded to the weight's type: r is off by p = 2^-8 of itself, which is BF16's, or by half
  the smallest number of F16, times g; there, g is below 2^16.
- E4M3 has three bits behind the point: s is off by at most 2^-4 of the power of two below r, and
  by 2^-10 where s is denormal, below 2^-6.  This bounds t from below and above.
- Codes are 0.5 apart up to 2, then 1 up to 4, then 2 up to 6: nearest is within half of that.
- Where s was rounded down, the block's largest weights lie beyond 6 t, and are cut to it.
- A code is never further off than zero is, which bounds what scales near zero leave.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from carnice_build.dtypes import NUMPY_NAME, TensorSpec
from carnice_build.formats.checks import Tensors
from carnice_build.formats.compressed_tensors.storages.nvfp4_ops import SUFFIXES
from carnice_build.formats.nvfp4.ops import BLOCK
from carnice_build.formats.values import (
    HALF_PLACE,
    HALF_SMALLEST,
    Floats,
    Incomparable,
    matrix,
    read_rows,
)
from carnice_build.kernels import elementwise, global_nvfp4, nvfp4

_LARGEST_SCALE = 448.0
_LARGEST_F16 = 2.0**16

_FLOAT32_SLACK = 1.001
"""Products are rounded, and a weight halfway between codes may go either way."""


class GlobalValues:
    """A module in NVFP4, dequantized by code * (scale / global scale), with its bound."""

    tolerated = 0.0

    def __init__(self, tensors: Tensors, module: str) -> None:
        """Take `module`'s tensors; Incomparable when they do not fit together."""
        try:
            *parts, scale = (tensors[f"{module}.{suffix}"] for suffix in SUFFIXES)
        except KeyError:
            raise Incomparable(f"{module} is not in NVFP4") from None
        self._tensors = parts
        packed = matrix(parts[0].spec)
        self.shape = packed[0], 2 * packed[1]
        if [tensor.spec for tensor in parts] != [
            TensorSpec("U8", packed),
            TensorSpec("F8_E4M3", (packed[0], self.shape[1] // BLOCK)),
        ]:
            raise Incomparable(f"{module} has no scale for each block of {BLOCK}")
        if scale.spec.dtype != "F32" or scale.spec.size != 1:
            raise Incomparable(f"{module} has no global scale")
        self._scale = float(read_rows(scale, TensorSpec("F32", (1, 1)), 0, 1).array[0, 0])
        if not 0 < self._scale < np.inf:
            raise Incomparable(f"{scale.name} is no positive number")

    def rows(self, start: int, stop: int) -> Floats:
        """The rows from `start` to `stop`, dequantized."""
        packed, scales = (
            read_rows(tensor, tensor.spec, start, stop).array for tensor in self._tensors
        )
        out = np.empty((stop - start, self.shape[1]), np.float32)
        global_nvfp4.dequantize_rows(packed, scales, self._scale, out)
        return out

    def allowance(self, source: Floats, start: int) -> Floats:
        """See `QuantizedValues.allowance`."""
        blocks = source.reshape(-1, BLOCK)
        return allowance(blocks, self._scale).reshape(source.shape)


def allowance(blocks: Floats, scale: float) -> Floats:
    """The most that each weight of `blocks` [n, 16] may be off; see the module's text."""
    magnitude = np.abs(blocks).astype(np.float64)
    ratio = magnitude.max(axis=1, keepdims=True) * scale / 6
    off = np.maximum(ratio * HALF_PLACE["BF16"], HALF_SMALLEST["F16"] * min(scale, _LARGEST_F16))
    low, high = ratio - off, ratio + off
    low = np.minimum(low - _half_place(low), _LARGEST_SCALE)
    high = np.minimum(high + _half_place(high), _LARGEST_SCALE) / scale
    near_zero = low < 2.0**-9
    low = np.where(near_zero, 1.0, low) / scale
    code = magnitude / low
    half_gap = np.where(code <= 2, 0.25, np.where(code <= 4, 0.5, 1.0))
    allowed = np.maximum(half_gap * high, magnitude - 6 * low) * _FLOAT32_SLACK
    return np.where(near_zero, magnitude, allowed).astype(np.float32)


def _half_place(ratio: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> Floats:
    """The most that rounding to E4M3 moves a number."""
    power = np.exp2(np.floor(np.log2(np.maximum(ratio, 2.0**-20))) - 4)
    found: Floats = np.maximum(power, 2.0**-10)
    return found


def round_trip(weights: Sequence[Floats]) -> list[Floats]:
    """Weights that share a scale, float32 [rows, columns], quantized in BF16 and dequantized."""
    raws = []
    for weight in weights:
        raw = np.empty(weight.shape, NUMPY_NAME["BF16"])
        elementwise.cast(weight, "F32", "BF16", raw)
        raws.append(raw)
    scale = global_nvfp4.global_scale(max(nvfp4.amax(raw, "BF16")[0] for raw in raws), "BF16")
    return [_round_trip(raw, scale) for raw in raws]


def _round_trip(raw: np.ndarray[tuple[int, ...], np.dtype[np.uint16]], scale: np.float32) -> Floats:
    rows, columns = raw.shape
    packed = np.empty((rows, columns // 2), np.uint8)
    scales = np.empty((rows, columns // BLOCK), np.uint8)
    global_nvfp4.quantize_rows(raw, "BF16", scale, packed, scales)
    out = np.empty(raw.shape, np.float32)
    global_nvfp4.dequantize_rows(packed, scales, scale, out)
    return out
