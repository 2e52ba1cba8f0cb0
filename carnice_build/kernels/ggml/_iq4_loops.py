"""IQ4_NL and IQ4_XS: 4-bit codes of 16 levels that lie closer near zero.

The scale of a block of 32 values is searched among 16: the one that makes the value of largest
magnitude the highest level, and fifteen that make it about the lowest. From the first to the last
of those fifteen a value grows by 134 / 120, while the bounds between levels are at least 1.23 times
apart: it comes to lie in two levels at most. So both are found before, with all that depends on
them, and each try takes one or the other.

The blocks lie side by side as in ``_search_loops``, whose scratch is the beginning of this one.
"""

from __future__ import annotations

import numpy as np

from .._affine_loops import Floats, _inlined, _kernel
from .._nvfp4_loops import Bytes
from ._k_loops import _store_f16
from ._scale_loops import SMALLEST
from ._search_loops import (
    NO_IMPORTANCE,
    _clamped,
    _columns,
    _find_tops,
    _load,
    _load_weights,
    _squares_of_four,
    _weigh,
    _weigh_by_squares,
    _zeros,
)

LEVELS = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32
)
"""What the codes stand for."""

BOUNDS = (LEVELS[:-1] + LEVELS[1:]) / np.float32(2)
"""From where on the upper one of two neighbours is taken; exact."""

N = 32
"""Values of a block that has a scale."""

LANES = 32
"""Blocks side by side: the scratch then fits the first-level cache."""

VALUES = N * LANES
LIMIT, WEIGHT, TOP = VALUES, 2 * VALUES, 3 * VALUES
"""The bound between both levels of a value, its weight, and a lane's value of largest magnitude."""

SCALE, BEST, FIRST, LEAST, MOST = (TOP + k * LANES for k in range(1, 6))
"""Of a lane the best scale and how good it is, and the inverses of the first scale, and of the
least and the largest of the others in magnitude."""

SUM_X, SUM_Q = TOP + 6 * LANES, TOP + 7 * LANES
LOW_X, HIGH_X, LOW_Q, HIGH_Q = (TOP + 8 * LANES + k * VALUES for k in range(4))
"""Of both levels of a value weight * level * value and weight * level ** 2; sums of the first."""

SIZE = TOP + 8 * LANES + 4 * VALUES

TRIES = 7
"""Tries on both sides of the one that makes the value of largest magnitude the lowest level."""

BLOCKS = LANES // 8
"""Blocks of IQ4_XS side by side."""

SCALE_BOUND = 32


@_inlined
def _level(value: np.float32) -> np.float32:
    """The nearest level of a number, the upper one of two."""
    level = LEVELS[0]
    for k in range(15):
        level = LEVELS[k + 1] if value >= BOUNDS[k] else level
    return np.float32(level)


@_inlined
def _code(value: np.float32) -> np.uint8:
    """The code of the nearest level, the upper one of two, and that of the highest for NaN."""
    code = np.int32(0)
    for k in range(15):
        code = code if value < BOUNDS[k] else np.int32(k + 1)
    return np.uint8(code)


@_inlined
def _prepare(s: Floats) -> None:
    """The sums of the first scale, and both levels of each value for the others."""
    for k in range(LANES):
        top = s[TOP + k]
        s[FIRST + k] = np.float32(1) / (-top / LEVELS[0])
        s[LEAST + k] = (LEVELS[0] + np.float32(TRIES)) / top
        s[MOST + k] = (LEVELS[0] - np.float32(TRIES)) / top
        s[SUM_X + k] = np.float32(0)
        s[SUM_Q + k] = np.float32(0)
    for i in range(N):
        for k in range(LANES):
            value = s[i * LANES + k]
            weight = s[WEIGHT + i * LANES + k]
            level = _level(s[FIRST + k] * value)
            s[SUM_X + k] += weight * level * value
            s[SUM_Q + k] += weight * level * level
            least = _level(s[LEAST + k] * value)
            most = _level(s[MOST + k] * value)
            low = least if least < most else most
            high = least + most - low
            s[LIMIT + i * LANES + k] = (low + high) / np.float32(2)
            s[LOW_X + i * LANES + k] = weight * low * value
            s[LOW_Q + i * LANES + k] = weight * low * low
            s[HIGH_X + i * LANES + k] = weight * high * value
            s[HIGH_Q + i * LANES + k] = weight * high * high
    for k in range(LANES):
        products = s[SUM_X + k]
        squares = s[SUM_Q + k]
        scale = products / squares if squares > np.float32(0) else np.float32(0)
        s[SCALE + k] = scale
        s[BEST + k] = scale * products


