"""Q6_K: blocks of 256 values, a scale of 8 bits for every 16."""

from __future__ import annotations

import numpy as np

from .._affine_loops import Floats, _inlined, _kernel
from .._nvfp4_loops import Bytes
from ._k_loops import _store_f16
from ._scale_loops import SMALLEST, nearest_int
from ._search_loops import (
    NO_IMPORTANCE,
    _clamped,
    _code,
    _columns,
    _inverses,
    _load,
    _load_weights,
    _scales,
    _scratch,
    _search,
    _weigh_by_squares,
    _weights,
)

BLOCKS = 8
"""Blocks side by side."""

SUB = 16
"""Values of a sub-block, and sub-blocks of a block."""

LANES = BLOCKS * SUB
BOUND = 32
NBYTES = 210


@_inlined
def _block_scales(scales: Floats, steps: Floats, out: Bytes) -> bool:
    """The scales of a block to ``out``, and to ``steps`` what their levels stand for; False for
    a block of zeros."""
    size = np.float32(0)
    top = np.float32(0)
    for j in range(SUB):
        larger = abs(scales[j]) > size
        size = abs(scales[j]) if larger else size
        top = scales[j] if larger else top
    if size < SMALLEST:
        return False
    inverse = np.float32(-128) / top
    step = _store_f16(np.float32(1) / inverse, out[208:])
    for j in range(SUB):
        level = np.int8(min(nearest_int(inverse * scales[j]), np.int32(127)))
        out[192 + j] = np.uint8(level)
        steps[j] = step * np.float32(level)
    return True


@_inlined
def _encode(block: Floats, steps: Floats, inverses: Floats, wide: Floats, codes: Bytes) -> None:
    for j in range(SUB):
        for i in range(SUB):
            wide[j * SUB + i] = steps[j]
    for k in range(SUB * SUB):
        codes[k] = np.uint8(_clamped(block[k] / wide[k], -BOUND, BOUND - 1) + np.int32(BOUND))
    for j in range(SUB):
        if steps[j] == np.float32(0):
            for k in range(SUB * j, SUB * j + SUB):
                codes[k] = _code(block[k], inverses[j], BOUND)


@_inlined
def _pack(codes: Bytes, out: Bytes) -> None:
    for h in range(2):
        for k in range(32):
            a = codes[128 * h + k]
            b = codes[128 * h + k + 32]
            c = codes[128 * h + k + 64]
            d = codes[128 * h + k + 96]
            out[64 * h + k] = np.uint8((a & 15) | (c << 4))
            out[64 * h + k + 32] = np.uint8((b & 15) | (d << 4))
            out[128 + 32 * h + k] = np.uint8(
                (a >> 4) | (b >> 4 << 2) | (c >> 4 << 4) | (d >> 4 << 6)
            )


@_kernel
def weighted(rows: Floats, importance: Floats, out: Bytes) -> None:
    """Finite rows [rows, cols] to [rows, cols / 256 * 210], with the importance of each column,
    or with none where that is empty."""
    blocks = rows.reshape(-1, 256)
    subs = rows.reshape(-1, SUB)
    columns = _columns(importance, SUB)
    packed = out.reshape(-1, NBYTES)
    s = _scratch(SUB, LANES)
    steps = np.empty(SUB, np.float32)
    wide = np.empty(256, np.float32)
    codes = np.empty(256, np.uint8)
    for first in range(0, blocks.shape[0], BLOCKS):
        count = min(BLOCKS, blocks.shape[0] - first)
        _load(subs[first * SUB : (first + count) * SUB], SUB, LANES, s)
        if columns.size:
            _load_weights(columns, first * SUB, SUB, LANES, _weights(SUB, LANES), s)
        else:
            _weigh_by_squares(SUB, LANES, s)
        _search(SUB, LANES, BOUND, True, s)
        inverses = s[_inverses(SUB, LANES) :]
        scales = s[_scales(SUB, LANES) :]
        for b in range(count):
            block = blocks[first + b]
            made = packed[first + b]
            if _block_scales(scales[b * SUB : (b + 1) * SUB], steps, made):
                _encode(block, steps, inverses[b * SUB : (b + 1) * SUB], wide, codes)
                _pack(codes, made)
            else:
                made[:] = 0


def plain(rows: Floats, out: Bytes) -> None:
    """Finite rows [rows, cols] to [rows, cols / 256 * 210]."""
    weighted(rows, NO_IMPORTANCE, out)
