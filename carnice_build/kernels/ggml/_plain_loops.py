"""Blocks of 32 values whose scale is what their extremes say: Q8_0, Q4_0, Q4_1, Q5_0, Q5_1 and
MXFP4.

ggml converts codes by way of C's conversion of floats to integers, which makes 0 of Inf and NaN on
this platform. They come of a scale so small that its inverse is Inf, and of a span that is Inf; a
block of those has codes of 0.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .._affine_loops import (
    F32,
    Floats,
    Keys,
    _bits,
    _extremes,
    _float,
    _from_key,
    _inlined,
    _kernel,
    _key_32,
)
from .._nvfp4_loops import Bytes, _magnitude_32, _peaks
from ._k_loops import _store_f16

BLOCK = 32

CHUNK_BLOCKS = 128
"""Blocks at a time: 16 kB of float32."""

JUST_BELOW_HALF = np.float32(0.49999997)

INFINITY = np.float32(np.inf)


@_inlined
def _inverse(step: np.float32) -> np.float32:
    """Of a step of 0 it is 0, and NaN where codes are 0: ``_code_of`` makes that of it."""
    inverse = np.float32(1) / step if step != np.float32(0) else np.float32(0)
    sound = (abs(inverse) < INFINITY) & (abs(step) < INFINITY)
    return np.float32(inverse if sound else np.nan)


@_inlined
def _code_of(level: np.float32, last: np.float32) -> np.uint8:
    """The integer below a level that is not negative, the last code for more, and 0 for NaN."""
    level = level if level > np.float32(0) else np.float32(0)
    level = level if level < last else last
    return np.uint8(np.int32(level))


@_kernel
def q8_0(rows: Floats, out: Bytes) -> None:
    """Finite rows [rows, cols] to [rows, cols / 32 * 34]; halves away from zero."""
    blocks = rows.reshape(-1, BLOCK)
    patterns = blocks.view(np.uint32)
    packed = out.reshape(-1, 34)
    peaks = np.empty(CHUNK_BLOCKS, np.int32)
    for first in range(0, blocks.shape[0], CHUNK_BLOCKS):
        chunk = blocks[first : first + CHUNK_BLOCKS]
        _peaks(patterns[first : first + CHUNK_BLOCKS], _magnitude_32, peaks)
        for b in range(chunk.shape[0]):
            block = chunk[b]
            made = packed[first + b]
            step = _float(np.uint32(peaks[b])) / np.float32(127)
            _store_f16(step, made)
            inverse = _inverse(step)
            inverse = inverse if inverse == inverse else np.float32(0)
            codes = made[2:]
            for k in range(block.size):
                level = block[k] * inverse
                level += np.copysign(JUST_BELOW_HALF, level)
                codes[k] = np.uint8(np.int32(level))


@_inlined
def _first_of_size(block: Floats, size: np.float32) -> np.float32:
    """The first value of a magnitude; positive zero of zeros."""
    for k in range(block.size):
        if abs(block[k]) == size and size > np.float32(0):
            return np.float32(block[k])
    return np.float32(0)


@_inlined
def _first_of_zeros(block: Floats) -> np.float32:
    """The first zero, with its sign."""
    for k in range(block.size):
        if block[k] == np.float32(0):
            return np.float32(block[k])
    return np.float32(0)


@_inlined
def _pack_4(codes: Bytes, out: Bytes, at: int) -> None:
    """32 codes to 16 bytes, the first half of them low."""
    for k in range(16):
        out[at + k] = np.uint8((codes[k] & 15) | codes[k + 16] << 4)


@_inlined
def _pack_5(codes: Bytes, eights: NDArray[np.uint64], out: Bytes, at: int) -> None:
    """The fifth bits of 32 codes to 4 bytes, and then the others; ``eights`` is ``codes``.

    The product moves eight bits of eight bytes to the highest byte.
    """
    for k in range(4):
        bits = (eights[k] >> np.uint64(4)) & np.uint64(0x0101010101010101)
        out[at + k] = np.uint8((bits * np.uint64(0x0102040810204080)) >> np.uint64(56))
    _pack_4(codes, out, at + 4)


@_inlined
def _pack(count: int, bits: int, at: int, codes: NDArray[np.uint8], packed: Bytes) -> None:
    """Codes [blocks, 32], from a byte of each block on."""
    eights = codes.view(np.uint64)
    for b in range(count):
        if bits == 4:
            _pack_4(codes[b], packed[b], at)
        else:
            _pack_5(codes[b], eights[b], packed[b], at)


@_inlined
def _parameters_of_tops(
    blocks: Floats, half: int, lows: Keys, highs: Keys, inverses: Floats, packed: Bytes
) -> None:
    for b in range(blocks.shape[0]):
        low = _from_key(lows[b], F32)
        high = _from_key(highs[b], F32)
        top = low if -low > high else high
        if -low == high:
            top = _first_of_size(blocks[b], high)
        step = top / np.float32(-half)
        inverses[b] = _inverse(step)
        _store_f16(step, packed[b])


@_inlined
def _quantize_to_top(rows: Floats, bits: int, out: Bytes) -> None:
    """The value of largest magnitude, the first of several, becomes the lowest level, code 0."""
    blocks = rows.reshape(-1, BLOCK)
    patterns = blocks.view(np.uint32)
    packed = out.reshape(-1, 18 if bits == 4 else 22)
    lows = np.empty(CHUNK_BLOCKS, np.int32)
    highs = np.empty(CHUNK_BLOCKS, np.int32)
    inverses = np.empty(CHUNK_BLOCKS, np.float32)
    codes = np.empty((CHUNK_BLOCKS, BLOCK), np.uint8)
    half = 1 << bits - 1
    shift = np.float32(half + 0.5)
    last = np.float32((1 << bits) - 1)
    for first in range(0, blocks.shape[0], CHUNK_BLOCKS):
        chunk = blocks[first : first + CHUNK_BLOCKS]
        made = packed[first : first + CHUNK_BLOCKS]
        _extremes(patterns[first : first + CHUNK_BLOCKS], _key_32, lows, highs)
        _parameters_of_tops(chunk, half, lows, highs, inverses, made)
        for b in range(chunk.shape[0]):
            block = chunk[b]
            row = codes[b]
            inverse = inverses[b]
            for k in range(block.size):
                row[k] = _code_of(block[k] * inverse + shift, last)
        _pack(chunk.shape[0], bits, 2, codes, made)


@_inlined
def _parameters_of_spans(
    blocks: Floats,
    last: np.float32,
    lows: Keys,
    highs: Keys,
    least: Floats,
    inverses: Floats,
    packed: Bytes,
) -> None:
    for b in range(blocks.shape[0]):
        low = _from_key(lows[b], F32)
        if low == np.float32(0):
            low = _first_of_zeros(blocks[b])
        step = (_from_key(highs[b], F32) - low) / last
        least[b] = low
        inverses[b] = _inverse(step)
        _store_f16(step, packed[b])
        _store_f16(low, packed[b][2:])


@_inlined
def _quantize_span(rows: Floats, bits: int, out: Bytes) -> None:
    """The least value, of zeros the first, becomes code 0, and the greatest the last code."""
    blocks = rows.reshape(-1, BLOCK)
    patterns = blocks.view(np.uint32)
    packed = out.reshape(-1, 20 if bits == 4 else 24)
    lows = np.empty(CHUNK_BLOCKS, np.int32)
    highs = np.empty(CHUNK_BLOCKS, np.int32)
    least = np.empty(CHUNK_BLOCKS, np.float32)
    inverses = np.empty(CHUNK_BLOCKS, np.float32)
    codes = np.empty((CHUNK_BLOCKS, BLOCK), np.uint8)
    last = np.float32((1 << bits) - 1)
    for first in range(0, blocks.shape[0], CHUNK_BLOCKS):
        chunk = blocks[first : first + CHUNK_BLOCKS]
        made = packed[first : first + CHUNK_BLOCKS]
        _extremes(patterns[first : first + CHUNK_BLOCKS], _key_32, lows, highs)
        _parameters_of_spans(chunk, last, lows, highs, least, inverses, made)
        for b in range(chunk.shape[0]):
            block = chunk[b]
            row = codes[b]
            low = least[b]
            inverse = inverses[b]
            for k in range(block.size):
                row[k] = _code_of((block[k] - low) * inverse + np.float32(0.5), last)
        _pack(chunk.shape[0], bits, 4, codes, made)


@_kernel
def q4_0(rows: Floats, out: Bytes) -> None:
    """Finite rows [rows, cols] to [rows, cols / 32 * 18]."""
    _quantize_to_top(rows, 4, out)


@_kernel
def q5_0(rows: Floats, out: Bytes) -> None:
    """Finite rows [rows, cols] to [rows, cols / 32 * 22]."""
    _quantize_to_top(rows, 5, out)


@_kernel
def q4_1(rows: Floats, out: Bytes) -> None:
    """Finite rows [rows, cols] to [rows, cols / 32 * 20]."""
    _quantize_span(rows, 4, out)


@_kernel
def q5_1(rows: Floats, out: Bytes) -> None:
    """Finite rows [rows, cols] to [rows, cols / 32 * 24]."""
    _quantize_span(rows, 5, out)


LEAST_EXPONENT = -149
"""Of the smallest denormal."""


def _first_above() -> NDArray[np.uint32]:
    """By the exponent of a magnitude, from -149 on, the mantissa from where on log2, in float32, is
    that of the next power of two: it rounds up to the integer."""
    mantissas = np.arange((1 << 23) - 256, 1 << 23, dtype=np.uint32)
    parts = np.log2(1 + mantissas / float(1 << 23))
    found = np.full(128 - LEAST_EXPONENT, 1 << 23, np.uint32)
    for k in range(found.size):
        exponent = LEAST_EXPONENT + k
        above = np.float32(exponent + parts) == np.float32(exponent + 1)
        if above.any():
            found[k] = mantissas[above.argmax()]
    return found


FIRST_ABOVE = _first_above()


@_inlined
def _exponent(peak: np.float32) -> np.uint8:
    """floor(log2(peak)) - 2 + 127, as C's float functions have it, in the lowest 8 bits; 0 for 0.

    Times 2**64 makes a normal number of a denormal one; it is exact.
    """
    small = peak < np.float32(2.0**-64)
    bits = _bits(peak * np.float32(2.0**64) if small else peak)
    exponent = np.int32(bits >> np.uint32(23)) - np.int32(127 + 64 if small else 127)
    above = (bits & np.uint32(0x7FFFFF)) >= FIRST_ABOVE[max(int(exponent) - LEAST_EXPONENT, 0)]
    level = exponent + np.int32(above) + np.int32(125)
    return np.uint8(level if peak > np.float32(0) else 0)


@_inlined
def _half_of_power(exponent: np.uint32) -> np.float32:
    """2 ** (exponent - 128): what twice a level of E2M1 is times."""
    normal = np.uint32(exponent - np.uint32(1)) << np.uint32(23)
    denormal = np.uint32(0x00200000) << exponent
    return _float(np.uint32(denormal if exponent < np.uint32(2) else normal))


@_inlined
def _encode_mxfp4(block: Floats, unit: np.float32, codes: Bytes) -> None:
    """The codes of E2M1; a value that becomes zero has no sign.

    ``unit`` is half of the scale; the bounds are midway between levels, which are 0, 1, 2, 3, 4, 6,
    8 and 12 of it. A level that is Inf is never the nearest.
    """
    seventh = unit * np.float32(7) if unit * np.float32(8) < INFINITY else INFINITY
    for k in range(block.size):
        size = abs(block[k])
        code = np.int32(0)
        code = np.int32(1) if size > unit * np.float32(0.5) else code
        code = np.int32(2) if size > unit * np.float32(1.5) else code
        code = np.int32(3) if size > unit * np.float32(2.5) else code
        code = np.int32(4) if size > unit * np.float32(3.5) else code
        code = np.int32(5) if size > unit * np.float32(5) else code
        code = np.int32(6) if size > seventh else code
        code = np.int32(7) if size > unit * np.float32(10) else code
        signed = code | np.int32(8)
        negative = (block[k] < np.float32(0)) & (code > np.int32(0))
        codes[k] = np.uint8(signed if negative else code)


@_kernel
def mxfp4(rows: Floats, out: Bytes) -> None:
    """Finite rows [rows, cols] to [rows, cols / 32 * 17]; of two nearest levels the one nearer to
    zero."""
    blocks = rows.reshape(-1, BLOCK)
    patterns = blocks.view(np.uint32)
    packed = out.reshape(-1, 17)
    peaks = np.empty(CHUNK_BLOCKS, np.int32)
    codes = np.empty((CHUNK_BLOCKS, BLOCK), np.uint8)
    for first in range(0, blocks.shape[0], CHUNK_BLOCKS):
        chunk = blocks[first : first + CHUNK_BLOCKS]
        made = packed[first : first + CHUNK_BLOCKS]
        _peaks(patterns[first : first + CHUNK_BLOCKS], _magnitude_32, peaks)
        for b in range(chunk.shape[0]):
            exponent = _exponent(_float(np.uint32(peaks[b])))
            made[b, 0] = exponent
            _encode_mxfp4(chunk[b], _half_of_power(np.uint32(exponent)), codes[b])
        _pack(chunk.shape[0], 4, 1, codes, made)