@_inlined
def _try(levels: np.float32, s: Floats) -> None:
    """Keep the scale that makes the value of largest magnitude that level, where it is better."""
    for k in range(LANES):
        inverse = levels / s[TOP + k]
        products = np.float32(0)
        squares = np.float32(0)
        for i in range(16):
            at = i * LANES + k
            low_x, high_x, low_q, high_q = (
                s[LOW_X + at],
                s[HIGH_X + at],
                s[LOW_Q + at],
                s[HIGH_Q + at],
            )
            above = inverse * s[at] >= s[LIMIT + at]
            products += high_x if above else low_x
            squares += high_q if above else low_q
        for i in range(16, 32):
            at = i * LANES + k
            low_x, high_x, low_q, high_q = (
                s[LOW_X + at],
                s[HIGH_X + at],
                s[LOW_Q + at],
                s[HIGH_Q + at],
            )
            above = inverse * s[at] >= s[LIMIT + at]
            products += high_x if above else low_x
            squares += high_q if above else low_q
        best = s[BEST + k]
        best_scale = s[SCALE + k]
        better = (squares > np.float32(0)) & (products * products > best * squares)
        scale = products / squares
        s[SCALE + k] = scale if better else best_scale
        s[BEST + k] = scale * products if better else best


@_inlined
def _search(s: Floats) -> None:
    """The best scale of each lane; 0 for a lane of zeros."""
    _find_tops(N, LANES, s)
    _prepare(s)
    for step in range(-TRIES, TRIES + 1):
        _try(LEVELS[0] + np.float32(step), s)
    for k in range(LANES):
        scale = s[SCALE + k]
        s[SCALE + k] = np.float32(0) if abs(s[TOP + k]) < SMALLEST else scale


@_inlined
def _pack(codes: Bytes, out: Bytes, at: int) -> None:
    """32 codes to 16 bytes, the first half of them low."""
    for k in range(16):
        out[at + k] = np.uint8(codes[k] | codes[k + 16] << 4)


@_inlined
def _find_spreads(s: Floats) -> None:
    """Twice the mean of squares of each lane, to ``SUM_X``."""
    for k in range(LANES):
        s[SUM_X + k] = np.float32(0)
    for i in range(N):
        for k in range(LANES):
            s[SUM_X + k] += s[i * LANES + k] * s[i * LANES + k]
    for k in range(LANES):
        s[SUM_X + k] *= np.float32(2 / N)


@_inlined
def _find_super_spreads(blocks: Floats, s: Floats) -> None:
    """As ``_find_spreads``, with the mean of the whole block of 256."""
    sums = _squares_of_four(blocks, 0)
    for b in range(BLOCKS):
        for k in range(8 * b, 8 * b + 8):
            s[SUM_X + k] = sums[b] * np.float32(2 / 256)


