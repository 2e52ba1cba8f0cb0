"""The compiled loops of ``decode``: numba, one thread, no GIL, cached on disk.

A kernel takes blocks of bytes [n, nbytes] and makes their values, float32 [n, elements]. A scale
becomes a float before it is multiplied, in the order that ggml has.
"""

from __future__ import annotations

import numpy as np

from .._affine_loops import BF16, Floats, _inlined, _kernel, _widen
from .._nvfp4_loops import Bytes
from ._iq4_loops import LEVELS
from ._plain_loops import _half_of_power
from ._scale_loops import from_f16

MXFP4_LEVELS = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.float32)


@_inlined
def _f16(block: Bytes, at: int) -> np.float32:
    return from_f16(np.uint16(np.uint32(block[at]) | np.uint32(block[at + 1]) << np.uint32(8)))


@_inlined
def _nibbles(codes: Bytes, low: int, scale: np.float32, out: Floats) -> None:
    """Codes of 4 bits, half of them in the low halves of bytes, counted from ``low``."""
    half = codes.size
    for k in range(codes.size):
        out[k] = scale * np.float32(np.int32(codes[k] & 15) + np.int32(low))
        out[k + half] = scale * np.float32(np.int32(codes[k] >> 4) + np.int32(low))


@_inlined
def _looked_up(codes: Bytes, levels: Floats, scale: np.float32, out: Floats) -> None:
    half = codes.size
    for k in range(codes.size):
        out[k] = scale * levels[codes[k] & 15]
        out[k + half] = scale * levels[codes[k] >> 4]


@_inlined
def _fives(high: Bytes, codes: Bytes, low: int, scale: np.float32, out: Floats) -> None:
    """As ``_nibbles``, with the fifth bits of 32 codes in 4 bytes."""
    bits = np.uint32(high[0]) | np.uint32(high[1]) << np.uint32(8)
    bits = np.uint32(
        bits | np.uint32(high[2]) << np.uint32(16) | np.uint32(high[3]) << np.uint32(24)
    )
    for k in range(16):
        first = np.uint32((bits >> np.uint32(k)) << np.uint32(4)) & np.uint32(16)
        second = np.uint32((bits >> np.uint32(k + 16)) << np.uint32(4)) & np.uint32(16)
        a = np.int32(np.uint32(codes[k] & 15) | first)
        b = np.int32(np.uint32(codes[k] >> 4) | second)
        out[k] = scale * np.float32(np.int32(a + np.int32(low)))
        out[k + 16] = scale * np.float32(np.int32(b + np.int32(low)))


@_inlined
def _add(values: Floats, offset: np.float32) -> None:
    for k in range(values.size):
        values[k] = values[k] + offset


@_kernel
def f32(blocks: Bytes, out: Floats) -> None:
    patterns = blocks.reshape(-1).view(np.uint32)
    made = out.reshape(-1).view(np.uint32)
    for k in range(patterns.size):
        made[k] = patterns[k]


@_kernel
def f16(blocks: Bytes, out: Floats) -> None:
    patterns = blocks.reshape(-1).view(np.uint16)
    made = out.reshape(-1)
    for k in range(patterns.size):
        made[k] = from_f16(patterns[k])


@_kernel
def bf16(blocks: Bytes, out: Floats) -> None:
    patterns = blocks.reshape(-1).view(np.uint16)
    made = out.reshape(-1)
    for k in range(patterns.size):
        made[k] = _widen(patterns[k], BF16)


@_kernel
def q4_0(blocks: Bytes, out: Floats) -> None:
    for b in range(blocks.shape[0]):
        _nibbles(blocks[b, 2:], -8, _f16(blocks[b], 0), out[b])


@_kernel
def q4_1(blocks: Bytes, out: Floats) -> None:
    for b in range(blocks.shape[0]):
        _nibbles(blocks[b, 4:], 0, _f16(blocks[b], 0), out[b])
        _add(out[b], _f16(blocks[b], 2))


@_kernel
def q5_0(blocks: Bytes, out: Floats) -> None:
    for b in range(blocks.shape[0]):
        _fives(blocks[b, 2:6], blocks[b, 6:], -16, _f16(blocks[b], 0), out[b])


@_kernel
def q5_1(blocks: Bytes, out: Floats) -> None:
    for b in range(blocks.shape[0]):
        _fives(blocks[b, 4:8], blocks[b, 8:], 0, _f16(blocks[b], 0), out[b])
        _add(out[b], _f16(blocks[b], 2))


@_kernel
def q8_0(blocks: Bytes, out: Floats) -> None:
    for b in range(blocks.shape[0]):
        scale = _f16(blocks[b], 0)
        codes = blocks[b, 2:]
        row = out[b]
        for k in range(codes.size):
            row[k] = np.float32(np.int8(codes[k])) * scale


@_kernel
def iq4_nl(blocks: Bytes, out: Floats) -> None:
    for b in range(blocks.shape[0]):
        _looked_up(blocks[b, 2:], LEVELS, _f16(blocks[b], 0), out[b])


