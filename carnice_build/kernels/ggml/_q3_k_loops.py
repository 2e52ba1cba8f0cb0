"""Q3_K: blocks of 256 values, a scale of 6 bits for every 16.

ggml has two rules. Without importance, ``make_q3_quants`` starts from the levels of the first scale
and moves one after another to where the error of the sub-block is least, five times over. With it,
the scale of a sub-block is searched as in Q6_K, and so is that of the scales.
"""

from __future__ import annotations

import numpy as np

from .._affine_loops import Floats, _inlined, _kernel
from .._nvfp4_loops import Bytes
from ._k_loops import _store_f16
from ._scale_loops import SMALLEST, nearest_int
from ._search_loops import (
    _clamped,
    _clamped_float,
    _code,
    _columns,
    _find_tops,
    _inverses,
    _level,
    _load,
    _load_weights,
    _scales,
    _scratch,
    _search,
    _squares_of_four,
    _tops,
    _weigh,
    _weights,
)

BLOCKS = 8
"""Blocks side by side."""

SUB = 16
"""Values of a sub-block, and sub-blocks of a block."""

LANES = BLOCKS * SUB

WIDTH = 16
"""Lanes for the scales of blocks: a vector register of them, of which BLOCKS are used."""

VALUES = SUB * LANES
BOUND = 4
SCALE_BOUND = 32
PASSES = 5
NBYTES = 110
SCALES, HALF = 96, 108
"""Where they are in a block, behind the high bits of the codes and their low ones."""

LEVELS, SQUARES, SUM_LX, SUM_L2 = VALUES, 2 * VALUES, 3 * VALUES + LANES, 3 * VALUES + 2 * LANES
"""Where the scratch of the rule without importance has the levels, the squares of the values, and,
behind the values of largest magnitude, two sums."""


@_inlined
def _begin(s: Floats) -> None:
    """The levels of the first scale, and their sums of weight * value * level and of
    weight * level ** 2; the weight is the square of the value."""
    for k in range(VALUES):
        s[SQUARES + k] = s[k] * s[k]
    for k in range(LANES):
        inverse = np.float32(-BOUND) / s[_tops(SUB, LANES) + k]
        products = np.float32(0)
        squares = np.float32(0)
        for i in range(SUB):
            value = s[i * LANES + k]
            weight = s[SQUARES + i * LANES + k]
            level = _level(inverse * value, BOUND, True)
            s[LEVELS + i * LANES + k] = level
            products += weight * value * level
            squares += weight * level * level
        s[SUM_LX + k] = products
        s[SUM_L2 + k] = squares


@_inlined
def _move(s: Floats) -> bool:
    """Move each level once; whether any moved."""
    moved = np.int32(0)
    for i in range(SUB):
        for k in range(LANES):
            value = s[i * LANES + k]
            level = s[LEVELS + i * LANES + k]
            weight = value * value
            products = s[SUM_LX + k]
            squares = s[SUM_L2 + k]
            others_lx = products - weight * value * level
            others_l2 = squares - weight * level * level
            new = _clamped_float(value * others_l2 / others_lx, -BOUND, BOUND - 1)
            new_lx = others_lx + weight * value * new
            new_l2 = others_l2 + weight * new * new
            better = (
                (others_lx > np.float32(0))
                & (new != level)
                & (new_l2 > np.float32(0))
                & (new_lx * new_lx * squares > products * products * new_l2)
            )
            s[LEVELS + i * LANES + k] = new if better else level
            s[SUM_LX + k] = new_lx if better else products
            s[SUM_L2 + k] = new_l2 if better else squares
            moved = np.int32(moved | np.int32(better))
    return bool(moved != np.int32(0))


