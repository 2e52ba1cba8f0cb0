"""INT4 weights in the format ``pack-quantized`` of compressed-tensors 0.19, bit for bit.

A weight [out, in] becomes three tensors, for groups of ``group_size`` inputs:

- ``weight_packed``, int32 [out, in / 8]: eight codes along *in*, the first one lowest;
- ``weight_scale``, [out, in / group_size], in the weight's dtype;
- ``weight_zero_point``, int32 [out / 8, in / group_size]: eight zero points along *out*.

weight ~ scale * (code - zero point), both in -8..7 and stored plus 8. torch computes all of it in
the weight's dtype, and so do we: in BF16, a scale has eight significant bits before the codes are
made from it.

Functions run on the calling thread, without the GIL. Weights come in the storage of ``dtype``
(``_floats``), in any layout; all else must be C-contiguous and aligned. Misfits raise ValueError.
Where one returns an int, that is -1, or the flat index in ``weight`` of the first NaN or Inf; the
outputs are then unspecified. The rows of ``quantize_affine`` and ``minmax_qparams`` are
independent: any split into blocks, on any threads, gives the same bytes.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

from . import _compressed_loops as loops
from . import _mse_loops as mse_loops
from ._floats import Array, FloatFormat, first_non_finite, float_format, require, widen
from .elementwise import narrow

Packed = NDArray[np.int32]
ZeroPoints = NDArray[np.int8]

GROUP_SIZES = (32, 64, 128)

_QUANTIZE = {"BF16": loops.quantize_bf16, "F16": loops.quantize_f16, "F32": loops.quantize_f32}
_MINMAX = {"BF16": loops.minmax_bf16, "F16": loops.minmax_f16, "F32": loops.minmax_f32}
_MSE = {"BF16": mse_loops.mse_bf16, "F16": mse_loops.mse_f16}

_EXPONENT = {"BF16": 2.40625, "F16": 2.400390625}
"""2.4 as torch has it beside a tensor of that dtype."""
_GRID, _MAX_SHRINK, _PATIENCE = 100, 0.20, 5


def quantize_affine(
    weight: Array,
    dtype: str,
    group_size: int,
    scales: Array,
    zero_points: ZeroPoints,
    packed: Packed,
) -> int:
    """Quantize the rows of ``weight``, [rows, in], with given scales and zero points.

    ``scales``, of ``dtype``, and ``zero_points``, -8..7, are [rows, in / group_size]; the codes
    go to ``packed``, [rows, in / 8]. As ``quantize`` of compressed-tensors
    (quantization/lifecycle/forward.py) has it, code = rint(clip(w / scale + zero point, -8, 7)),
    quotient and sum each rounded to ``dtype``, ties to even. A scale that is 0 or not finite, or
    a zero point out of range, raises ValueError.
    """
    form, groups = _grouped(weight, dtype, group_size)
    grid = weight.shape[0], weight.shape[1] // group_size
    require("scales", scales, form.storage, grid)
    require("zero_points", zero_points, np.int8, grid)
    require("packed", packed, np.int32, (weight.shape[0], weight.shape[1] // 8))
    if first_non_finite(scales, form) >= 0 or not (scales.view(form.bits) << 1).all():
        raise ValueError("a scale is 0 or not finite")
    _require_codes(zero_points)
    patterns = scales.reshape(-1).view(form.bits)
    chunk = _QUANTIZE[dtype](groups, patterns, zero_points.reshape(-1), packed.reshape(-1))
    return _place(chunk, groups, form)


def pack_zero_points(zero_points: ZeroPoints, packed: Packed) -> None:
    """Pack [out, groups] zero points, -8..7, eight along *out* into ``packed``,
    [ceil(out / 8), groups]; what the last word lacks is 0, as in ``pack_to_int32``."""
    out, groups = zero_points.shape
    lines = -(-out // 8)
    require("packed", packed, np.int32, (lines, groups))
    _require_codes(zero_points)
    nibbles = np.zeros((lines * 8, groups), np.uint32)
    nibbles[:out] = zero_points.astype(np.int32) + 8
    shifts = np.arange(0, 32, 4, dtype=np.uint32)[:, None]
    words = np.bitwise_or.reduce(nibbles.reshape(lines, 8, groups) << shifts, axis=1)
    packed[...] = words.view(np.int32)


def minmax_qparams(
    weight: Array, dtype: str, group_size: int, scales: Array, zero_points: ZeroPoints
) -> int:
    """Scale and zero point of each group from its extremes.

    Equal to the observer ``memoryless_minmax`` of llm-compressor followed by
    ``calculate_qparams`` (compressed_tensors/quantization/utils/helpers.py): with 0 always in the
    range, scale = (max - min) / 15, or eps of ``dtype`` where that is 0, and zero point =
    rint(clip(-8 - min / scale, -8, 7)), each operation rounded to ``dtype``. A group of zeros
    gets zero point 0. A range that overflows ``dtype`` gives an infinite scale, which
    ``quantize_affine`` refuses.

    ``scales``, of ``dtype``, and ``zero_points`` are [rows, in / group_size].
    """
    form, groups = _grouped(weight, dtype, group_size)
    patterns, zeros = _qparams(weight, group_size, form, scales, zero_points)
    return _place(_MINMAX[dtype](groups, patterns, zeros), groups, form)


def mse_qparams(
    weight: Array,
    dtype: str,
    group_size: int,
    scales: Array,
    zero_points: ZeroPoints | None,
    bits: int = 4,
) -> int:
    """Scale and zero point of each group from the range of the least error.

    Equal to the observer ``mse`` of llm-compressor 0.14 with its defaults
    (llmcompressor/observers/mse_quant.py) on an x86-64 CPU: of the ranges p * min .. p * max,
    p = 1, 0.99, .. 0.81, the first with the least sum of |dequantized - w| ** 2.4 over the group,
    in the arithmetic of ``dtype``. The search ends early when five in a row improve no group of
    the whole weight, so rows are not independent here.  Codes are of ``bits``, and symmetric where
    there are no zero points. The sum is that of torch to the last bit,
    its order of additions included; CUDA searches by another rule and gives other results.

    As ``minmax_qparams``, but BF16 and F16 only: torch's power of a 16-bit float is one of
    32768 values, its power of a float32 is its own approximation.
    """
    if dtype not in _MSE:
        raise ValueError(f"dtype is {dtype!r}, expected one of {', '.join(_MSE)}")
    form, groups = _grouped(weight, dtype, group_size)
    symmetric = zero_points is None
    held = np.empty(scales.shape, np.int8) if zero_points is None else zero_points
    patterns, zeros = _qparams(weight, group_size, form, scales, held)
    steps = int(_MAX_SHRINK * _GRID)
    shrinks = np.array([1 - i / _GRID for i in range(steps)], np.float32)
    tried = shrinks, _PATIENCE, _powers(dtype)
    chunk = _MSE[dtype](groups, bits, symmetric, *tried, patterns, zeros)
    return _place(chunk, groups, form)


@cache
def _powers(dtype: str) -> NDArray[np.float32]:
    """Each positive value of a 16-bit float to the power of ``_EXPONENT``, by bit pattern."""
    form = float_format(dtype)
    values = widen(np.arange(1 << 15, dtype=np.uint16).view(form.storage), dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        powers = (values.astype(np.float64) ** _EXPONENT[dtype]).astype(np.float32)
        return widen(narrow(powers, dtype), dtype)


def _grouped(weight: Array, dtype: str, group_size: int) -> tuple[FloatFormat, Array]:
    """The bit patterns of a weight by groups, [n, group_size], never writable: numba would
    compile again for an array that is."""
    form = float_format(dtype)
    if group_size not in GROUP_SIZES:
        raise ValueError(f"group_size is {group_size}, expected one of {GROUP_SIZES}")
    if weight.ndim != 2 or weight.shape[1] % group_size:
        raise ValueError(f"shape {list(weight.shape)} is not [rows, a multiple of {group_size}]")
    weight = np.require(weight, requirements=["C", "A"])
    require("weight", weight, form.storage, weight.shape)
    patterns = weight.view(form.bits).reshape(-1, group_size)
    patterns.flags.writeable = False
    return form, patterns


def _qparams(
    weight: Array, group_size: int, form: FloatFormat, scales: Array, zero_points: ZeroPoints
) -> tuple[Array, ZeroPoints]:
    """The outputs of an observer, flat, once they fit the weight."""
    grid = weight.shape[0], weight.shape[1] // group_size
    require("scales", scales, form.storage, grid)
    require("zero_points", zero_points, np.int8, grid)
    return scales.reshape(-1).view(form.bits), zero_points.reshape(-1)


def _require_codes(zero_points: ZeroPoints) -> None:
    require("zero_points", zero_points, np.int8, zero_points.shape)
    if ((zero_points < -8) | (zero_points > 7)).any():
        raise ValueError("a zero point is not in -8..7")


def _place(chunk: int, groups: Array, form: FloatFormat) -> int:
    """The flat index of the first NaN or Inf from group ``chunk`` on; -1 for -1."""
    if chunk < 0:
        return -1
    return chunk * int(groups.shape[1]) + first_non_finite(groups[chunk:], form)
