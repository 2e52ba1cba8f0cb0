"""Weights as modelopt stores them: their numbers, and how far each may be from its source.

NVFP4: a block of 16 with largest magnitude A has the scale s = E4M3(max(r, 2^-9)), where
r = A / (6 scale_2), and each weight w becomes t times the code nearest to w / t, for t = s scale_2.

- E4M3 has three bits behind the point: s is off by at most 2^-4 of the power of two below r, and
  by 2^-10 where s is denormal, below 2^-6.  This bounds t from below and above.
- Codes are 0.5 apart up to 2, then 1 up to 4, then 2 up to 6: nearest is within half of that.
- Where s was rounded down, the block's largest weights lie beyond 6 t, and are cut to it.

Blocks of one tensor have scales of at most 448, because scale_2 is the largest A over 6 * 448 (of
all tensors that are fused), so nothing else is cut.

FP8: the scale of the tensor is stored in full, and the quotient is rounded to the weight's type
before it is rounded to E4M3, whose codes have three bits behind the point: one is off by at most
2^-4 of the power of two below the quotient, by 2^-10 where that is denormal, and by 2^-8 of the
quotient for the first rounding, which is that of BF16 or finer.

MXFP8: the same without the first rounding, for the quotient by a power of two is exact.  The power
follows from the block.
"""

from __future__ import annotations

import math
import struct
from typing import Any

import numpy as np

from carnice_build.dtypes import TensorSpec
from carnice_build.formats.checks import QuantizedValues, Tensors
from carnice_build.formats.nvfp4.algorithms import ALGORITHMS
from carnice_build.formats.nvfp4.fp8_ops import MX_BLOCK
from carnice_build.formats.nvfp4.ops import BLOCK
from carnice_build.formats.scheme import Scheme
from carnice_build.formats.values import HALF_PLACE, Floats, Incomparable, matrix, read_rows
from carnice_build.kernels import modelopt_fp8, nvfp4
from carnice_build.tensors import SourceTensor

_ROUNDED = HALF_PLACE["BF16"]

_FLOAT32_SLACK = 1.001
"""The quantizer computes in float32, so a weight halfway between codes may go either way."""