@_inlined
def _settle(s: Floats) -> None:
    """To the levels, counted from 0, and to the scales, both 0 in a lane of zeros."""
    _find_tops(SUB, LANES, s)
    _begin(s)
    for _ in range(PASSES):
        if not _move(s):
            break
    for k in range(LANES):
        products = s[SUM_LX + k]
        squares = s[SUM_L2 + k]
        scale = products / squares if squares > np.float32(0) else np.float32(0)
        zeros = abs(s[_tops(SUB, LANES) + k]) < SMALLEST
        s[SUM_LX + k] = np.float32(0) if zeros else scale
        for i in range(SUB):
            level = s[LEVELS + i * LANES + k] + np.float32(BOUND)
            s[LEVELS + i * LANES + k] = np.float32(0) if zeros else level


@_inlined
def _block_scales(scales: Floats, levels: Bytes) -> np.float32:
    """The scales of a block as levels of the one of largest magnitude, which becomes -32."""
    size = np.float32(0)
    top = np.float32(0)
    for j in range(SUB):
        larger = abs(scales[j]) > size
        size = abs(scales[j]) if larger else size
        top = scales[j] if larger else top
    if top == np.float32(0):
        levels[:] = 0
        return np.float32(0)
    inverse = np.float32(-SCALE_BOUND) / top
    for j in range(SUB):
        level = np.int32(np.int8(nearest_int(inverse * scales[j])))
        level = min(max(level, np.int32(-SCALE_BOUND)), np.int32(SCALE_BOUND - 1))
        levels[j] = np.uint8(level + np.int32(SCALE_BOUND))
    return np.float32(1) / inverse


@_inlined
def _pack_scales(levels: Bytes, out: Bytes) -> None:
    """Of 6 bits each: 16 times the low 4, then the high 2."""
    for j in range(8):
        out[SCALES + j] = np.uint8((levels[j] & 15) | (levels[j + 8] & 15) << 4)
    for j in range(4):
        high = levels[j] >> 4 | levels[j + 4] >> 4 << 2
        high |= levels[j + 8] >> 4 << 4 | levels[j + 12] >> 4 << 6
        out[SCALES + 8 + j] = np.uint8(high)


@_inlined
def _encode(block: Floats, step: np.float32, levels: Bytes, wide: Floats, codes: Bytes) -> np.int32:
    """Codes by the scales as they were stored. Where such a scale is 0, ggml leaves the codes that
    the search found: to be made after this, in sub-blocks whose bit is set in the result."""
    left = np.int32(0)
    for j in range(SUB):
        scale = step * np.float32(np.int32(levels[j]) - np.int32(SCALE_BOUND))
        left |= np.int32(np.int32(scale == np.float32(0)) << j)
        for i in range(SUB):
            wide[j * SUB + i] = scale
    for k in range(SUB * SUB):
        codes[k] = np.uint8(_clamped(block[k] / wide[k], -BOUND, BOUND - 1) + np.int32(BOUND))
    return left


@_inlined
def _pack(codes: Bytes, out: Bytes) -> None:
    """The high bits of the codes, and then their low 2."""
    for k in range(32):
        high = np.uint8(0)
        for j in range(8):
            high = np.uint8(high | (codes[32 * j + k] >> 2) << j)
        out[k] = high
    for h in range(2):
        for k in range(32):
            a = codes[128 * h + k] & 3
            b = codes[128 * h + k + 32] & 3
            c = codes[128 * h + k + 64] & 3
            d = codes[128 * h + k + 96] & 3
            out[32 + 32 * h + k] = np.uint8(a | b << 2 | c << 4 | d << 6)


