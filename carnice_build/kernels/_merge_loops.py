"""The compiled loops of ``autoround_merge``: numba, one thread, no GIL, cached on disk.

They work on the tiles of ``_autoround_loops``. Scales are those of the rows, [groups, n].
"""

from __future__ import annotations

import numpy as np

from ._affine_loops import Floats, Patterns, _bits, _float, _inlined, _kernel
from ._autoround_loops import TILE_ROWS, Packed, _load, _store, _widen_tile, _zero_point

LOWEST = np.float32(0)
HIGHEST = np.float32(15)


@_inlined
def _step(scale: np.float32) -> np.float32:
    """The length of a step; infinite where the scale is 0 or not finite, so that every weight
    and every difference is no step at all."""
    usable = (scale != np.float32(0)) & (abs(scale) < np.float32(np.inf))
    return scale if usable else np.float32(np.inf)


@_inlined
def _clip(code: np.float32) -> np.float32:
    code = code if code > LOWEST else LOWEST
    return code if code < HIGHEST else HIGHEST


@_kernel
def reround(
    weight: Patterns,
    kind: int,
    first: int,
    base_qweight: Packed,
    qzeros: Packed,
    scales: Floats,
    qweight: Packed,
) -> tuple[int, int, int]:
    """Codes of rows [n, groups, group_size] nearest on a given grid.

    The first row of the tile with a NaN or an Inf, else -1; clipped codes; changed codes.
    """
    rows, groups, group_size = weight.shape
    codes = np.empty((TILE_ROWS, group_size), np.uint8)
    tile = np.empty((TILE_ROWS, group_size), np.float32)
    clipped = 0
    changed = 0
    for start in range(0, rows, TILE_ROWS):
        count = min(TILE_ROWS, rows - start)
        for j in range(groups):
            if not _widen_tile(weight, start, count, j, kind, tile):
                return start, clipped, changed
            _load(base_qweight, count, j, first + start, codes)
            for r in range(count):
                step = _step(scales[j, start + r])
                zero = _zero_point(qzeros, j, first + start + r)
                row = tile[r]
                row_codes = codes[r]
                for k in range(group_size):
                    code = np.rint(row[k] / step) + zero
                    kept = _clip(code)
                    new = np.uint8(kept)
                    clipped += int(kept != code)
                    changed += int(new != row_codes[k])
                    row_codes[k] = new
            _store(codes, count, j, first + start, qweight)
    return -1, clipped, changed


@_kernel
def delta(
    weight: Patterns,
    base: Patterns,
    kind: int,
    first: int,
    base_qweight: Packed,
    scales: Floats,
    qweight: Packed,
) -> tuple[int, int, int]:
    """Codes of the base, each moved by the steps between base and weight. As ``reround``."""
    rows, groups, group_size = weight.shape
    codes = np.empty((TILE_ROWS, group_size), np.uint8)
    tile = np.empty((TILE_ROWS, group_size), np.float32)
    base_tile = np.empty((TILE_ROWS, group_size), np.float32)
    clipped = 0
    changed = 0
    for start in range(0, rows, TILE_ROWS):
        count = min(TILE_ROWS, rows - start)
        for j in range(groups):
            finite = _widen_tile(weight, start, count, j, kind, tile)
            finite &= _widen_tile(base, start, count, j, kind, base_tile)
            if not finite:
                return start, clipped, changed
            _load(base_qweight, count, j, first + start, codes)
            for r in range(count):
                step = _step(scales[j, start + r])
                row = tile[r]
                base_row = base_tile[r]
                row_codes = codes[r]
                for k in range(group_size):
                    code = np.float32(row_codes[k]) + np.rint((row[k] - base_row[k]) / step)
                    kept = _clip(code)
                    new = np.uint8(kept)
                    clipped += int(kept != code)
                    changed += int(new != row_codes[k])
                    row_codes[k] = new
            _store(codes, count, j, first + start, qweight)
    return -1, clipped, changed


@_kernel
def residual(
    base: Patterns,
    kind: int,
    first: int,
    limit: np.float32,
    qweight: Packed,
    qzeros: Packed,
    scales: Floats,
) -> tuple[int, np.float32, int, int]:
    """How far rows lie from their codes, in steps.

    The first row of the tile with a NaN or an Inf, else -1; the largest distance; codes farther
    than ``limit``; groups left out because their scale is 0 or not finite.
    """
    rows, groups, group_size = base.shape
    codes = np.empty((TILE_ROWS, group_size), np.uint8)
    tile = np.empty((TILE_ROWS, group_size), np.float32)
    # Bit patterns of positive floats order as integers do, whose maximum vectorizes.
    largest = np.uint32(0)
    far = 0
    unusable = 0
    for start in range(0, rows, TILE_ROWS):
        count = min(TILE_ROWS, rows - start)
        for j in range(groups):
            if not _widen_tile(base, start, count, j, kind, tile):
                return start, _float(largest), far, unusable
            _load(qweight, count, j, first + start, codes)
            for r in range(count):
                step = _step(scales[j, start + r])
                if step == np.float32(np.inf):
                    unusable += 1
                    continue
                zero = _zero_point(qzeros, j, first + start + r)
                row = tile[r]
                row_codes = codes[r]
                for k in range(group_size):
                    distance = abs(_clip(row[k] / step + zero) - np.float32(row_codes[k]))
                    largest = max(largest, _bits(distance))
                    far += int(distance > limit)
    return -1, _float(largest), far, unusable