@_kernel
def weighted_nl(rows: Floats, importance: Floats, out: Bytes) -> None:
    """Finite rows [rows, cols] to [rows, cols / 32 * 18], with the importance of each column, or
    with none where that is empty."""
    blocks = rows.reshape(-1, N)
    columns = _columns(importance, N)
    packed = out.reshape(-1, 18)
    s = _zeros(SIZE)
    codes = np.empty(N, np.uint8)
    for first in range(0, blocks.shape[0], LANES):
        count = min(LANES, blocks.shape[0] - first)
        _load(blocks[first : first + count], N, LANES, s)
        if columns.size:
            _load_weights(columns, first, N, LANES, WEIGHT, s)
            _find_spreads(s)
            _weigh(N, LANES, WEIGHT, SUM_X, s)
        else:
            _weigh_by_squares(N, LANES, s)
        _search(s)
        for b in range(count):
            block = blocks[first + b]
            made = packed[first + b]
            scale = s[SCALE + b]
            inverse = np.float32(1) / scale if scale != np.float32(0) else np.float32(0)
            for k in range(block.size):
                codes[k] = _code(inverse * block[k])
            _store_f16(scale, made)
            _pack(codes, made, 2)


@_inlined
def _finish_super_block(
    block: Floats, scales: Floats, wide: Floats, codes: Bytes, out: Bytes
) -> None:
    """F16 scale, 6-bit scales of the blocks (the high 2 of all first), and codes."""
    size = np.float32(0)
    top = np.float32(0)
    for j in range(8):
        larger = abs(scales[j]) > size
        size = abs(scales[j]) if larger else size
        top = scales[j] if larger else top
    step = -top / np.float32(SCALE_BOUND)
    inverse = np.float32(1) / step if step != np.float32(0) else np.float32(0)
    high = np.uint32(0)
    out[4:8] = 0
    for j in range(8):
        level = _clamped(inverse * scales[j], -SCALE_BOUND, SCALE_BOUND - 1)
        scale = step * np.float32(level)
        for k in range(N * j, N * j + N):
            wide[k] = np.float32(1) / scale if scale != np.float32(0) else np.float32(0)
        code = np.uint32(level + np.int32(SCALE_BOUND))
        high |= (code >> np.uint32(4)) << np.uint32(2 * j)
        out[4 + j // 2] |= np.uint8((code & np.uint32(15)) << np.uint32(4 * (j % 2)))
    _store_f16(step, out)
    out[2] = np.uint8(high & np.uint32(0xFF))
    out[3] = np.uint8(high >> np.uint32(8))
    for k in range(256):
        codes[k] = _code(wide[k] * block[k])
    for j in range(8):
        _pack(codes[N * j : N * j + N], out, 8 + 16 * j)


@_kernel
def weighted_xs(rows: Floats, importance: Floats, out: Bytes) -> None:
    """As ``weighted_nl``, to [rows, cols / 256 * 136]."""
    blocks = rows.reshape(-1, 256)
    parts = rows.reshape(-1, N)
    columns = _columns(importance, N)
    packed = out.reshape(-1, 136)
    s = _zeros(SIZE)
    wide = np.empty(256, np.float32)
    codes = np.empty(256, np.uint8)
    for first in range(0, blocks.shape[0], BLOCKS):
        count = min(BLOCKS, blocks.shape[0] - first)
        _load(parts[8 * first : 8 * (first + count)], N, LANES, s)
        if columns.size:
            _load_weights(columns, 8 * first, N, LANES, WEIGHT, s)
            _find_super_spreads(blocks[first : first + count], s)
            _weigh(N, LANES, WEIGHT, SUM_X, s)
        else:
            _weigh_by_squares(N, LANES, s)
        _search(s)
        for b in range(count):
            scales = s[SCALE + 8 * b : SCALE + 8 * b + 8]
            _finish_super_block(blocks[first + b], scales, wide, codes, packed[first + b])


def plain_nl(rows: Floats, out: Bytes) -> None:
    """Finite rows [rows, cols] to [rows, cols / 32 * 18]."""
    weighted_nl(rows, NO_IMPORTANCE, out)


def plain_xs(rows: Floats, out: Bytes) -> None:
    """Finite rows [rows, cols] to [rows, cols / 256 * 136]."""
    weighted_xs(rows, NO_IMPORTANCE, out)
