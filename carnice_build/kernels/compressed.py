"""The observer ``mse`` of llm-compressor 0.14 for integers in groups, bit for bit.

For groups of ``group_size`` inputs of a weight [out, in] it finds scales, [out, in / group_size]
in the weight's dtype, and zero points; ``integers`` makes codes under them.  torch computes all of
it in the weight's dtype, and so do we.

Functions run on the calling thread, without the GIL.  Weights come in the storage of ``dtype``
(``_floats``), in any layout; all else must be C-contiguous and aligned.  Misfits raise ValueError.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

from . import _mse_loops as loops
from ._floats import Array, FloatFormat, first_non_finite, float_format, require, widen
from .elementwise import narrow

ZeroPoints = NDArray[np.int8]

GROUP_SIZES = (32, 64, 128)

_MSE = {"BF16": loops.mse_bf16, "F16": loops.mse_f16}

_EXPONENT = {"BF16": 2.40625, "F16": 2.400390625}
"""2.4 as torch has it beside a tensor of that dtype."""
_GRID, _MAX_SHRINK, _PATIENCE = 100, 0.20, 5


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

    ``scales``, of ``dtype``, and ``zero_points``, int8, are [rows, in / group_size].  BF16 and F16
    only: torch's power of a 16-bit float is one of 32768 values, its power of a float32 is its own
    approximation.

    Returns -1, or the flat index in ``weight`` of the first NaN or Inf; the outputs are then
    unspecified.
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


def _place(chunk: int, groups: Array, form: FloatFormat) -> int:
    """The flat index of the first NaN or Inf from group ``chunk`` on; -1 for -1."""
    if chunk < 0:
        return -1
    return chunk * int(groups.shape[1]) + first_non_finite(groups[chunk:], form)
