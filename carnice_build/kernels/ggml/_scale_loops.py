"""The scales and minima of K-quants' sub-blocks, as small integers times one F16 of the block.

Without importance the largest becomes the largest integer. With it ggml searches
(``make_qp_quants``): 8 grids beside that one, then up to 5 rounds in which each integer is moved
where that lowers the error. The scales and the minima of 8 blocks are 16 lanes here, in the shape
that ``_fit_loops`` tells of. All arithmetic is that of ggml for whatever floats come.
"""

from __future__ import annotations

import numpy as np

from .._affine_loops import F16, Floats, _bits, _f16_bits, _float, _inlined, _widen
from ._fit_loops import GROUP, MINIMUM, ONE, SCALE, WEIGHT, ZERO, choose, nearest_bits

LANES = 2 * GROUP

SMALLEST = np.float32(1e-15)
"""Where no scale reaches it, all are zeros (GROUP_MAX_EPS)."""

_STEP = 4
_PARTS = 16 * LANES

SCALES, WEIGHTS, CODES = (i * _PARTS for i in range(3))
"""Where the scales [n, 16] stand (first those of 8 blocks, then their minima), what an error of
each counts, and the integers, as floats: those of a byte, as ggml keeps them."""

PEAK, GRID, BEST_GRID, ERROR, NEW_ERROR, SUM_XL, SUM_LL, WHOLE = (
    3 * _PARTS + i * LANES for i in range(8)
)
"""Where what there is one of for each lane stands; ``WHOLE`` is what the integers are times."""

SCRATCH = 3 * _PARTS + 8 * LANES

FACTORS = np.float32(0.1) * np.array([-4, -3, -2, -1, 1, 2, 3, 4], np.float32)


@_inlined
def nearest_int(value: np.float32) -> np.int32:
    """ggml's, of any float."""
    return np.int32(nearest_bits(value)) - np.int32(0x400000)


@_inlined
def _nearest_below(value: np.float32, top: int) -> np.int32:
    """``nearest_int``, but at most ``top``."""
    found = nearest_int(value)
    highest = np.int32(top)
    return np.int32(found if found < highest else highest)


@_inlined
def _byte(number: np.int32) -> np.float32:
    """The lowest 8 bits, as a float."""
    return np.float32(np.int32(number & np.int32(0xFF)))


@_inlined
def f16_bits(value: np.float32) -> np.uint16:
    """F16 nearest to a float; a NaN, which x86 makes negative, as ggml stores it."""
    return np.uint16(_f16_bits(_bits(value)) if value == value else np.uint32(0xFE00))


@_inlined
def from_f16(bits: np.uint16) -> np.float32:
    """The float32 of the same value, Inf and NaN among them."""
    wide = np.uint32(bits)
    special = ((wide & np.uint32(0x8000)) << np.uint32(16)) | (
        np.uint32(0x7F800000) | ((wide & np.uint32(0x3FF)) << np.uint32(13))
    )
    finite = _widen(wide, F16)
    return np.float32(finite if wide & np.uint32(0x7C00) != np.uint32(0x7C00) else _float(special))


@_inlined
def gather(s: Floats, q: Floats, count: int) -> None:
    """Take the ``count`` scales and minima of each block, and their weights, from lanes."""
    for j in range(count):
        for b in range(GROUP):
            at = j * LANES + b
            k = j * GROUP + b
            q[SCALES + at] = s[SCALE + k]
            q[SCALES + at + GROUP] = -s[MINIMUM + k]
            q[WEIGHTS + at] = s[WEIGHT + k]
            q[WEIGHTS + at + GROUP] = s[WEIGHT + k]


@_inlined
def _peaks(q: Floats, count: int) -> None:
    for k in range(LANES):
        q[PEAK + k] = ZERO
    for start in range(0, count, _STEP):
        for k in range(LANES):
            peak = q[PEAK + k]
            for i in range(_STEP):
                x = q[SCALES + (start + i) * LANES + k]
                peak = peak if peak > x else x
            q[PEAK + k] = peak


@_inlined
def fit_plain(q: Floats, count: int, top: int, limit: int) -> None:
    """``CODES`` (a byte, but at most ``limit``) and ``WHOLE`` without importance."""
    most = np.float32(top)
    for k in range(LANES):
        q[PEAK + k] = ZERO
    for j in range(count):
        for k in range(LANES):
            x = q[SCALES + j * LANES + k]
            peak = q[PEAK + k]
            q[PEAK + k] = x if x > peak else peak
    for k in range(LANES):
        peak = q[PEAK + k]
        q[GRID + k] = choose(peak > ZERO, most / peak, ZERO)
        q[WHOLE + k] = peak / most
    largest = np.float32(limit)
    for j in range(count):
        for k in range(LANES):
            code = _byte(nearest_int(q[GRID + k] * q[SCALES + j * LANES + k]))
            q[CODES + j * LANES + k] = code if code < largest else largest


