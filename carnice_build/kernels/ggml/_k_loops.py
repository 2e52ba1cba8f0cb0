"""The compiled loops of Q2_K, Q4_K and Q5_K: numba, one thread, no GIL, cached on disk.

A block of 256 values has sub-blocks of 16 (Q2_K) or 32, each with a scale and a minimum, small
integers times one F16 each of the block. 8 blocks go through the search together; fewer
at the end are joined by the first ones, of which nothing more is written.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .._affine_loops import Floats, _inlined, _kernel
from .._nvfp4_loops import Bytes
from . import _fit_loops as fits
from . import _scale_loops as scales
from ._fit_loops import BLOCK, GROUP, nearest_bits
from ._scale_loops import fit_plain, fit_weighted

_PART = 8

HALVES = np.float32(0.1) * np.arange(16, dtype=np.float32) - np.float32(0.5)
PLAIN_2 = HALVES + np.float32(3)
PLAIN_4 = np.float32(0.1) * np.arange(21, dtype=np.float32) - np.float32(1) + np.float32(15)
PLAIN_5 = HALVES + np.float32(31)
NARROW = np.float32(0.05) * np.arange(37, dtype=np.float32) - np.float32(0.9)
WEIGHTED_2 = NARROW + np.float32(3)
WEIGHTED_4 = NARROW + np.float32(15)
WEIGHTED_5 = NARROW + np.float32(31)
"""The steps that the grids have which ggml tries, without and with importance."""


@_inlined
def _spread(s: Floats, to: int, blocks: Floats, first: int, size: int) -> None:
    """Sub-block j of block b of 8 becomes lane 8 * j + b, from a block on, counted anew after
    the last one. Four blocks at a time are stored as one vector."""
    lanes = GROUP * BLOCK // size
    count = blocks.shape[0]
    for b in range(0, GROUP, 4):
        one = blocks[(first + b) % count]
        two = blocks[(first + b + 1) % count]
        three = blocks[(first + b + 2) % count]
        four = blocks[(first + b + 3) % count]
        for j in range(BLOCK // size):
            for i in range(size):
                at = to + i * lanes + j * GROUP + b
                s[at] = one[j * size + i]
                s[at + 1] = two[j * size + i]
                s[at + 2] = three[j * size + i]
                s[at + 3] = four[j * size + i]


@_inlined
def _magnitudes(s: Floats, columns: Floats, first: int, size: int) -> None:
    """Weigh by |x|."""
    for at in range(GROUP * BLOCK):
        s[fits.WEIGHTS + at] = abs(s[fits.VALUES + at])


@_inlined
def _roots(s: Floats, columns: Floats, first: int, size: int) -> None:
    """Weigh by |x| and the root of the sub-block's mean square together."""
    lanes = GROUP * BLOCK // size
    for k in range(lanes):
        s[fits.SUM_L + k] = fits.ZERO
    for start in range(0, size, _PART):
        for k in range(lanes):
            total = s[fits.SUM_L + k]
            for i in range(_PART):
                x = s[fits.VALUES + (start + i) * lanes + k]
                total += x * x
            s[fits.SUM_L + k] = total
    for k in range(lanes):
        s[fits.SUM_L + k] = np.sqrt(s[fits.SUM_L + k] / np.float32(size))
    for i in range(size):
        for k in range(lanes):
            at = i * lanes + k
            s[fits.WEIGHTS + at] = s[fits.SUM_L + k] + abs(s[fits.VALUES + at])


@_inlined
def _importances(s: Floats, columns: Floats, first: int, size: int) -> None:
    """Weigh by the importance of the column, times the root of x * x and the block's mean square
    together, which counts twice in blocks of Q4_K and Q5_K."""
    lanes = GROUP * BLOCK // size
    times = np.float32(1 if size == 16 else 2)
    _spread(s, fits.WEIGHTS, columns, first, size)
    for b in range(GROUP):
        s[fits.SUM_L + b] = fits.ZERO
    for j in range(0, lanes, GROUP):
        for start in range(0, size, 16):
            for b in range(GROUP):
                total = s[fits.SUM_L + b]
                for i in range(16):
                    x = s[fits.VALUES + (start + i) * lanes + j + b]
                    total += x * x
                s[fits.SUM_L + b] = total
    for j in range(0, lanes, GROUP):
        for b in range(GROUP):
            s[fits.SUM_LL + j + b] = times * s[fits.SUM_L + b] / np.float32(BLOCK)
    for i in range(size):
        for k in range(lanes):
            at = i * lanes + k
            x = s[fits.VALUES + at]
            s[fits.WEIGHTS + at] *= np.sqrt(s[fits.SUM_LL + k] + x * x)


