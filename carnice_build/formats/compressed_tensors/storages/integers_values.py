"""The numbers of integer weights, packed or one a byte, and how far they may be off.

A group becomes s times codes of b bits, less a zero point if there is one, by rounding to nearest.
With p, half a unit in the last place of the weight's type, as a share:

- Symmetric: s is q A over 2^(b-1) - 1/2 for the largest magnitude A, and off by p of itself.  The
  quotient of a weight and s is off by p times the power of two below it, in units of s, and the
  code by half a unit more.  Positive codes end at 2^(b-1) - 1, and weights beyond the codes are
  cut to the last one.
- Asymmetric: the range R = max - min, 0 included, has 2^b - 1 steps of s = q R / (2^b - 1).  With
  q < 1 an end is cut by (1 - q) of its distance from zero.  Rounding to a code leaves half a step;
  so do codes that end before the range does, because the zero point is a whole number too.  The
  quotient and the sum with the zero point are off by 2^b p steps each, and s by p of itself, as
  much at 2^b steps from zero.
- The observer memoryless_minmax has q = 1, mse takes the best q from 0.81 on, and rounds q A too.

Where p is that of denormal numbers it is half the smallest instead, of s or of the quotient; and
where s would be zero, the group becomes zeros.

What AWQ smoothed is not compared: the folder does not tell by what its weights were multiplied.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from carnice_build.dtypes import NUMPY_NAME, WIDE_FLOATS, TensorSpec
from carnice_build.formats.checks import Tensors
from carnice_build.formats.compressed_tensors import ops as packed_ops
from carnice_build.formats.compressed_tensors.storages import ints_ops
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
from carnice_build.kernels import compressed, elementwise, integers
from carnice_build.tensors import SourceTensor

_SMALLEST_SHARE = {"mse": 0.81, "memoryless_minmax": 1.0}
_PERMUTATION = "weight_g_idx"

_FLOAT32_SLACK = 1.001
"""The product of code and scale is rounded, and a weight halfway between codes goes either way."""


@dataclass(frozen=True)
class Integers:
    """How integers stand for weights: `group_size` None for one group a row."""

    bits: int
    group_size: int | None
    symmetric: bool
    observer: str = "memoryless_minmax"

    def group(self, columns: int) -> int:
        """Weights of a row of `columns` that share a scale."""
        return self.group_size or columns


class IntegerValues:
    """A module in integers, dequantized by scale * (code - zero point), with its bound."""

    tolerated = 0.0

    def __init__(self, tensors: Tensors, module: str, scheme: Integers, *, packed: bool) -> None:
        """Take `module`'s tensors; Incomparable when they do not fit together.

        `packed` codes share words, others are bytes.
        """
        if f"{module}.{_PERMUTATION}" in tensors:
            raise Incomparable(f"the columns of {module} are in another order")
        self._module, self._scheme, self._packed = module, scheme, packed
        names: tuple[str, ...] = packed_ops.SUFFIXES if packed else ints_ops.SUFFIXES
        self._codes, self._scales = (_tensor(tensors, module, name) for name in names[:2])
        rows, width = matrix(self._codes.spec)
        self.dtype = self._scales.spec.dtype
        groups = matrix(self._scales.spec)[1]
        columns = width
        if packed and scheme.group_size:
            columns = groups * scheme.group_size
        elif packed:
            columns = _columns(_tensor(tensors, module, names[3]), rows)
        self.shape = rows, columns
        taken = integers.words(columns, scheme.bits) if packed else columns
        self._fit(self._codes, TensorSpec("I32" if packed else "I8", (rows, taken)))
        if self.dtype not in WIDE_FLOATS or columns % scheme.group(columns):
            raise Incomparable(f"{module} is not of groups of {scheme.group_size}")
        self._fit(self._scales, TensorSpec(self.dtype, (rows, columns // scheme.group(columns))))
        self._zeros = None
        if not scheme.symmetric:
            self._zeros = self._zero_points(_tensor(tensors, module, names[2]))

    def rows(self, start: int, stop: int) -> Floats:
        """The rows from `start` to `stop`, dequantized."""
        codes = read_rows(self._codes, self._codes.spec, start, stop).array
        if self._packed:
            packed, codes = codes, np.empty((stop - start, self.shape[1]), np.int8)
            integers.unpack_rows(packed, self._scheme.bits, codes)
        scales = as_float32(read_rows(self._scales, self._scales.spec, start, stop))
        zeros = None if self._zeros is None else self._zeros[start:stop]
        out = np.empty(codes.shape, np.float32)
        integers.dequantize_rows(codes, scales, zeros, out)
        return out

    def allowance(self, source: Floats, start: int) -> Floats:
        """See `QuantizedValues.allowance`."""
        groups = source.reshape(-1, self._scheme.group(source.shape[1]))
        return allowance(groups, self._scheme, self.dtype).reshape(source.shape)

    def _fit(self, tensor: SourceTensor, spec: TensorSpec) -> None:
        if tensor.spec != spec:
            raise Incomparable(
                f"{self._module} does not fit: {tensor.spec.dtype} {list(tensor.spec.shape)}, "
                f"expected {spec.dtype} {list(spec.shape)}"
            )

    def _zero_points(self, tensor: SourceTensor) -> NDArray[np.int8]:
        rows, groups = self._scales.spec.shape
        if not self._packed:
            self._fit(tensor, TensorSpec("I8", (rows, groups)))
            found: NDArray[np.int8] = read_rows(tensor, tensor.spec, 0, rows).array
            return found
        lines = integers.words(rows, self._scheme.bits)
        self._fit(tensor, TensorSpec("I32", (lines, groups)))
        zeros = np.empty((rows, groups), np.int8)
        whole = read_rows(tensor, tensor.spec, 0, lines).array
        integers.unpack_zero_points(whole, self._scheme.bits, zeros)
        return zeros


def allowance(groups: Floats, scheme: Integers, dtype: str) -> Floats:
    """The most that each weight of `groups` [n, group size] may be off; see the module's text."""
    wide = groups.astype(np.float64)
    bound = _symmetric if scheme.symmetric else _asymmetric
    allowed: Floats = bound(wide, scheme, HALF_PLACE[dtype], HALF_SMALLEST[dtype]).astype(
        np.float32
    )
    return allowed