@_kernel
def iq4_xs(blocks: Bytes, out: Floats) -> None:
    for b in range(blocks.shape[0]):
        block = blocks[b]
        whole = _f16(block, 0)
        high = np.int32(block[2]) | np.int32(block[3]) << 8
        for j in range(8):
            low = (np.int32(block[4 + j // 2]) >> (4 * (j % 2))) & 15
            level = (low | ((high >> (2 * j)) & 3) << 4) - 32
            codes = block[8 + 16 * j : 24 + 16 * j]
            _looked_up(codes, LEVELS, whole * np.float32(level), out[b, 32 * j : 32 * j + 32])


@_kernel
def mxfp4(blocks: Bytes, out: Floats) -> None:
    for b in range(blocks.shape[0]):
        unit = _half_of_power(np.uint32(blocks[b, 0]))
        _looked_up(blocks[b, 1:], MXFP4_LEVELS, unit, out[b])


@_kernel
def q2_k(blocks: Bytes, out: Floats) -> None:
    for b in range(blocks.shape[0]):
        block = blocks[b]
        whole = _f16(block, 80)
        whole_minimum = _f16(block, 82)
        for j in range(16):
            scale = whole * np.float32(block[j] & 15)
            minimum = whole_minimum * np.float32(block[j] >> 4)
            first = 16 + 32 * (j // 8) + 16 * (j % 2)
            codes = block[first : first + 16]
            shift = np.uint8(2 * (j // 2 % 4))
            row = out[b, 16 * j : 16 * j + 16]
            for k in range(codes.size):
                row[k] = scale * np.float32((codes[k] >> shift) & 3) - minimum


@_kernel
def q3_k(blocks: Bytes, out: Floats) -> None:
    for b in range(blocks.shape[0]):
        block = blocks[b]
        whole = _f16(block, 108)
        for j in range(16):
            low = (block[96 + j % 8] >> (4 * (j // 8))) & 15
            high = (block[104 + j % 4] >> (2 * (j // 4))) & 3
            scale = whole * np.float32(np.int32(low | high << 4) - np.int32(32))
            first = 32 + 32 * (j // 8) + 16 * (j % 2)
            codes = block[first : first + 16]
            bits = block[16 * (j % 2) : 16 * (j % 2) + 16]
            shift = np.uint8(2 * (j // 2 % 4))
            place = np.uint8(j // 2)
            row = out[b, 16 * j : 16 * j + 16]
            for k in range(codes.size):
                code = np.int32((codes[k] >> shift) & 3) | np.int32((bits[k] >> place) & 1) << 2
                row[k] = scale * np.float32(np.int32(code) - np.int32(4))


@_inlined
def _six_bits(scales: Bytes, j: int) -> tuple[int, int]:
    """Scale and minimum of sub-block j of 8, of the 12 bytes that have them."""
    if j < 4:
        return scales[j] & 63, scales[j + 4] & 63
    pair = scales[j + 4]
    return (pair & 15) | scales[j - 4] >> 6 << 4, pair >> 4 | scales[j] >> 6 << 4


@_kernel
def q4_k(blocks: Bytes, out: Floats) -> None:
    for b in range(blocks.shape[0]):
        block = blocks[b]
        whole = _f16(block, 0)
        whole_minimum = _f16(block, 2)
        for j in range(8):
            level, minimum_level = _six_bits(block[4:16], j)
            scale = whole * np.float32(level)
            minimum = whole_minimum * np.float32(minimum_level)
            codes = block[16 + 32 * (j // 2) : 48 + 32 * (j // 2)]
            shift = np.uint8(4 * (j % 2))
            row = out[b, 32 * j : 32 * j + 32]
            for k in range(codes.size):
                row[k] = scale * np.float32((codes[k] >> shift) & 15) - minimum


@_kernel
def q5_k(blocks: Bytes, out: Floats) -> None:
    for b in range(blocks.shape[0]):
        block = blocks[b]
        whole = _f16(block, 0)
        whole_minimum = _f16(block, 2)
        bits = block[16:48]
        for j in range(8):
            level, minimum_level = _six_bits(block[4:16], j)
            scale = whole * np.float32(level)
            minimum = whole_minimum * np.float32(minimum_level)
            codes = block[48 + 32 * (j // 2) : 80 + 32 * (j // 2)]
            shift = np.uint8(4 * (j % 2))
            place = np.uint8(j)
            row = out[b, 32 * j : 32 * j + 32]
            for k in range(codes.size):
                code = ((codes[k] >> shift) & 15) | ((bits[k] >> place) & 1) << 4
                row[k] = scale * np.float32(code) - minimum


@_kernel
def q6_k(blocks: Bytes, out: Floats) -> None:
    for b in range(blocks.shape[0]):
        block = blocks[b]
        whole = _f16(block, 208)
        for j in range(16):
            scale = whole * np.float32(np.int8(block[192 + j]))
            quarter = j // 2 % 4
            first = 64 * (j // 8) + 32 * (quarter % 2) + 16 * (j % 2)
            codes = block[first : first + 16]
            upper = 128 + 32 * (j // 8) + 16 * (j % 2)
            bits = block[upper : upper + 16]
            shift = np.uint8(4 * (quarter // 2))
            place = np.uint8(2 * quarter)
            row = out[b, 16 * j : 16 * j + 16]
            for k in range(codes.size):
                code = ((codes[k] >> shift) & 15) | ((bits[k] >> place) & 3) << 4
                row[k] = scale * np.float32(np.int32(code) - np.int32(32))
