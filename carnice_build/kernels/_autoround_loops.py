"""The compiled loops of ``autoround``: numba, one thread, no GIL, cached on disk.

The layout of the format is transposed: a row of the weight is a column of ``qweight``. So a
kernel works on tiles, the same group of 64 neighbouring rows: they are read as 64 runs of
neighbours, and their words are written 64 neighbours at a time. Within a tile, the loops are
those of ``_affine_loops``: extremes, scales, codes, packing, each of which vectorizes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._affine_loops import (
    BF16,
    F16,
    F32,
    TWO_TO_23,
    Floats,
    Keys,
    Patterns,
    _bits,
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
"""Eight codes a word, the first lowest."""
Codes = NDArray[np.uint8]

KINDS = {"BF16": BF16, "F16": F16, "F32": F32}

TILE_ROWS = 64

ZERO_POINT = 8
SMALLEST_SCALE = np.float32(168 * 2.0**-24)
"""The F16 nearest to 1e-5."""
F16_INFINITY = np.uint32(0x7C00)

OFF_GRID = np.float32(1 / 16)
"""Steps. A BF16 weight is off its grid point by at most 8 * 2**-8, half of this."""


@_inlined
def _extremes(
    weight: Patterns, first: int, count: int, j: int, key_of: Any, lows: Keys, highs: Keys
) -> None:
    """The keys of the least and the greatest value of group ``j`` of each row."""
    for r in range(count):
        group = weight[first + r, j]
        low = key_of(group[0])
        high = low
        for k in range(group.size):
            key = key_of(group[k])
            low = min(low, key)
            high = max(high, key)
        lows[r] = low
        highs[r] = high


@_inlined
def _signed_scale(low: np.float32, high: np.float32) -> np.uint32:
    """The F16 scale that maps the end of larger magnitude to -8; the upper end when both are
    equally large. At least 1e-5 in magnitude, and positive for a group of zeros."""
    low = low if low < np.float32(0) else np.float32(0)
    high = high if high > np.float32(0) else np.float32(0)
    edge = -low if high < -low else -high
    scale = _widen(_narrow(edge / np.float32(8), F16), F16)
    if scale < np.float32(0):
        scale = scale if scale < -SMALLEST_SCALE else -SMALLEST_SCALE
    else:
        scale = scale if scale > SMALLEST_SCALE else SMALLEST_SCALE
    return np.uint32(_narrow(scale, F16))


@_inlined
def _encode(
    weight: Patterns, first: int, count: int, j: int, kind: int, scales: Floats, codes: Codes
) -> None:
    """Codes of group ``j`` of each row: steps clipped to -8..7 and rounded, plus 8.

    Clipping before rounding gives what clipping after it gives, since both ends are integers.
    Adding 2**23 + 8 rounds to an integer, ties to even as 8 is even, and leaves it in the
    lowest bits.
    """
    for r in range(count):
        group = weight[first + r, j]
        row = codes[r]
        scale = scales[r]
        for k in range(group.size):
            steps = _widen(group[k], kind) / scale
            steps = steps if steps > np.float32(-ZERO_POINT) else np.float32(-ZERO_POINT)
            steps = steps if steps < np.float32(7) else np.float32(7)
            row[k] = np.uint8(_bits(steps + (TWO_TO_23 + np.float32(ZERO_POINT))))


@_inlined
def _store(codes: Codes, count: int, j: int, first: int, qweight: Packed) -> None:
    """Pack a tile's codes into columns ``first`` and following of group ``j``."""
    eights = codes.view(np.uint64)
    words = eights.shape[1]
    for k in range(words):
        line = qweight[j * words + k]
        for r in range(count):
            line[first + r] = np.int32(_squeeze(eights[r, k], 4))


@_inlined
def _load(qweight: Packed, count: int, j: int, first: int, codes: Codes) -> None:
    """The reverse of ``_store``."""
    words = codes.shape[1] // 8
    for k in range(words):
        line = qweight[j * words + k]
        for r in range(count):
            word = np.uint32(line[first + r])
            for n in range(8):
                codes[r, 8 * k + n] = (word >> np.uint32(4 * n)) & np.uint32(15)


