"""The compiled loops of ``modelopt_fp8``: numba, one thread, no GIL, cached on disk.

Every float operation is one IEEE single-precision operation, in the order modelopt has them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ._affine_loops import (
    BF16,
    F16,
    F32,
    Floats,
    Patterns,
    _bits,
    _float,
    _inlined,
    _kernel,
    _widen,
)
from ._compressed_loops import _round_to
from ._nvfp4_loops import (
    Bytes,
    _from_e4m3,
    _from_e8m0,
    _magnitude_16,
    _magnitude_32,
    _peaks,
    _signed_e4m3,
)

BLOCK = 32
"""Values that share a scale in MXFP8."""

CHUNK_BLOCKS = 128
"""Blocks per chunk: 8 kB of BF16 or 16 kB of F32."""

_LARGEST_MANTISSA = np.uint32(0x600000)
"""That of 448, which is 1.75 * 2**8, in float32."""


@_inlined
def _quantize(values: Patterns, scale: np.float32, kind: int, codes: Bytes) -> None:
    """The quotient is rounded to the type of the weight: so torch divides by a scalar."""
    for i in range(values.size):
        codes[i] = _signed_e4m3(_round_to(_widen(values[i], kind) / scale, kind))


@_kernel
def quantize_bf16(values: Patterns, scale: np.float32, codes: Bytes) -> None:
    """Quantize finite values (flat) under one scale."""
    _quantize(values, scale, BF16, codes)


@_kernel
def quantize_f16(values: Patterns, scale: np.float32, codes: Bytes) -> None:
    """As ``quantize_bf16``, for F16."""
    _quantize(values, scale, F16, codes)


@_kernel
def quantize_f32(values: Patterns, scale: np.float32, codes: Bytes) -> None:
    """As ``quantize_bf16``, for F32."""
    _quantize(values, scale, F32, codes)


@_kernel
def dequantize(codes: Bytes, scale: np.float32, out: Floats) -> None:
    """Write code * scale (flat), in float32."""
    for i in range(codes.size):
        out[i] = _from_e4m3(np.uint32(codes[i])) * scale


@_inlined
def _exponent(peak: np.float32) -> np.uint32:
    """The exponent, with a bias of 127, of the least power of two that 448 times it reaches a
    block's largest magnitude; 0 where that is less than 2**-127."""
    bits = _bits(peak)
    more = np.uint32(1 if (bits & np.uint32(0x7FFFFF)) > _LARGEST_MANTISSA else 0)
    field = (bits >> np.uint32(23)) + more
    return np.uint32(field - np.uint32(8) if field > np.uint32(8) else np.uint32(0))


@_inlined
def _quantize_blocks(
    blocks: Patterns,
    magnitude: Callable[[Any], Any],
    kind: int,
    infinity: int,
    codes: Bytes,
    scales: Bytes,
) -> int:
    peaks = np.empty(CHUNK_BLOCKS, np.int32)
    for first in range(0, blocks.shape[0], CHUNK_BLOCKS):
        chunk = blocks[first : first + CHUNK_BLOCKS]
        _peaks(chunk, magnitude, peaks)
        for b in range(chunk.shape[0]):
            if peaks[b] >= infinity:
                return first + b
            exponent = _exponent(_widen(peaks[b], kind))
            scales[first + b] = np.uint8(exponent)
            # Always a normal number, for exponents end at 247.
            inverse = _float(np.uint32(254 - exponent) << np.uint32(23))
            row, block = codes[first + b], chunk[b]
            for k in range(BLOCK):
                row[k] = _signed_e4m3(_widen(block[k], kind) * inverse)
    return -1


@_kernel
def quantize_blocks_bf16(blocks: Patterns, codes: Bytes, scales: Bytes) -> int:
    """Quantize blocks [n, 32]; -1, or the first block that holds a NaN or an Inf."""
    return _quantize_blocks(blocks, _magnitude_16, BF16, 0x7F80, codes, scales)


@_kernel
def quantize_blocks_f16(blocks: Patterns, codes: Bytes, scales: Bytes) -> int:
    """As ``quantize_blocks_bf16``, for F16."""
    return _quantize_blocks(blocks, _magnitude_16, F16, 0x7C00, codes, scales)


@_kernel
def quantize_blocks_f32(blocks: Patterns, codes: Bytes, scales: Bytes) -> int:
    """As ``quantize_blocks_bf16``, for F32."""
    return _quantize_blocks(blocks, _magnitude_32, F32, 0x7F800000, codes, scales)


@_kernel
def dequantize_blocks(codes: Bytes, scales: Bytes, out: Floats) -> None:
    """Each code of ``codes`` [n, 32] times its block's power of two, in float32."""
    for b in range(codes.shape[0]):
        step = _from_e8m0(np.uint32(scales[b]))
        for k in range(BLOCK):
            out[b, k] = _from_e4m3(np.uint32(codes[b, k])) * step
