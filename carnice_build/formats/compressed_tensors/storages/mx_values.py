"""The numbers of MXFP4 and MXFP8, and how far they may be off.

A block of 32 with largest magnitude A has a scale t that follows from A exactly: the power of two
that is not above A, or the next one where A is 1.75 times it or more, over 4 for E2M1 and 256 for
E4M3, and 2^-127 at least.  Each weight w becomes t times the code nearest to w / t, which is exact.

- E2M1: codes are 0.5 apart up to 2, then 1 up to 4, then 2 up to 6: nearest is within half of
  that.  A / t is below 7, so what lies beyond 6 is cut by 1 at most, which is half of the last gap.
- E4M3: codes have three bits behind the point: one is off by at most 2^-4 of the power of two
  below w / t, and by 2^-10 where it is denormal.  A / t is below 448, the largest code.
- F16 has denormals below 2^-14, of which the library makes zeros where a block has nothing else;
  so it does where t is below 2^-24.  Folders do not tell the type of the weights, so that is
  allowed wherever A is below 2^-14.
"""

from __future__ import annotations

import numpy as np

from carnice_build.dtypes import NUMPY_NAME, TensorSpec
from carnice_build.formats.checks import Tensors
from carnice_build.formats.compressed_tensors.storages.mx_ops import BLOCK, SUFFIXES
from carnice_build.formats.values import Floats, Incomparable, matrix, read_rows
from carnice_build.kernels import elementwise, mx

_FLOAT32_SLACK = 1.001
"""A weight halfway between codes may go either way."""

_SMALLEST_NORMAL_F16 = 2.0**-14

_OFFSET = {4: 2, 8: 8}
"""By bits, the logarithm of the power of two below the largest code."""


class MxValues:
    """A module in MXFP4 or MXFP8, dequantized by code * scale, with its bound."""

    tolerated = 0.0

    def __init__(self, tensors: Tensors, module: str, bits: int) -> None:
        """Take `module`'s tensors; Incomparable when they do not fit together."""
        try:
            self._tensors = [tensors[f"{module}.{suffix}"] for suffix in SUFFIXES[bits]]
        except KeyError:
            raise Incomparable(f"{module} is not in MXFP{bits}") from None
        self._bits = bits
        rows, width = matrix(self._tensors[0].spec)
        self.shape = rows, width * 8 // bits
        if [tensor.spec for tensor in self._tensors] != [
            TensorSpec("U8" if bits == 4 else "F8_E4M3", (rows, width)),
            TensorSpec("U8", (rows, self.shape[1] // BLOCK)),
        ]:
            raise Incomparable(f"{module} has no scale for each block of {BLOCK}")

    def rows(self, start: int, stop: int) -> Floats:
        """The rows from `start` to `stop`, dequantized."""
        codes, scales = (
            read_rows(tensor, tensor.spec, start, stop).array for tensor in self._tensors
        )
        out = np.empty((stop - start, self.shape[1]), np.float32)
        mx.dequantize_rows(codes, self._bits, scales, out)
        return out

    def allowance(self, source: Floats, start: int) -> Floats:
        """See `QuantizedValues.allowance`."""
        blocks = source.reshape(-1, BLOCK)
        return allowance(blocks, self._bits).reshape(source.shape)


def allowance(blocks: Floats, bits: int) -> Floats:
    """The most that each weight of `blocks` [n, 32] may be off; see the module's text."""
    magnitude = np.abs(blocks).astype(np.float64)
    largest = magnitude.max(axis=1, keepdims=True)
    mantissa, exponent = np.frexp(largest)
    # Of a mantissa from 0.5 on: 0.875 is 1.75 times the power of two before.
    power = exponent - 1 + (mantissa >= 0.875) - _OFFSET[bits]
    step = np.exp2(np.where(mantissa > 0, np.maximum(power, -127), -127))
    code = magnitude / step
    if bits == 4:
        half_gap = np.where(code <= 2, 0.25, np.where(code <= 4, 0.5, 1.0))
    else:
        half_gap = np.exp2(np.floor(np.log2(np.maximum(code, 2.0**-6))) - 4)
    allowed = half_gap * step * _FLOAT32_SLACK
    zeroed = largest < _SMALLEST_NORMAL_F16
    return np.where(zeroed, np.maximum(allowed, magnitude), allowed).astype(np.float32)


def round_trip(weight: Floats, bits: int) -> Floats:
    """A weight, float32 [rows, columns], quantized in BF16 and dequantized."""
    rows, columns = weight.shape
    raw = np.empty(weight.shape, NUMPY_NAME["BF16"])
    elementwise.cast(weight, "F32", "BF16", raw)
    codes = np.empty((rows, columns * bits // 8), np.uint8)
    scales = np.empty((rows, columns // BLOCK), np.uint8)
    mx.quantize_rows(raw, "BF16", bits, codes, scales)
    out = np.empty_like(weight)
    mx.dequantize_rows(codes, bits, scales, out)
    return out