@_inlined
def _first_grid(q: Floats, count: int, top: int) -> None:
    """The grid on which the largest scale is ``top``, its codes and its error."""
    for k in range(LANES):
        grid = np.float32(top) / q[PEAK + k]
        q[GRID + k] = grid
        q[BEST_GRID + k] = grid
        q[ERROR + k] = ZERO
    for start in range(0, count, _STEP):
        for k in range(LANES):
            grid = q[GRID + k]
            scale = ONE / grid
            error = q[ERROR + k]
            for i in range(_STEP):
                at = (start + i) * LANES + k
                x = q[SCALES + at]
                gap = x - scale * _byte(nearest_int(grid * x))
                error += q[WEIGHTS + at] * gap * gap
            q[ERROR + k] = error


@_inlined
def _try_grid(q: Floats, count: int, top: int, factor: np.float32) -> None:
    """Keep a grid of other steps where its error is less."""
    for k in range(LANES):
        q[GRID + k] = (factor + np.float32(top)) / q[PEAK + k]
        q[NEW_ERROR + k] = ZERO
    for start in range(0, count, _STEP):
        for k in range(LANES):
            grid = q[GRID + k]
            scale = ONE / grid
            error = q[NEW_ERROR + k]
            for i in range(_STEP):
                at = (start + i) * LANES + k
                x = q[SCALES + at]
                gap = x - scale * np.float32(_nearest_below(grid * x, top))
                error += q[WEIGHTS + at] * gap * gap
            q[NEW_ERROR + k] = error
    for k in range(LANES):
        error = q[ERROR + k]
        new_error = q[NEW_ERROR + k]
        grid = q[GRID + k]
        best_grid = q[BEST_GRID + k]
        better = new_error < error
        q[ERROR + k] = choose(better, new_error, error)
        q[BEST_GRID + k] = choose(better, grid, best_grid)


@_inlined
def _codes(q: Floats, count: int, top: int) -> None:
    """The codes on the best grid, and the sums of w * x * l and w * l * l."""
    for k in range(LANES):
        q[SUM_XL + k] = ZERO
        q[SUM_LL + k] = ZERO
    for start in range(0, count, _STEP):
        for k in range(LANES):
            grid = q[BEST_GRID + k]
            sum_xl = q[SUM_XL + k]
            sum_ll = q[SUM_LL + k]
            for i in range(_STEP):
                at = (start + i) * LANES + k
                x = q[SCALES + at]
                w = q[WEIGHTS + at]
                found = _nearest_below(grid * x, top)
                code = np.float32(found)
                q[CODES + at] = _byte(found)
                sum_xl += w * x * code
                sum_ll += w * code * code
            q[SUM_XL + k] = sum_xl
            q[SUM_LL + k] = sum_ll


@_inlined
def _move(q: Floats, count: int, top: int) -> bool:
    """Move each code in turn to where it fits the others best, if that lowers the error.

    Returns whether any was moved.
    """
    for k in range(LANES):
        q[NEW_ERROR + k] = ZERO
    for start in range(0, count, _STEP):
        for k in range(LANES):
            sum_xl = q[SUM_XL + k]
            sum_ll = q[SUM_LL + k]
            moved = q[NEW_ERROR + k]
            for i in range(_STEP):
                at = (start + i) * LANES + k
                x = q[SCALES + at]
                w = q[WEIGHTS + at]
                code = q[CODES + at]
                xl = sum_xl - w * x * code
                ll = sum_ll - w * code * code
                found = _nearest_below(x * ll / xl, top)
                new = np.float32(found)
                new_xl = xl + w * x * new
                new_ll = ll + w * new * new
                less = new_xl * new_xl * sum_ll > sum_xl * sum_xl * new_ll
                moves = (xl > ZERO) & (ll > ZERO) & (new != code) & less
                sum_xl = choose(moves, new_xl, sum_xl)
                sum_ll = choose(moves, new_ll, sum_ll)
                q[CODES + at] = choose(moves, _byte(found), code)
                moved = choose(moves, ONE, moved)
            q[SUM_XL + k] = sum_xl
            q[SUM_LL + k] = sum_ll
            q[NEW_ERROR + k] = moved
    any_moved = False
    for k in range(LANES):
        any_moved |= q[NEW_ERROR + k] > ZERO
    return any_moved


@_inlined
def fit_weighted(q: Floats, count: int, top: int, limit: int) -> None:
    """``CODES`` (a byte, but at most ``limit``) and ``WHOLE`` with importance.

    A round of ggml that moves nothing is the last one; here the other lanes may go on, and what
    has come to rest stays where it is.
    """
    _peaks(q, count)
    _first_grid(q, count, top)
    for n in range(FACTORS.size):
        _try_grid(q, count, top, FACTORS[n])
    _codes(q, count, top)
    for _ in range(5):
        if not _move(q, count, top):
            break
    for k in range(LANES):
        sum_xl = q[SUM_XL + k]
        sum_ll = q[SUM_LL + k]
        whole = choose(sum_ll > ZERO, sum_xl / sum_ll, ZERO)
        q[WHOLE + k] = choose(q[PEAK + k] < SMALLEST, ZERO, whole)
    largest = np.float32(limit)
    for j in range(count):
        for k in range(LANES):
            code = q[CODES + j * LANES + k]
            code = code if code < largest else largest
            q[CODES + j * LANES + k] = choose(q[PEAK + k] < SMALLEST, ZERO, code)
