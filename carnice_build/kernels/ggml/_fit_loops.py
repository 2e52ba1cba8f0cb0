"""The search for the scale and the minimum of a sub-block, nearly all the work of K-quants.

ggml tries for each sub-block, of 16 or 32 values, some tens of grids; with every one it makes the
codes, solves for the scale and the minimum of least weighted error, and keeps them where the error
is less (``make_qkx2_quants`` and ``make_qkx3_quants``, which are one for finite weights).

Here the sub-blocks of 8 blocks are lanes of a vector: value i of lane k stands at
``i * lanes + k``, and a lane does what ggml does, one value after the other, so that its sums keep
their order. What makes it fast:
- all arrays are parts of one flat array at constant offsets, which is how LLVM can tell that they
  do not overlap;
- the inner loop runs over 8 values, which unrolls and leaves the loop over lanes to vectorize
  (over 32 it does not, and is ten times slower);
- what a choice is made of is loaded before it is made, and the choice is no branch;
- of the best grid, what makes its codes is kept, not the codes.
"""

from __future__ import annotations

import numpy as np

from .._affine_loops import Floats, _bits, _float, _inlined

GROUP = 8
"""Blocks that are quantized side by side."""

BLOCK = 256

ROUND = np.float32(12582912)
"""1.5 * 2**23: added to a number of at most 4194303 in magnitude, it rounds to an integer, ties to
even, and leaves it in the lowest 23 bits, in excess of 2**22."""

_VALUES = GROUP * BLOCK
_LANES = 128
_STEP = 8

VALUES, WEIGHTS, CODES = (i * _VALUES for i in range(3))
"""Where the weights [size, lanes], what an error of each counts, and the codes (floats) stand."""

(
    LOW,
    HIGH,
    WEIGHT,
    MOMENT,
    GRID,
    SCALE,
    MINIMUM,
    ERROR,
    BEST_GRID,
    BEST_START,
    SUM_L,
    SUM_LL,
    SUM_XL,
    NEW_SCALE,
    NEW_MINIMUM,
    NEW_ERROR,
) = (3 * _VALUES + i * _LANES for i in range(16))
"""Where what there is one of for each lane stands. The last five are free between searches."""

_SCRATCH = 3 * _VALUES + 16 * _LANES

ZERO = np.float32(0)
ONE = np.float32(1)


