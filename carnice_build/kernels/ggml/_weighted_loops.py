"""Q4_0, Q4_1, Q5_0 and Q5_1 with importance: blocks of 32 values whose scale is searched.

A value weighs what its column does, times root(mean of squares of the row + its own square).
Q4_0 and Q5_0 search the scale as Q6_K does, Q4_1 and Q5_1 scale and minimum as Q4_K and Q5_K do.
"""

from __future__ import annotations

import numpy as np

from .._affine_loops import Floats, _inlined, _kernel
from .._nvfp4_loops import Bytes
from . import _fit_loops as fits
from ._k_loops import WEIGHTED_4, WEIGHTED_5, _store_f16
from ._plain_loops import BLOCK, _pack
from ._search_loops import (
    _clamped,
    _code,
    _columns,
    _inverses,
    _load,
    _load_weights,
    _scales,
    _scratch,
    _search,
    _squares_of_four,
    _weigh,
    _weights,
)

LANES = 64
"""Blocks side by side."""


@_inlined
def _means_of_squares(rows: Floats) -> Floats:
    """Of each row."""
    means = np.empty(rows.shape[0] + 3, np.float32)
    for first in range(0, rows.shape[0], 4):
        sums = _squares_of_four(rows, first)
        for k in range(4):
            means[first + k] = sums[k] / np.float32(rows.shape[1])
    return means


@_inlined
def _load_means(means: Floats, first: int, per_row: int, at: int, s: Floats) -> None:
    """Of the rows of all lanes, of which lane 0 has block ``first``."""
    for k in range(LANES):
        s[at + k] = means[min((first + k) // per_row, means.size - 1)]


@_inlined
def _search_scales(rows: Floats, importance: Floats, bits: int, out: Bytes) -> None:
    """The value of largest magnitude becomes about the lowest level, code 0."""
    blocks = rows.reshape(-1, BLOCK)
    columns = _columns(importance, BLOCK)
    packed = out.reshape(-1, 18 if bits == 4 else 22)
    means = _means_of_squares(rows)
    s = _scratch(BLOCK, LANES)
    codes = np.empty((LANES, BLOCK), np.uint8)
    bound = 1 << bits - 1
    for first in range(0, blocks.shape[0], LANES):
        chunk = blocks[first : first + LANES]
        made = packed[first : first + LANES]
        _load(chunk, BLOCK, LANES, s)
        _load_weights(columns, first, BLOCK, LANES, _weights(BLOCK, LANES), s)
        _load_means(means, first, columns.shape[1], _scales(BLOCK, LANES), s)
        _weigh(BLOCK, LANES, _weights(BLOCK, LANES), _scales(BLOCK, LANES), s)
        _search(BLOCK, LANES, bound, True, s)
        for b in range(chunk.shape[0]):
            _store_f16(s[_scales(BLOCK, LANES) + b], made[b])
            inverse = s[_inverses(BLOCK, LANES) + b]
            for k in range(BLOCK):
                codes[b, k] = _code(chunk[b, k], inverse, bound)
        _pack(chunk.shape[0], bits, 2, codes, made)


@_inlined
def _search_spans(rows: Floats, importance: Floats, bits: int, factors: Floats, out: Bytes) -> None:
    """The least value becomes about code 0, the greatest about the last code."""
    blocks = rows.reshape(-1, BLOCK)
    columns = _columns(importance, BLOCK)
    packed = out.reshape(-1, 20 if bits == 4 else 24)
    means = _means_of_squares(rows)
    s = fits.scratch()
    codes = np.empty((LANES, BLOCK), np.uint8)
    last = (1 << bits) - 1
    for first in range(0, blocks.shape[0], LANES):
        chunk = blocks[first : first + LANES]
        made = packed[first : first + LANES]
        _load(chunk, BLOCK, LANES, s)
        _load_weights(columns, first, BLOCK, LANES, fits.WEIGHTS, s)
        _load_means(means, first, columns.shape[1], fits.SUM_L, s)
        _weigh(BLOCK, LANES, fits.WEIGHTS, fits.SUM_L, s)
        fits.fit(s, BLOCK, last, factors, False)
        for b in range(chunk.shape[0]):
            _store_f16(s[fits.SCALE + b], made[b])
            _store_f16(s[fits.MINIMUM + b], made[b][2:])
            grid = s[fits.BEST_GRID + b]
            start = s[fits.BEST_START + b]
            for k in range(BLOCK):
                codes[b, k] = np.uint8(_clamped(grid * (chunk[b, k] - start), 0, last))
        _pack(chunk.shape[0], bits, 4, codes, made)


@_kernel
def q4_0(rows: Floats, importance: Floats, out: Bytes) -> None:
    """Finite rows [rows, cols] to [rows, cols / 32 * 18], with the importance of each column."""
    _search_scales(rows, importance, 4, out)


@_kernel
def q5_0(rows: Floats, importance: Floats, out: Bytes) -> None:
    """As ``q4_0``, to [rows, cols / 32 * 22]."""
    _search_scales(rows, importance, 5, out)


@_kernel
def q4_1(rows: Floats, importance: Floats, out: Bytes) -> None:
    """As ``q4_0``, to [rows, cols / 32 * 20]."""
    _search_spans(rows, importance, 4, WEIGHTED_4, out)


@_kernel
def q5_1(rows: Floats, importance: Floats, out: Bytes) -> None:
    """As ``q4_0``, to [rows, cols / 32 * 24]."""
    _search_spans(rows, importance, 5, WEIGHTED_5, out)