@_kernel
def plain(rows: Floats, out: Bytes) -> None:
    """Finite rows [rows, cols] to [rows, cols / 256 * 110]."""
    blocks = rows.reshape(-1, 256)
    subs = rows.reshape(-1, SUB)
    packed = out.reshape(-1, NBYTES)
    s = _scratch(SUB, LANES)
    levels = np.empty(SUB, np.uint8)
    wide = np.empty(256, np.float32)
    codes = np.empty(256, np.uint8)
    for first in range(0, blocks.shape[0], BLOCKS):
        count = min(BLOCKS, blocks.shape[0] - first)
        _load(subs[first * SUB : (first + count) * SUB], SUB, LANES, s)
        _settle(s)
        for b in range(count):
            made = packed[first + b]
            step = _block_scales(s[SUM_LX + b * SUB : SUM_LX + (b + 1) * SUB], levels)
            step = _store_f16(step, made[HALF:])
            _pack_scales(levels, made)
            left = _encode(blocks[first + b], step, levels, wide, codes)
            for j in range(SUB if left else 0):
                if (left >> j) & 1:
                    for i in range(SUB):
                        codes[j * SUB + i] = np.uint8(s[LEVELS + i * LANES + b * SUB + j])
            _pack(codes, made)


@_inlined
def _find_spreads(blocks: Floats, s: Floats) -> None:
    """Twice the mean of squares of a block, to the place that its sub-blocks' scales will have."""
    for first in range(0, BLOCKS, 4):
        sums = _squares_of_four(blocks, first)
        for b in range(4):
            spread = np.float32(2) * sums[b] / np.float32(256)
            for j in range(SUB):
                s[_scales(SUB, LANES) + (first + b) * SUB + j] = spread


@_inlined
def _load_scales(s: Floats, t: Floats) -> None:
    """The scales of sub-blocks as the values of ``t``, the sums of their weights as weights.

    The sums have the place of what makes the lowest level, of which nothing more is wanted.
    """
    sums = _tops(SUB, LANES)
    for k in range(LANES):
        total = np.float32(0)
        for i in range(SUB):
            total += s[_weights(SUB, LANES) + i * LANES + k]
        s[sums + k] = total
    for b in range(BLOCKS):
        for j in range(SUB):
            t[j * WIDTH + b] = s[_scales(SUB, LANES) + b * SUB + j]
            t[_weights(SUB, WIDTH) + j * WIDTH + b] = s[sums + b * SUB + j]


@_kernel
def weighted(rows: Floats, importance: Floats, out: Bytes) -> None:
    """As ``plain``, with the importance of each column."""
    blocks = rows.reshape(-1, 256)
    subs = rows.reshape(-1, SUB)
    columns = _columns(importance, SUB)
    packed = out.reshape(-1, NBYTES)
    s = _scratch(SUB, LANES)
    t = _scratch(SUB, WIDTH)
    levels = np.empty(SUB, np.uint8)
    wide = np.empty(256, np.float32)
    codes = np.empty(256, np.uint8)
    for first in range(0, blocks.shape[0], BLOCKS):
        count = min(BLOCKS, blocks.shape[0] - first)
        _load(subs[first * SUB : (first + count) * SUB], SUB, LANES, s)
        _load_weights(columns, first * SUB, SUB, LANES, _weights(SUB, LANES), s)
        _find_spreads(blocks[first : first + count], s)
        _weigh(SUB, LANES, _weights(SUB, LANES), _scales(SUB, LANES), s)
        _search(SUB, LANES, BOUND, True, s)
        _load_scales(s, t)
        _search(SUB, WIDTH, SCALE_BOUND, False, t)
        for b in range(count):
            block = blocks[first + b]
            made = packed[first + b]
            for j in range(SUB):
                levels[j] = _code(t[j * WIDTH + b], t[_inverses(SUB, WIDTH) + b], SCALE_BOUND)
            step = _store_f16(t[_scales(SUB, WIDTH) + b], made[HALF:])
            _pack_scales(levels, made)
            left = _encode(block, step, levels, wide, codes)
            for j in range(SUB if left else 0):
                if (left >> j) & 1:
                    inverse = s[_inverses(SUB, LANES) + b * SUB + j]
                    for k in range(j * SUB, j * SUB + SUB):
                        codes[k] = _code(block[k], inverse, BOUND)
            _pack(codes, made)