@_inlined
def _code_values(
    s: Floats, block: Floats, b: int, size: int, top: int, steps: Floats, codes: Bytes
) -> None:
    """The codes of a block under the scales and minima that are stored for it: ``steps`` has the
    scales of its sub-blocks, then their minima.

    Where a scale is zero, the codes are those that the search found best. Two sub-blocks of 16
    share a loop, since one of 16 would unroll, and then not vectorize.
    """
    count = BLOCK // size
    for at in range(0, BLOCK, 32):
        j = at // size
        last = (at + 16) // size
        step, minimum = steps[j], steps[count + j]
        last_step, last_minimum = steps[last], steps[count + last]
        for i in range(32):
            d = step if i < 16 else last_step
            m = minimum if i < 16 else last_minimum
            codes[at + i] = _code((block[at + i] + m) / d, top)
    for j in range(count):
        if steps[j] == fits.ZERO:
            k = j * GROUP + b
            grid = s[fits.BEST_GRID + k]
            start = s[fits.BEST_START + k]
            for i in range(j * size, (j + 1) * size):
                codes[i] = _code(grid * (block[i] - start), top)


@_inlined
def _code(value: np.float32, top: int) -> np.uint8:
    """``nearest_int``, clipped to 0..top."""
    bits = nearest_bits(value)
    lowest = np.uint32(0x400000)
    highest = np.uint32(0x400000 + top)
    bits = bits if bits > lowest else lowest
    bits = bits if bits < highest else highest
    return np.uint8(bits)


@_inlined
def _store_f16(value: np.float32, out: Bytes) -> np.float32:
    """Two bytes, the lower first; what they stand for."""
    bits = scales.f16_bits(value)
    out[0] = np.uint8(bits & np.uint16(0xFF))
    out[1] = np.uint8(bits >> np.uint16(8))
    return scales.from_f16(bits)


@_inlined
def _store_six_bits(q: Floats, b: int, packed: Bytes, steps: Floats) -> None:
    """8 scales and 8 minima in 12 bytes; ``steps`` gets what is then read from them.

    The first four of each are bytes, whose upper two bits hold those of the last four; under
    absurd importance ggml has numbers above 63 there, which run into them.
    """
    for j in range(4):
        packed[j] = np.uint8(q[scales.CODES + j * scales.LANES + b])
        packed[4 + j] = np.uint8(q[scales.CODES + j * scales.LANES + GROUP + b])
    for j in range(4):
        scale = np.uint8(q[scales.CODES + (4 + j) * scales.LANES + b])
        minimum = np.uint8(q[scales.CODES + (4 + j) * scales.LANES + GROUP + b])
        packed[8 + j] = (scale & 0xF) | ((minimum & 0xF) << 4)
        packed[j] |= (scale >> 4) << 6
        packed[4 + j] |= (minimum >> 4) << 6
    for j in range(4):
        steps[j] = np.float32(packed[j] & 63)
        steps[8 + j] = np.float32(packed[4 + j] & 63)
        steps[4 + j] = np.float32((packed[8 + j] & 0xF) | ((packed[j] >> 6) << 4))
        steps[12 + j] = np.float32((packed[8 + j] >> 4) | ((packed[4 + j] >> 6) << 4))


@_inlined
def _store_four_bits(q: Floats, b: int, packed: Bytes, steps: Floats) -> None:
    """16 pairs of a scale and a minimum, a byte each; the rest as ``_store_six_bits``."""
    for j in range(16):
        scale = np.uint8(q[scales.CODES + j * scales.LANES + b])
        minimum = np.uint8(q[scales.CODES + j * scales.LANES + GROUP + b])
        packed[j] = scale | (minimum << 4)
        steps[j] = np.float32(packed[j] & 0xF)
        steps[16 + j] = np.float32(packed[j] >> 4)


@_inlined
def _times(steps: Floats, scale: np.float32, minimum: np.float32) -> None:
    count = steps.size // 2
    for j in range(count):
        steps[j] *= scale
        steps[count + j] *= minimum


@_inlined
def _store_2(
    s: Floats, q: Floats, block: Floats, b: int, steps: Floats, codes: Bytes, out: Bytes
) -> None:
    """A block of Q2_K: 16 bytes of scales, 64 of codes, the two F16."""
    _store_four_bits(q, b, out[:16], steps)
    scale = _store_f16(q[scales.WHOLE + b], out[80:82])
    minimum = _store_f16(q[scales.WHOLE + GROUP + b], out[82:84])
    _times(steps, scale, minimum)
    _code_values(s, block, b, 16, 3, steps, codes)
    for half in range(2):
        at = 128 * half
        for i in range(32):
            low = codes[at + i] | (codes[at + 32 + i] << 2)
            out[16 + 32 * half + i] = low | (codes[at + 64 + i] << 4) | (codes[at + 96 + i] << 6)


@_inlined
def _store_head(q: Floats, b: int, steps: Floats, out: Bytes) -> None:
    """What Q4_K and Q5_K begin with: the two F16, 12 bytes of scales and minima."""
    scale = _store_f16(q[scales.WHOLE + b], out[:2])
    minimum = _store_f16(q[scales.WHOLE + GROUP + b], out[2:4])
    _store_six_bits(q, b, out[4:16], steps)
    _times(steps, scale, minimum)