def _symmetric(
    groups: NDArray[np.float64], scheme: Integers, place: float, smallest: float
) -> NDArray[np.float64]:
    half = 2.0 ** (scheme.bits - 1)
    magnitude = np.abs(groups)
    share = _SMALLEST_SHARE[scheme.observer]
    exact = magnitude.max(axis=1, keepdims=True) / (half - 0.5)
    # Twice, where the search rounds what it divides too.
    off = np.maximum(exact * place, smallest) * (1 if share == 1 else 2)
    vanishes = share * exact <= off
    low = np.where(vanishes, 1.0, share * exact - off)
    code = np.minimum(magnitude / low, half)
    power = np.exp2(np.floor(np.log2(np.maximum(code, 2.0**-20))))
    rounding = (0.5 + place * power + smallest) * (exact + off)
    cut = np.where(groups > 0, magnitude - (half - 1) * low, magnitude - half * low)
    allowed = np.maximum(rounding, cut) * _FLOAT32_SLACK
    found: NDArray[np.float64] = np.where(vanishes, magnitude, allowed) + smallest
    return found


def _asymmetric(
    groups: NDArray[np.float64], scheme: Integers, place: float, smallest: float
) -> NDArray[np.float64]:
    share, codes = _SMALLEST_SHARE[scheme.observer], 2.0**scheme.bits
    low = np.minimum(groups.min(axis=1), 0)[:, None]
    high = np.maximum(groups.max(axis=1), 0)[:, None]
    step = (high - low) / (codes - 1)
    rounding = 3 * codes * place * step
    cut = np.maximum(groups - share * high, share * low - groups)
    # The ends of the codes lie up to half a step inside those of the range.
    found: NDArray[np.float64] = np.maximum(cut, 0) + step / 2 + rounding + 2 * codes * smallest
    return found


def round_trip(weight: Floats, scheme: Integers) -> Floats:
    """A weight, float32 [rows, columns], quantized in BF16 and dequantized."""
    raw = np.empty(weight.shape, NUMPY_NAME["BF16"])
    elementwise.cast(weight, "F32", "BF16", raw)
    rows, columns = weight.shape
    group = scheme.group(columns)
    scales = np.empty((rows, columns // group), raw.dtype)
    codes = np.empty(weight.shape, np.int8)
    zeros = None if scheme.symmetric else np.empty(scales.shape, np.int8)
    searched = scheme.observer == "mse"
    if searched:
        compressed.mse_qparams(raw, "BF16", group, scales, zeros, scheme.bits)
    integers.quantize_rows(raw, "BF16", scheme.bits, group, codes, scales, zeros, given=searched)
    out = np.empty_like(weight)
    integers.dequantize_rows(codes, as_float32(TensorData("BF16", scales)), zeros, out)
    return out


def _tensor(tensors: Tensors, module: str, suffix: str) -> SourceTensor:
    try:
        return tensors[f"{module}.{suffix}"]
    except KeyError:
        raise Incomparable(f"{module} has no {suffix}") from None


def _columns(shape: SourceTensor, rows: int) -> int:
    """The columns that `weight_shape` states, of a weight of so many rows."""
    if shape.spec != TensorSpec("I64", (2,)):
        raise Incomparable(f"{shape.name} is not the shape of a matrix")
    stated, columns = read_rows(shape, shape.spec, 0, 2).array.reshape(-1).tolist()
    if stated != rows or columns < 1:
        raise Incomparable(f"{shape.name} states another shape than {rows} rows")
    return int(columns)
