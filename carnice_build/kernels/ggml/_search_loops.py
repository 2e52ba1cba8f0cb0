"""The search for the scale of a small block, ``make_qx_quants`` of ggml-quants.c, on many at once.

``lanes`` blocks of ``n`` values (16 or 32) lie side by side in one flat scratch: value i of lane k
at ``i * lanes + k``, so that a vector register holds one value of many blocks and every sum keeps
the order it has in ggml. Loops over the values of a lane have constant lengths of 16, which LLVM
unrolls, and all offsets are constants, by which it knows that nothing overlaps.

A scratch holds, of ``n * lanes`` floats each, the values, their weights times them, and the
weights; then, a float for each lane, the value of largest magnitude, and the best of the inverses
that were tried, its scale, and how good that is.
"""

from __future__ import annotations

import numpy as np

from .._affine_loops import Floats, _float, _inlined
from ._fit_loops import ROUND, nearest_bits
from ._scale_loops import SMALLEST, nearest_int

NO_IMPORTANCE = np.empty(0, np.float32)
"""What kernels take where there is none: as an importance, float32 and never writable."""
NO_IMPORTANCE.flags.writeable = False

TRIES = 9
"""Steps of 0.1 that are tried on both sides of the first scale."""


@_inlined
def _clamped(value: np.float32, low: int, high: int) -> np.int32:
    """``nearest_int`` between two bounds."""
    level = nearest_int(value)
    level = np.int32(max(level, np.int32(low)))
    return np.int32(min(level, np.int32(high)))


@_inlined
def _clamped_float(value: np.float32, low: int, high: int) -> np.float32:
    """As ``_clamped``, as a float: the bits of ``ROUND`` are 0x4B400000, those of ``ROUND`` + n, as
    an integer, n more."""
    bits = np.int32(nearest_bits(value) | np.uint32(0x4B000000))
    lowest = np.int32(0x4B400000 + low)
    highest = np.int32(0x4B400000 + high)
    bits = bits if bits > lowest else lowest
    bits = bits if bits < highest else highest
    return np.float32(_float(np.uint32(bits)) - ROUND)


@_inlined
def _zeros(count: int) -> Floats:
    """Floats from the beginning of a cache line on: a vector register of 64 bytes is then loaded
    from one line and not from two, which takes twice as long."""
    spare = np.zeros(count + 16, np.float32)
    first = (-spare.ctypes.data % 64) // 4
    return spare[first : first + count]


@_inlined
def _scratch(n: int, lanes: int) -> Floats:
    return _zeros((3 * n + 4) * lanes)


@_inlined
def _weights(n: int, lanes: int) -> int:
    return 2 * n * lanes


@_inlined
def _tops(n: int, lanes: int) -> int:
    return 3 * n * lanes


@_inlined
def _inverses(n: int, lanes: int) -> int:
    return (3 * n + 1) * lanes


@_inlined
def _scales(n: int, lanes: int) -> int:
    return (3 * n + 2) * lanes


@_inlined
def _load(blocks: Floats, n: int, lanes: int, s: Floats) -> None:
    """Blocks [up to lanes, n] to the scratch; zeros to lanes that are left."""
    count = blocks.shape[0]
    if count < lanes:
        s[: n * lanes] = np.float32(0)
    whole = count - count % 4
    for k in range(0, whole, 4):
        for i in range(n):
            for lane in range(k, k + 4):
                s[i * lanes + lane] = blocks[lane, i]
    for k in range(whole, count):
        for i in range(n):
            s[i * lanes + k] = blocks[k, i]


@_inlined
def _columns(importance: Floats, n: int) -> Floats:
    """The importance of columns as ``_load_weights`` takes it."""
    return importance.reshape(-1, n).T.copy()


@_inlined
def _load_weights(columns: Floats, first: int, n: int, lanes: int, at: int, s: Floats) -> None:
    """The importance of columns [n, blocks of a row] to the scratch, from ``at`` on; lane 0 has
    that of block ``first`` of all rows."""
    blocks = columns.shape[1]
    column = first % blocks
    lane = 0
    while lane < lanes:
        count = min(lanes - lane, blocks - column)
        for i in range(n):
            begin = at + i * lanes + lane
            part = s[begin : begin + count]
            source = columns[i, column : column + count]
            for k in range(count):
                part[k] = source[k]
        lane += count
        column = 0


@_inlined
def _squares_of_four(
    rows: Floats, first: int
) -> tuple[np.float32, np.float32, np.float32, np.float32]:
    """The sums of squares of four rows from one on, side by side; of the last one for those that
    are not there."""
    last = rows.shape[0] - 1
    a = rows[min(first, last)]
    b = rows[min(first + 1, last)]
    c = rows[min(first + 2, last)]
    d = rows[min(first + 3, last)]
    sums = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
    for k in range(rows.shape[1]):
        sums = (
            sums[0] + a[k] * a[k],
            sums[1] + b[k] * b[k],
            sums[2] + c[k] * c[k],
            sums[3] + d[k] * d[k],
        )
    return sums


