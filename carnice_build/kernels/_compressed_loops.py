"""The compiled loops of ``compressed``: numba, one thread, no GIL, cached on disk.

torch computes in the weight's dtype, one operation at a time: each takes float32 values and its
result is rounded to that dtype. So does ``_round_to`` here, after every single operation.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ._affine_loops import (
    BF16,
    CHUNK_CODES,
    F16,
    F32,
    TWO_TO_23,
    Patterns,
    _any_non_finite,
    _bits,
    _extremes,
    _from_key,
    _inlined,
    _kernel,
    _key_16,
    _key_32,
    _narrow,
    _squeeze,
    _widen,
)

Packed = NDArray[np.int32]
ZeroPoints = NDArray[np.int8]

LOWEST = np.float32(-8)
HIGHEST = np.float32(7)

EPS_BF16, EPS_F16, EPS_F32 = np.float32(2.0**-7), np.float32(2.0**-10), np.float32(2.0**-23)
"""The distance from 1 to the next value, which torch puts in place of a scale of 0."""

F16_OVERFLOW = np.float32(65520)
"""From here on, values round to Inf in F16."""


@_inlined
def _round_to(value: np.float32, kind: int) -> np.float32:
    """The nearest value of the format. ``_widen`` has no Inf and no NaN of F16, so what rounds
    to Inf, or is NaN, does not go through it."""
    if kind == F32:
        return value
    rounded = _widen(_narrow(value, kind), kind)
    if kind == F16:
        return rounded if abs(value) < F16_OVERFLOW else value * np.float32(np.inf)
    return rounded


@_inlined
def _clip(code: np.float32) -> np.float32:
    code = code if code > LOWEST else LOWEST
    return code if code < HIGHEST else HIGHEST


@_inlined
def _scale(low: np.float32, high: np.float32, kind: int) -> np.float32:
    """The length of 15 steps from the low end to the high one; 0 is always between them."""
    low = low if low < np.float32(0) else np.float32(0)
    high = high if high > np.float32(0) else np.float32(0)
    return _round_to(_round_to(high - low, kind) / np.float32(15), kind)


@_inlined
def _zero_point(low: np.float32, scale: np.float32, kind: int) -> np.float32:
    """The code of 0, from the scale before an eps took the place of 0: a group of zeros, whose
    0 / 0 is NaN, gets code 0."""
    low = low if low < np.float32(0) else np.float32(0)
    code = _round_to(LOWEST - _round_to(low / scale, kind), kind)
    return np.float32(0) if code != code else np.rint(_clip(code))


@_inlined
def _eps(kind: int) -> np.float32:
    if kind == BF16:
        return EPS_BF16
    return EPS_F16 if kind == F16 else EPS_F32


@_inlined
def _qparams(low: np.float32, high: np.float32, kind: int) -> tuple[np.float32, np.float32]:
    """Scale and zero point of a range."""
    scale = _scale(low, high, kind)
    zero = _zero_point(low, scale, kind)
    return (scale if scale != np.float32(0) else _eps(kind)), zero


@_inlined
def _code(value: np.float32, scale: np.float32, zero: np.float32, kind: int) -> np.float32:
    """The position of a value among the codes, clipped to -8..7; not rounded."""
    return _clip(_round_to(_round_to(value / scale, kind) + zero, kind))


@_inlined
def _quantize(
    groups: Patterns,
    scales: Patterns,
    zero_points: ZeroPoints,
    kind: int,
    infinity: int,
    packed: Packed,
) -> int:
    group_size = groups.shape[1]
    room = CHUNK_CODES // group_size
    words = group_size // 8
    codes = np.empty((room, group_size), np.uint8)
    eights = codes.reshape(-1).view(np.uint64)
    for first in range(0, groups.shape[0], room):
        count = min(room, groups.shape[0] - first)
        finite: np.bool_ = np.bool_(True)
        for g in range(count):
            group = groups[first + g]
            row = codes[g]
            scale = _widen(scales[first + g], kind)
            zero = np.float32(zero_points[first + g])
            for k in range(group_size):
                finite &= (np.int32(group[k]) & infinity) != infinity
                code = _code(_widen(group[k], kind), scale, zero, kind)
                # As in `affine`; 8 more keeps the parity and makes the code positive.
                row[k] = np.uint8(_bits(code + (TWO_TO_23 + np.float32(8))))
        if not finite:
            return first
        for i in range(count * words):
            packed[first * words + i] = np.int32(_squeeze(eights[i], 4))
    return -1


@_kernel
def quantize_bf16(
    groups: Patterns, scales: Patterns, zero_points: ZeroPoints, packed: Packed
) -> int:
    """Quantize groups [n, group_size] into a flat output; -1, or the first group of the chunk
    that holds a NaN or an Inf."""
    return _quantize(groups, scales, zero_points, BF16, 0x7F80, packed)


@_kernel
def quantize_f16(
    groups: Patterns, scales: Patterns, zero_points: ZeroPoints, packed: Packed
) -> int:
    """As ``quantize_bf16``, for F16."""
    return _quantize(groups, scales, zero_points, F16, 0x7C00, packed)


@_kernel
def quantize_f32(
    groups: Patterns, scales: Patterns, zero_points: ZeroPoints, packed: Packed
) -> int:
    """As ``quantize_bf16``, for F32."""
    return _quantize(groups, scales, zero_points, F32, 0x7F800000, packed)


@_inlined
def _minmax(
    groups: Patterns, kind: int, infinity: int, scales: Patterns, zero_points: ZeroPoints
) -> int:
    room = CHUNK_CODES // groups.shape[1]
    lows = np.empty(room, np.int32)
    highs = np.empty(room, np.int32)
    for first in range(0, groups.shape[0], room):
        chunk = groups[first : first + room]
        if kind == F32:
            _extremes(chunk, _key_32, lows, highs)
        else:
            _extremes(chunk, _key_16, lows, highs)
        if _any_non_finite(chunk.shape[0], infinity, lows, highs):
            return first
        for g in range(chunk.shape[0]):
            scale, zero = _qparams(_from_key(lows[g], kind), _from_key(highs[g], kind), kind)
            scales[first + g] = _narrow(scale, kind)
            zero_points[first + g] = np.int8(zero)
    return -1


@_kernel
def minmax_bf16(groups: Patterns, scales: Patterns, zero_points: ZeroPoints) -> int:
    """Scale and zero point of groups [n, group_size] from their extremes; -1, or the first
    group of the chunk that holds a NaN or an Inf."""
    return _minmax(groups, BF16, 0x7F80, scales, zero_points)


@_kernel
def minmax_f16(groups: Patterns, scales: Patterns, zero_points: ZeroPoints) -> int:
    """As ``minmax_bf16``, for F16."""
    return _minmax(groups, F16, 0x7C00, scales, zero_points)


@_kernel
def minmax_f32(groups: Patterns, scales: Patterns, zero_points: ZeroPoints) -> int:
    """As ``minmax_bf16``, for F32."""
    return _minmax(groups, F32, 0x7F800000, scales, zero_points)