@_inlined
def scratch() -> Floats:
    """The flat array, which begins where a line of the cache does: errors take half as long again
    where each vector lies on two lines."""
    line = 16
    room = np.empty(_SCRATCH + line, np.float32)
    skipped = (-room.ctypes.data // room.itemsize) % line
    return room[skipped : skipped + _SCRATCH]


@_inlined
def choose(which: bool, one: np.float32, other: np.float32) -> np.float32:
    """The one or the other of what was loaded, by its bits.

    What Python has for it is a branch, into which LLVM moves the loads; then it loads from the
    address that it chooses, which is a gather where it vectorizes.
    """
    mask = np.uint32(0) - np.uint32(which)
    return _float((_bits(one) & mask) | (_bits(other) & ~mask))


@_inlined
def nearest_bits(value: np.float32) -> np.uint32:
    """ggml's ``nearest_int``, plus 2**22, of any float.

    Beyond 4194303 in magnitude it is not the nearest integer, but one all the same: what is made
    of a NaN by x86, and by ARM, is 0 here, and of an Inf -2**22.
    """
    return np.uint32(_bits(value + ROUND) & np.uint32(0x7FFFFF))


@_inlined
def nearest_code(value: np.float32, top: int) -> np.float32:
    """``nearest_int``, clipped to 0..top as an integer, as a float.

    The bits of ``ROUND`` are 0x4B400000; those of ``ROUND`` + n, as an integer, n more.
    """
    bits = np.int32(nearest_bits(value) | np.uint32(0x4B000000))
    lowest = np.int32(0x4B400000)
    highest = np.int32(0x4B400000 + top)
    bits = bits if bits > lowest else lowest
    bits = bits if bits < highest else highest
    return _float(np.uint32(bits)) - ROUND


@_inlined
def _extremes(s: Floats, size: int, lanes: int) -> None:
    """The lowest value, the highest, and the sums of w and w * x of each lane."""
    for k in range(lanes):
        first = s[VALUES + k]
        s[LOW + k] = first
        s[HIGH + k] = first
        s[WEIGHT + k] = ZERO
        s[MOMENT + k] = ZERO
    for start in range(0, size, _STEP):
        for k in range(lanes):
            low = s[LOW + k]
            high = s[HIGH + k]
            weight = s[WEIGHT + k]
            moment = s[MOMENT + k]
            for i in range(_STEP):
                at = (start + i) * lanes + k
                x = s[VALUES + at]
                w = s[WEIGHTS + at]
                low = x if x < low else low
                high = x if x > high else high
                weight += w
                moment += w * x
            s[LOW + k] = low
            s[HIGH + k] = high
            s[WEIGHT + k] = weight
            s[MOMENT + k] = moment


@_inlined
def _first_grid(s: Floats, lanes: int, top: int) -> None:
    """The grid from the lowest value, or zero where that is lower, to the highest.

    Where these are equal, ggml stops with codes and a scale of zeros. The same comes of going on:
    the grid is infinite, its codes those of NaN, and no other grid has a solution.
    """
    for k in range(lanes):
        low = s[LOW + k]
        low = ZERO if low > ZERO else low
        grid = np.float32(top) / (s[HIGH + k] - low)
        s[GRID + k] = grid
        s[SCALE + k] = ONE / grid
        s[MINIMUM + k] = low
        s[BEST_GRID + k] = grid
        s[BEST_START + k] = low


@_inlined
def _encode(s: Floats, size: int, lanes: int, top: int) -> None:
    """The codes on the current grid, and the sums of w * l, w * l * l and w * l * x."""
    for k in range(lanes):
        s[SUM_L + k] = ZERO
        s[SUM_LL + k] = ZERO
        s[SUM_XL + k] = ZERO
    for start in range(0, size, _STEP):
        for k in range(lanes):
            minimum = s[MINIMUM + k]
            grid = s[GRID + k]
            sum_l = s[SUM_L + k]
            sum_ll = s[SUM_LL + k]
            sum_xl = s[SUM_XL + k]
            for i in range(_STEP):
                at = (start + i) * lanes + k
                x = s[VALUES + at]
                code = nearest_code(grid * (x - minimum), top)
                s[CODES + at] = code
                wl = s[WEIGHTS + at] * code
                sum_l += wl
                sum_ll += wl * code
                sum_xl += wl * x
            s[SUM_L + k] = sum_l
            s[SUM_LL + k] = sum_ll
            s[SUM_XL + k] = sum_xl


@_inlined
def _errors(
    s: Floats, size: int, lanes: int, absolute: bool, scale: int, minimum: int, error: int
) -> None:
    """The weighted error of the codes under scales and minima; squares, if not absolute."""
    for k in range(lanes):
        s[error + k] = ZERO
    for start in range(0, size, 16):
        for k in range(lanes):
            step = s[scale + k]
            offset = s[minimum + k]
            total = s[error + k]
            for i in range(16):
                at = (start + i) * lanes + k
                gap = step * s[CODES + at] + offset - s[VALUES + at]
                gap = abs(gap) if absolute else gap * gap
                total += s[WEIGHTS + at] * gap
            s[error + k] = total


@_inlined
def _solve(s: Floats, lanes: int) -> None:
    """The scale and the minimum of least squares; the determinant goes to ``SUM_L``.

    A minimum above zero becomes zero, and the scale the best one without a minimum.
    """
    for k in range(lanes):
        weight = s[WEIGHT + k]
        moment = s[MOMENT + k]
        sum_l = s[SUM_L + k]
        sum_ll = s[SUM_LL + k]
        sum_xl = s[SUM_XL + k]
        determinant = weight * sum_ll - sum_l * sum_l
        minimum = (sum_ll * moment - sum_l * sum_xl) / determinant
        alone = minimum > ZERO
        top = weight * sum_xl - moment * sum_l
        top = choose(alone, sum_xl, top)
        bottom = choose(alone, sum_ll, determinant)
        s[NEW_SCALE + k] = top / bottom
        s[NEW_MINIMUM + k] = choose(alone, ZERO, minimum)
        s[SUM_L + k] = determinant


@_inlined
def _keep_better(s: Floats, lanes: int) -> None:
    """Take what was solved where there is a solution and its error is less."""
    for k in range(lanes):
        determinant = s[SUM_L + k]
        error = s[ERROR + k]
        new_error = s[NEW_ERROR + k]
        scale = s[SCALE + k]
        new_scale = s[NEW_SCALE + k]
        minimum = s[MINIMUM + k]
        new_minimum = s[NEW_MINIMUM + k]
        grid = s[GRID + k]
        best_grid = s[BEST_GRID + k]
        start = s[BEST_START + k]
        better = (determinant > ZERO) & (new_error < error)
        s[ERROR + k] = choose(better, new_error, error)
        s[SCALE + k] = choose(better, new_scale, scale)
        s[MINIMUM + k] = choose(better, new_minimum, minimum)
        s[BEST_GRID + k] = choose(better, grid, best_grid)
        s[BEST_START + k] = choose(better, minimum, start)


@_inlined
def fit(s: Floats, size: int, top: int, factors: Floats, absolute: bool) -> None:
    """Search all lanes of ``VALUES`` under ``WEIGHTS`` for scales and minima.

    ``size`` is the values of a lane, ``top`` the largest code, ``factors`` the steps that each
    grid has from the best minimum so far to the highest value. Leaves ``SCALE``, ``MINIMUM``,
    ``WEIGHT`` (the sum), and ``BEST_GRID`` and ``BEST_START``, which make the codes:
    nearest_int(grid * (x - start)).
    """
    lanes = _VALUES // size
    _extremes(s, size, lanes)
    _first_grid(s, lanes, top)
    _encode(s, size, lanes, top)
    _errors(s, size, lanes, absolute, SCALE, MINIMUM, ERROR)
    for n in range(factors.size):
        factor = factors[n]
        for k in range(lanes):
            s[GRID + k] = factor / (s[HIGH + k] - s[MINIMUM + k])
        _encode(s, size, lanes, top)
        _solve(s, lanes)
        _errors(s, size, lanes, absolute, NEW_SCALE, NEW_MINIMUM, NEW_ERROR)
        _keep_better(s, lanes)