@_inlined
def _weigh(n: int, lanes: int, weights: int, spreads: int, s: Floats) -> None:
    """The importance that the scratch has as weights, times root(spread of the lane + square)."""
    for i in range(n):
        for k in range(lanes):
            at = i * lanes + k
            s[weights + at] = s[weights + at] * np.sqrt(s[spreads + k] + s[at] * s[at])


@_inlined
def _weigh_by_squares(n: int, lanes: int, s: Floats) -> None:
    for k in range(n * lanes):
        s[2 * n * lanes + k] = s[k] * s[k]


@_inlined
def _multiply(n: int, lanes: int, s: Floats) -> None:
    """The weights times the values."""
    for k in range(n * lanes):
        s[n * lanes + k] = s[2 * n * lanes + k] * s[k]


@_inlined
def _find_tops(n: int, lanes: int, s: Floats) -> None:
    """The first of the values of largest magnitude."""
    for k in range(lanes):
        size = np.float32(0)
        top = np.float32(0)
        for i in range(n):
            value = s[i * lanes + k]
            larger = abs(value) > size
            size = abs(value) if larger else size
            top = value if larger else top
        s[3 * n * lanes + k] = top


@_inlined
def _level(value: np.float32, bound: int, sound: bool) -> np.float32:
    """The nearest integer from -bound to bound - 1. A ``sound`` value is a number and well below
    2**22; clamping it before it is rounded is then the same."""
    if not sound:
        return _clamped_float(value, -bound, bound - 1)
    low = np.float32(-bound)
    high = np.float32(bound - 1)
    value = value if value > low else low
    value = value if value < high else high
    return np.float32(np.float32(value + ROUND) - ROUND)


@_inlined
def _fit(
    inverse: np.float32, k: int, n: int, lanes: int, bound: int, sound: bool, s: Floats
) -> tuple[np.float32, np.float32]:
    """Sums over a lane of weight * value * level and of weight * level ** 2."""
    products = np.float32(0)
    squares = np.float32(0)
    for i in range(16):
        level = _level(inverse * s[i * lanes + k], bound, sound)
        products += s[(n + i) * lanes + k] * level
        squares += s[(2 * n + i) * lanes + k] * level * level
    if n == 32:
        for i in range(16, 32):
            level = _level(inverse * s[i * lanes + k], bound, sound)
            products += s[(n + i) * lanes + k] * level
            squares += s[(2 * n + i) * lanes + k] * level * level
    return products, squares


@_inlined
def _start(n: int, lanes: int, bound: int, sound: bool, s: Floats) -> None:
    """What the value of largest magnitude makes the lowest level."""
    for k in range(lanes):
        inverse = np.float32(-bound) / s[3 * n * lanes + k]
        products, squares = _fit(inverse, k, n, lanes, bound, sound, s)
        scale = products / squares if squares != np.float32(0) else np.float32(0)
        s[(3 * n + 1) * lanes + k] = inverse
        s[(3 * n + 2) * lanes + k] = scale
        s[(3 * n + 3) * lanes + k] = scale * products


@_inlined
def _try(levels: np.float32, n: int, lanes: int, bound: int, sound: bool, s: Floats) -> None:
    """Keep the scale of that many levels in each lane where it is better than all before."""
    for k in range(lanes):
        inverse = -levels / s[3 * n * lanes + k]
        products, squares = _fit(inverse, k, n, lanes, bound, sound, s)
        best_inverse = s[(3 * n + 1) * lanes + k]
        best_scale = s[(3 * n + 2) * lanes + k]
        best = s[(3 * n + 3) * lanes + k]
        better = (squares > np.float32(0)) & (products * products > best * squares)
        scale = products / squares
        s[(3 * n + 1) * lanes + k] = inverse if better else best_inverse
        s[(3 * n + 2) * lanes + k] = scale if better else best_scale
        s[(3 * n + 3) * lanes + k] = scale * products if better else best


@_inlined
def _search(n: int, lanes: int, bound: int, sound: bool, s: Floats) -> None:
    """The best scale of each lane, and its inverse; 0 and NaN for a lane of zeros.

    ``bound`` levels are below zero, ``bound - 1`` above. ``sound`` if all values are numbers.
    """
    _multiply(n, lanes, s)
    _find_tops(n, lanes, s)
    _start(n, lanes, bound, sound, s)
    for step in range(-TRIES, TRIES + 1):
        if step != 0:
            levels = np.float32(bound) + np.float32(0.1) * np.float32(step)
            _try(levels, n, lanes, bound, sound, s)
    for k in range(lanes):
        zeros = abs(s[3 * n * lanes + k]) < SMALLEST
        inverse = s[(3 * n + 1) * lanes + k]
        scale = s[(3 * n + 2) * lanes + k]
        s[(3 * n + 1) * lanes + k] = np.float32(np.nan) if zeros else inverse
        s[(3 * n + 2) * lanes + k] = np.float32(0) if zeros else scale


@_inlined
def _code(value: np.float32, inverse: np.float32, bound: int) -> np.uint8:
    """The level of a value, from 0 on, by the inverse that ``_search`` found; 0 in a lane of
    zeros."""
    level = _clamped(inverse * value, -bound, bound - 1) + np.int32(bound)
    return np.uint8(level if inverse == inverse else 0)