@_inlined
def _zero_point(qzeros: Packed, j: int, column: int) -> np.float32:
    """The zero point of a column's group ``j``; the format stores it less one."""
    nibble = (np.uint32(qzeros[j, column // 8]) >> np.uint32(4 * (column % 8))) & np.uint32(15)
    return np.float32(nibble + np.uint32(1))


@_inlined
def _quantize(
    weight: Patterns, first: int, kind: int, infinity: int, qweight: Packed, scales: Patterns
) -> int:
    rows, groups, group_size = weight.shape
    codes = np.empty((TILE_ROWS, group_size), np.uint8)
    lows = np.empty(TILE_ROWS, np.int32)
    highs = np.empty(TILE_ROWS, np.int32)
    wide = np.empty(TILE_ROWS, np.float32)
    for start in range(0, rows, TILE_ROWS):
        count = min(TILE_ROWS, rows - start)
        for j in range(groups):
            if kind == F32:
                _extremes(weight, start, count, j, _key_32, lows, highs)
            else:
                _extremes(weight, start, count, j, _key_16, lows, highs)
            bad = np.bool_(False)
            for r in range(count):
                scale = _signed_scale(_from_key(lows[r], kind), _from_key(highs[r], kind))
                wide[r] = _widen(scale, F16)
                scales[j, first + start + r] = scale
                bad |= (highs[r] >= infinity) | (lows[r] <= -infinity - 1)
                bad |= (scale & F16_INFINITY) == F16_INFINITY
            if bad:
                return start
            _encode(weight, start, count, j, kind, wide, codes)
            _store(codes, count, j, first + start, qweight)
    return -1


@_kernel
def quantize_bf16(weight: Patterns, first: int, qweight: Packed, scales: Patterns) -> int:
    """Quantize rows [n, groups, group_size] into columns ``first`` and following; -1, or the
    first row of the tile with a weight that is not finite or too large for an F16 scale."""
    return _quantize(weight, first, BF16, 0x7F80, qweight, scales)


@_kernel
def quantize_f16(weight: Patterns, first: int, qweight: Packed, scales: Patterns) -> int:
    """As ``quantize_bf16``, for F16."""
    return _quantize(weight, first, F16, 0x7C00, qweight, scales)


@_kernel
def quantize_f32(weight: Patterns, first: int, qweight: Packed, scales: Patterns) -> int:
    """As ``quantize_bf16``, for F32."""
    return _quantize(weight, first, F32, 0x7F800000, qweight, scales)


@_inlined
def _widen_tile(
    weight: Patterns, first: int, count: int, j: int, kind: int, tile: Floats
) -> np.bool_:
    """Group ``j`` of each row in float32; whether all of it is finite.

    ``_widen`` takes the Inf and NaN of F16 to what would follow on its largest values.
    """
    limit = np.float32(2**16 if kind == F16 else np.inf)
    finite: np.bool_ = np.bool_(True)
    for r in range(count):
        group = weight[first + r, j]
        row = tile[r]
        for k in range(group.size):
            value = _widen(group[k], kind)
            finite &= abs(value) < limit
            row[k] = value
    return finite


@_kernel
def pack(weight: Patterns, kind: int, scales: Floats, first: int, qweight: Packed) -> int:
    """Pack rows [n, groups, group_size] that lie on the grid of ``scales`` [n, groups]; -1, or
    the first row of the tile with a weight that does not."""
    rows, groups, group_size = weight.shape
    codes = np.empty((TILE_ROWS, group_size), np.uint8)
    tile = np.empty((TILE_ROWS, group_size), np.float32)
    for start in range(0, rows, TILE_ROWS):
        count = min(TILE_ROWS, rows - start)
        for j in range(groups):
            on_grid = _widen_tile(weight, start, count, j, kind, tile)
            for r in range(count):
                scale = scales[start + r, j]
                row = tile[r]
                row_codes = codes[r]
                on_grid &= abs(scale) < np.float32(np.inf)
                for k in range(group_size):
                    steps = row[k] / scale
                    code = np.rint(steps)
                    on_grid &= abs(steps - code) <= OFF_GRID
                    on_grid &= (code >= np.float32(-8)) & (code <= np.float32(7))
                    row_codes[k] = np.uint8(_bits(code + (TWO_TO_23 + np.float32(ZERO_POINT))))
            if not on_grid:
                return start
            _store(codes, count, j, first + start, qweight)
    return -1


@_kernel
def unpack(qweight: Packed, first: int, codes: Codes) -> None:
    """The codes of columns ``first`` and following as rows [n, groups, group_size]."""
    rows, groups, _ = codes.shape
    for start in range(0, rows, TILE_ROWS):
        count = min(TILE_ROWS, rows - start)
        for j in range(groups):
            _load(qweight, count, j, first + start, codes[start : start + count, j])


@_kernel
def dequantize(qweight: Packed, qzeros: Packed, scales: Floats, first: int, out: Floats) -> None:
    """The values of columns ``first`` and following as rows [n, groups, group_size]; ``scales``
    are those of these columns, [groups, n]."""
    rows, groups, group_size = out.shape
    codes = np.empty((TILE_ROWS, group_size), np.uint8)
    for start in range(0, rows, TILE_ROWS):
        count = min(TILE_ROWS, rows - start)
        for j in range(groups):
            _load(qweight, count, j, first + start, codes)
            for r in range(count):
                group = out[start + r, j]
                row_codes = codes[r]
                scale = scales[j, start + r]
                zero = _zero_point(qzeros, j, first + start + r)
                for k in range(group_size):
                    group[k] = scale * (np.float32(row_codes[k]) - zero)