class Nvfp4Values:
    """A module in NVFP4, dequantized by code * (scale * scale_2)."""

    tolerated = 0.0

    def __init__(self, tensors: Tensors, module: str) -> None:
        """Take `module`'s tensors; Incomparable when they do not fit together."""
        try:
            self._tensors = [tensors[f"{module}.{suffix}"] for suffix in ("weight", "weight_scale")]
        except KeyError:
            raise Incomparable(f"{module} is not in NVFP4") from None
        packed, grid = (matrix(tensor.spec) for tensor in self._tensors)
        self.shape = packed[0], 2 * packed[1]
        if grid != (packed[0], self.shape[1] // BLOCK):
            raise Incomparable(f"{module} has no scale for each block of {BLOCK}")
        self._scale_2 = scalar(tensors, f"{module}.weight_scale_2")

    def rows(self, start: int, stop: int) -> Floats:
        """The rows from `start` to `stop`, dequantized."""
        packed, scales = (
            read_rows(tensor, tensor.spec, start, stop).array for tensor in self._tensors
        )
        out = np.empty((stop - start, self.shape[1]), np.float32)
        nvfp4.dequantize_rows(packed, scales, self._scale_2, out)
        return out

    def allowance(self, source: Floats, start: int) -> Floats:
        """See `QuantizedValues.allowance`."""
        blocks = source.reshape(-1, BLOCK)
        return allowance(blocks, self._scale_2).reshape(source.shape)


class Fp8Values:
    """A module in FP8, dequantized by code * scale."""

    tolerated = 0.0

    def __init__(self, tensors: Tensors, module: str) -> None:
        """Take `module`'s tensors; Incomparable when they do not fit together."""
        try:
            self._codes = tensors[f"{module}.weight"]
        except KeyError:
            raise Incomparable(f"{module} is not in FP8") from None
        self.shape = matrix(self._codes.spec)
        if self._codes.spec.dtype != "F8_E4M3":
            raise Incomparable(f"{module} is not in FP8")
        self._scale = scalar(tensors, f"{module}.weight_scale")

    def rows(self, start: int, stop: int) -> Floats:
        """The rows from `start` to `stop`, dequantized."""
        codes = read_rows(self._codes, self._codes.spec, start, stop)
        out = np.empty((stop - start, self.shape[1]), np.float32)
        modelopt_fp8.dequantize_tensor(codes.array, self._scale, out)
        return out

    def allowance(self, source: Floats, start: int) -> Floats:
        """See `QuantizedValues.allowance`."""
        return fp8_allowance(source, self._scale, _ROUNDED)


class Mxfp8Values:
    """A module in MXFP8, dequantized by code * 2^exponent."""

    tolerated = 0.0

    def __init__(self, tensors: Tensors, module: str) -> None:
        """Take `module`'s tensors; Incomparable when they do not fit together."""
        try:
            self._tensors = [tensors[f"{module}.{suffix}"] for suffix in ("weight", "weight_scale")]
        except KeyError:
            raise Incomparable(f"{module} is not in MXFP8") from None
        self.shape = matrix(self._tensors[0].spec)
        grid = TensorSpec("U8", (self.shape[0], self.shape[1] // MX_BLOCK))
        if self._tensors[0].spec.dtype != "F8_E4M3" or self._tensors[1].spec != grid:
            raise Incomparable(f"{module} has no exponent for each block of {MX_BLOCK}")

    def rows(self, start: int, stop: int) -> Floats:
        """The rows from `start` to `stop`, dequantized."""
        codes, scales = (
            read_rows(tensor, tensor.spec, start, stop).array for tensor in self._tensors
        )
        out = np.empty((stop - start, self.shape[1]), np.float32)
        modelopt_fp8.dequantize_rows(codes, scales, out)
        return out

    def allowance(self, source: Floats, start: int) -> Floats:
        """See `QuantizedValues.allowance`."""
        return mxfp8_allowance(source)


def stored_values(tensors: Tensors, module: str, scheme: Scheme) -> QuantizedValues:
    """A module that is stored so."""
    if scheme == ALGORITHMS["NVFP4"].scheme:
        return Nvfp4Values(tensors, module)
    if scheme == ALGORITHMS["FP8"].scheme:
        return Fp8Values(tensors, module)
    if scheme == ALGORITHMS["MXFP8"].scheme:
        return Mxfp8Values(tensors, module)
    raise Incomparable(f"{module} is stored in a way not known")


def fp8_allowance(magnitudes: Floats, scale: Any, rounded: float) -> Floats:
    """The most that weights may be off in E4M3 under a scale; see the module's text.

    `rounded` is the share by which the quotient is off before that.
    """
    code = np.abs(magnitudes).astype(np.float64) / scale
    gap = np.exp2(np.floor(np.log2(np.maximum(code, 2.0**-6))) - 4)
    allowed = np.maximum(gap + code * rounded, code - 448.0) * scale * _FLOAT32_SLACK
    within: Floats = allowed.astype(np.float32)
    return within


def mxfp8_allowance(rows: Floats) -> Floats:
    """The most that weights may be off in MXFP8; see the module's text."""
    blocks = rows.reshape(-1, MX_BLOCK)
    # The least power of two under which nothing is cut; 2^-127 at least.
    ratio = np.maximum(np.abs(blocks).max(axis=1, keepdims=True) / 448.0, 2.0**-127)
    steps = np.exp2(np.ceil(np.log2(ratio.astype(np.float64))))
    return fp8_allowance(blocks, steps, 0.0).reshape(rows.shape)


def allowance(blocks: Floats, scale_2: float) -> Floats:
    """The most that each weight of `blocks` [n, 16] may be off; see the module's text."""
    magnitude = np.abs(blocks)
    ratio = np.maximum(magnitude.max(axis=1) / (6 * scale_2), 2.0**-9)
    half_place = np.maximum(np.exp2(np.floor(np.log2(ratio)) - 4), 2.0**-10)
    low = ((ratio - half_place) * scale_2)[:, None]
    high = ((ratio + half_place) * scale_2)[:, None]
    code = magnitude / low
    half_gap = np.where(code <= 2, 0.25, np.where(code <= 4, 0.5, 1.0))
    allowed: Floats = np.maximum(half_gap * high, magnitude - 6 * low) * _FLOAT32_SLACK
    return allowed


def nvfp4_round_trip(weight: Floats, scale_2: np.float32) -> Floats:
    """Weights in NVFP4, dequantized."""
    rows, columns = weight.shape
    packed = np.empty((rows, columns // 2), np.uint8)
    scales = np.empty((rows, columns // BLOCK), np.uint8)
    nvfp4.quantize_rows(weight, "F32", scale_2, packed, scales)
    out = np.empty_like(weight)
    nvfp4.dequantize_rows(packed, scales, scale_2, out)
    return out


def nvfp4_rounded(rows: Floats, scale: float) -> Floats:
    """Activations as NVFP4 rounds them under the scale of their linear."""
    out = np.empty_like(rows)
    bad_index = nvfp4.round_rows(rows, scale, out)
    # Numbers that are not finite shall be seen where the model says them.
    return out if bad_index < 0 else rows


def fp8_round_trip(rows: Floats, scale: float | np.float32) -> Floats:
    """Numbers in FP8 under a scale, dequantized."""
    codes, out = np.empty(rows.shape, np.uint8), np.empty_like(rows)
    if modelopt_fp8.quantize_tensor(rows, "F32", scale, codes) >= 0:
        return rows
    modelopt_fp8.dequantize_tensor(codes, scale, out)
    return out


def mxfp8_round_trip(rows: Floats) -> Floats:
    """Rows in MXFP8, dequantized."""
    codes, out = np.empty(rows.shape, np.uint8), np.empty_like(rows)
    scales = np.empty((len(rows), rows.shape[1] // MX_BLOCK), np.uint8)
    if modelopt_fp8.quantize_rows(rows, "F32", codes, scales) >= 0:
        return rows
    modelopt_fp8.dequantize_rows(codes, scales, out)
    return out


def scalar(tensors: Tensors, name: str) -> float:
    """A positive float32; Incomparable when the tensor is missing or holds something else."""
    tensor = tensors.get(name)
    value = read_scalar(tensor) if tensor else math.nan
    if not is_scale(value):
        raise Incomparable(f"{name} is no positive number")
    return value


def is_scale(value: float) -> bool:
    """Whether a scale can be that."""
    return 0 < value < math.inf


def read_scalar(tensor: SourceTensor) -> float:
    """The value of a float32 tensor of one element, NaN for any other."""
    if tensor.spec.dtype != "F32" or tensor.spec.size != 1 or tensor.file is None:
        return math.nan
    buffer = bytearray(4)
    tensor.file.read_into(tensor.offset, memoryview(buffer))
    return float(struct.unpack("<f", buffer)[0])
