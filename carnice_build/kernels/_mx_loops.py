"""The compiled loops of ``mx``: numba, one thread, no GIL, cached on disk.

As in ``_nvfp4_loops``, with blocks of 32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._affine_loops import BF16, F16, F32, Floats, Keys, Patterns, _inlined, _kernel, _widen
from ._compressed_loops import _round_to
from ._fp8_loops import _code
from ._nvfp4_loops import (
    Bytes,
    _from_e4m3,
    _from_e8m0,
    _magnitude_16,
    _magnitude_32,
    _numbers_of_e2m1,
    _peaks,
    _restore,
    _to_e2m1,
)

BLOCK = 32
"""Values that share a scale."""

CHUNK_BLOCKS = 128

FP4, FP8 = 4, 8


@_inlined
def _scales(
    count: int, kind: int, offset: int, infinity: int, peaks: Keys, scales: Bytes, steps: Floats
) -> bool:
    """The exponent of each block's scale, with a bias of 127, and the scale.

    A largest magnitude from 1.75 times a power of two on counts as the next one; ``offset`` less
    makes the largest code of it.  In F16, a scale that rounds to zero becomes 1.  False where the
    next power of two is Inf, or the block holds a NaN or an Inf.
    """
    mantissa = 10 if kind == F16 else (7 if kind == BF16 else 23)
    bias = 15 if kind == F16 else 127
    fine = True
    for b in range(count):
        field = (peaks[b] >> np.int32(mantissa - 2)) + 1 >> 2
        fine &= field < infinity >> mantissa
        exponent = field + (127 - bias - offset)
        exponent = exponent if (exponent > 0) & (field > 0) else 0
        if kind == F16:
            # Half of the smallest F16, 2 ** -25, rounds to zero.
            exponent = exponent if exponent > 127 - 25 else 127
        scales[b] = np.uint8(exponent)
        steps[b] = _from_e8m0(np.uint32(exponent))
    return fine


@_inlined
def _encode_4(blocks: Patterns, kind: int, steps: Floats, codes: Bytes) -> None:
    """Two codes a byte, the first one lowest."""
    row = np.empty(BLOCK, np.uint8)
    for b in range(blocks.shape[0]):
        block = blocks[b]
        # A power of two, and so is its inverse: the product is the quotient.
        inverse = np.float32(1) / steps[b]
        for k in range(BLOCK):
            quotient = _round_to(_widen(block[k], kind) * inverse, kind)
            row[k] = np.uint8(_to_e2m1(quotient))
        for k in range(BLOCK // 2):
            codes[b * (BLOCK // 2) + k] = row[2 * k] | (row[2 * k + 1] << np.uint8(4))


@_inlined
def _encode_8(blocks: Patterns, kind: int, steps: Floats, codes: Bytes) -> None:
    for b in range(blocks.shape[0]):
        block = blocks[b]
        out = codes[b * BLOCK : (b + 1) * BLOCK]
        for k in range(BLOCK):
            out[k] = _code(_widen(block[k], kind), steps[b], kind)


@_inlined
def _quantize(
    blocks: Patterns,
    bits: int,
    magnitude: Callable[[Any], Any],
    kind: int,
    infinity: int,
    codes: Bytes,
    scales: Bytes,
) -> int:
    peaks = np.empty(CHUNK_BLOCKS, np.int32)
    steps = np.empty(CHUNK_BLOCKS, np.float32)
    width = BLOCK * bits // 8
    offset = 2 if bits == FP4 else 8
    for first in range(0, blocks.shape[0], CHUNK_BLOCKS):
        chunk = blocks[first : first + CHUNK_BLOCKS]
        count = chunk.shape[0]
        _peaks(chunk, magnitude, peaks)
        if not _scales(count, kind, offset, infinity, peaks, scales[first : first + count], steps):
            return first
        out = codes[first * width : (first + count) * width]
        if bits == FP4:
            _encode_4(chunk, kind, steps, out)
        else:
            _encode_8(chunk, kind, steps, out)
    return -1


@_kernel
def quantize_bf16(blocks: Patterns, bits: int, codes: Bytes, scales: Bytes) -> int:
    """Quantize blocks [n, 32] into flat outputs; -1, or the first block of the chunk that holds
    a NaN or an Inf, or what no scale is large enough for."""
    return _quantize(blocks, bits, _magnitude_16, BF16, 0x7F80, codes, scales)


@_kernel
def quantize_f16(blocks: Patterns, bits: int, codes: Bytes, scales: Bytes) -> int:
    """As ``quantize_bf16``, for F16."""
    return _quantize(blocks, bits, _magnitude_16, F16, 0x7C00, codes, scales)


@_kernel
def quantize_f32(blocks: Patterns, bits: int, codes: Bytes, scales: Bytes) -> int:
    """As ``quantize_bf16``, for F32."""
    return _quantize(blocks, bits, _magnitude_32, F32, 0x7F800000, codes, scales)


@_kernel
def dequantize(codes: Bytes, bits: int, scales: NDArray[np.uint8], out: Floats) -> None:
    """Each code (flat) times its block's scale, to blocks [n, 32]."""
    values = _numbers_of_e2m1()
    for b in range(out.shape[0]):
        step = _from_e8m0(np.uint32(scales[b]))
        row = out[b]
        if bits == FP4:
            _restore(codes[b * (BLOCK // 2) : (b + 1) * (BLOCK // 2)], values, step, row)
        else:
            for k in range(BLOCK):
                row[k] = _from_e4m3(np.uint32(codes[b * BLOCK + k])) * step
