"""AWQ's smoothing, bit for bit as llm-compressor 0.14 leaves weights and norms, in plain numpy.

Smoothing moves a vector of scales, one for each channel, out of a module's output and into the
weights that read it (`models.smoothing`).
Found scales and stored weights are all that it takes.
Products and quotients are taken in float64, then rounded to float32 and to the tensor's type,
as torch does when it assigns one type to another; what a type cannot hold becomes Inf.
Source: `AWQModifier._apply_smoothing` and `CalibrationOffsetNorm`.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from ._floats import Array, first_non_finite, float_format, require, widen
from .elementwise import narrow

_BLOCK = 1 << 20
"""Weights in float64 at a time: 8 MB."""


def multiply_columns(weight: Array, dtype: str, scales: NDArray[np.float64], out: Array) -> int:
    """Write `weight` [rows, columns] of `dtype` times `scales` [columns] to `out`.

    Rows are independent.  `out` may be `weight` itself.
    Returns -1, or the flat index of the first NaN or Inf of `weight`; `out` is then unspecified.
    ValueError for an unknown dtype and for arrays that do not fit each other.
    """
    require("scales", scales, np.float64, weight.shape[1:])
    return _in_blocks(weight, dtype, scales[None, :], np.multiply, out)


def divide_rows(weight: Array, dtype: str, scales: NDArray[np.float64], out: Array) -> int:
    """Write `weight` [rows, columns], or a norm's or a bias's [rows], over `scales` [rows].

    Fewer scales are those of the last rows.  The rest as `multiply_columns`.
    """
    rows = len(weight)
    require("scales", scales, np.float64, (min(len(scales), rows),))
    divisors = np.concatenate([np.ones(rows - len(scales)), scales])
    if weight.ndim > 1:
        divisors = divisors[:, None]
    return _in_blocks(weight, dtype, divisors, np.divide, out)


def smooth_gain(
    weight: Array, dtype: str, scales: NDArray[np.float64] | None, exact: bool, out: Array
) -> int:
    """Write to `out` the stored weight w of a norm with gain 1 + w, its gain over `scales`.

    All are [channels].  `exact` keeps the gain in float32; without it the gain is rounded to
    `dtype` before and after the division, as llm-compressor does, which alters w even where
    `scales` is None.
    Returns and raises as `multiply_columns`.
    """
    form = float_format(dtype)
    require("weight", weight, form.storage, weight.shape)
    require("out", out, form.storage, weight.shape)
    bad = first_non_finite(weight, form)
    if bad < 0 and exact and scales is None:
        out[...] = weight
    elif bad < 0:
        kept = "F32" if exact else dtype
        gain = _rounded(widen(weight, dtype) + np.float32(1), kept)
        if scales is not None:
            require("scales", scales, np.float64, weight.shape)
            with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
                gain = _rounded((gain / scales).astype(np.float32), kept)
        out[...] = narrow(gain - np.float32(1), dtype)
    return bad


def _in_blocks(
    weight: Array, dtype: str, scales: NDArray[np.float64], operation: np.ufunc, out: Array
) -> int:
    form = float_format(dtype)
    require("weight", weight, form.storage, weight.shape)
    require("out", out, form.storage, weight.shape)
    bad = first_non_finite(weight, form)
    if bad >= 0:
        return bad
    wide_scales = np.broadcast_to(scales, weight.shape)
    step = max(1, _BLOCK // math.prod(weight.shape[1:]))
    for start in range(0, len(weight), step):
        rows = slice(start, start + step)
        with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
            result = operation(widen(weight[rows], dtype), wide_scales[rows], dtype=np.float64)
            out[rows] = narrow(result.astype(np.float32), dtype)
    return bad


def _rounded(values: NDArray[np.float32], dtype: str) -> NDArray[np.float32]:
    return widen(narrow(values, dtype), dtype)