@_inlined
def _store_4(
    s: Floats, q: Floats, block: Floats, b: int, steps: Floats, codes: Bytes, out: Bytes
) -> None:
    """A block of Q4_K: the head, 128 bytes of codes."""
    _store_head(q, b, steps, out)
    _code_values(s, block, b, 32, 15, steps, codes)
    for pair in range(4):
        at = 64 * pair
        for i in range(32):
            out[16 + 32 * pair + i] = codes[at + i] | (codes[at + 32 + i] << 4)


@_inlined
def _store_5(
    s: Floats, q: Floats, block: Floats, b: int, steps: Floats, codes: Bytes, out: Bytes
) -> None:
    """A block of Q5_K: the head, 32 bytes of the codes' upper bits, 128 of their lower ones."""
    _store_head(q, b, steps, out)
    _code_values(s, block, b, 32, 31, steps, codes)
    for i in range(32):
        upper = np.uint8(0)
        for j in range(8):
            upper |= (codes[32 * j + i] >> 4) << j
        out[16 + i] = upper
    for pair in range(4):
        at = 64 * pair
        for i in range(32):
            lower = codes[at + i] & 0xF
            out[48 + 32 * pair + i] = lower | ((codes[at + 32 + i] & 0xF) << 4)


@_inlined
def _quantize(
    blocks: Floats,
    columns: Floats,
    made: Bytes,
    size: int,
    top: int,
    factors: Floats,
    absolute: bool,
    weigh: Callable[[Floats, Floats, int, int], None],
    fit_scales: Callable[[Floats, int, int, int], None],
    limit: int,
    store: Callable[[Floats, Floats, Floats, int, Floats, Bytes, Bytes], None],
) -> None:
    """Blocks [n, 256], of rows whose columns have the importance ``columns`` [n, 256], to bytes
    [n, bytes]; the rest as ``fits.fit`` and ``scales.fit_plain`` have it."""
    s = fits.scratch()
    q = np.empty(scales.SCRATCH, np.float32)
    count = BLOCK // size
    steps = np.empty(2 * count, np.float32)
    codes = np.empty(BLOCK, np.uint8)
    for first in range(0, blocks.shape[0], GROUP):
        _spread(s, fits.VALUES, blocks, first, size)
        weigh(s, columns, first, size)
        fits.fit(s, size, top, factors, absolute)
        scales.gather(s, q, count)
        fit_scales(q, count, 15 if size == 16 else 63, limit)
        for b in range(min(GROUP, blocks.shape[0] - first)):
            store(s, q, blocks[first + b], b, steps, codes, made[first + b])


@_kernel
def plain_2(rows: Floats, out: Bytes) -> None:
    """Rows of whole blocks to Q2_K."""
    blocks = rows.reshape(-1, BLOCK)
    made = out.reshape(-1, 84)
    _quantize(blocks, blocks, made, 16, 3, PLAIN_2, True, _magnitudes, fit_plain, 255, _store_2)


@_kernel
def weighted_2(rows: Floats, importance: Floats, out: Bytes) -> None:
    """As ``plain_2``, with the importance of every column."""
    blocks = rows.reshape(-1, BLOCK)
    columns = importance.reshape(-1, BLOCK)
    made = out.reshape(-1, 84)
    _quantize(
        blocks, columns, made, 16, 3, WEIGHTED_2, False, _importances, fit_weighted, 255, _store_2
    )


@_kernel
def plain_4(rows: Floats, out: Bytes) -> None:
    """As ``plain_2``, to Q4_K."""
    blocks = rows.reshape(-1, BLOCK)
    made = out.reshape(-1, 144)
    _quantize(blocks, blocks, made, 32, 15, PLAIN_4, False, _roots, fit_plain, 63, _store_4)


@_kernel
def weighted_4(rows: Floats, importance: Floats, out: Bytes) -> None:
    """As ``weighted_2``, to Q4_K."""
    blocks = rows.reshape(-1, BLOCK)
    columns = importance.reshape(-1, BLOCK)
    made = out.reshape(-1, 144)
    _quantize(
        blocks, columns, made, 32, 15, WEIGHTED_4, False, _importances, fit_weighted, 255, _store_4
    )


@_kernel
def plain_5(rows: Floats, out: Bytes) -> None:
    """As ``plain_2``, to Q5_K."""
    blocks = rows.reshape(-1, BLOCK)
    made = out.reshape(-1, 176)
    _quantize(blocks, blocks, made, 32, 31, PLAIN_5, False, _roots, fit_plain, 63, _store_5)


@_kernel
def weighted_5(rows: Floats, importance: Floats, out: Bytes) -> None:
    """As ``weighted_2``, to Q5_K."""
    blocks = rows.reshape(-1, BLOCK)
    columns = importance.reshape(-1, BLOCK)
    made = out.reshape(-1, 176)
    _quantize(
        blocks, columns, made, 32, 31, WEIGHTED_5, False, _importances, fit_weighted, 63, _store_5
    )
