"""The compiled loops of ``nvfp4``: numba, one thread, no GIL, cached on disk.

A kernel walks its blocks of 16 values in chunks that stay in the first-level cache, and runs
one loop per step over each chunk, so that each of them vectorizes. Every float operation is one
IEEE single-precision operation, in the order modelopt has them; there are no fast-math flags.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._affine_loops import (
    BF16,
    F16,
    F32,
    Floats,
    Keys,
    Patterns,
    _bits,
    _float,
    _inlined,
    _kernel,
    _widen,
)

Bytes = NDArray[np.uint8]

BLOCK = 16
"""Values that share a scale."""

CHUNK_BLOCKS = 256
"""Blocks per chunk: 8 kB of BF16 or 16 kB of F32, beside 4 kB of codes."""

E2M1_MAX = np.float32(6)
E4M3_MIN = np.float32(2.0**-9)
E4M3_MAX = np.float32(448)

SMALLEST_STEP = np.float32(1e-5)
"""Below it, ``round_blocks`` takes the step of a block for 1."""


@_inlined
def _narrow(value: np.float32, mantissa: int, bias: int) -> np.uint32:
    """The nearest value of a small float format, ties to even, as a bit pattern.

    ``value`` is not negative and at most the largest of the format. Adding 2**23 steps leaves
    the result of a denormal in the lowest bits; for the others the bits that go carry as they
    round, and the exponent is rebased.
    """
    gone = 23 - mantissa
    shift = np.float32(2.0 ** (gone + 1 - bias))
    bits = _bits(value)
    odd = (bits >> np.uint32(gone)) & np.uint32(1)
    rounded = np.uint32(bits + np.uint32((1 << (gone - 1)) - 1) + odd) >> np.uint32(gone)
    normal = np.uint32(rounded) - np.uint32((127 - bias) << mantissa)
    denormal = _bits(value + shift) - _bits(shift)
    return np.uint32(denormal if value < np.float32(2.0 ** (1 - bias)) else normal)


@_inlined
def _to_e2m1(value: np.float32) -> np.uint32:
    """The 4-bit code of a quotient; more than 6, Inf and NaN become 6, and only a number below
    zero gets a sign."""
    magnitude = abs(value)
    magnitude = magnitude if magnitude < E2M1_MAX else E2M1_MAX
    sign = np.uint32(8) if value < np.float32(0) else np.uint32(0)
    return np.uint32(_narrow(magnitude, 1, 1) | sign)


@_inlined
def _from_e2m1(code: np.uint32) -> np.float32:
    """The magnitude of a code, its sign bit unused: 0, 0.5, 1, 1.5, 2, 3, 4 or 6."""
    magnitude = np.uint32(code) & np.uint32(7)
    normal = _float((magnitude + np.uint32(126 << 1)) << np.uint32(22))
    denormal = np.float32(magnitude) * np.float32(0.5)
    return np.float32(denormal if magnitude < np.uint32(2) else normal)


@_inlined
def _numbers_of_e2m1() -> Floats:
    """By a code of 4 bits, its number; negative zero is zero."""
    values = np.empty(16, np.float32)
    for code in range(8):
        values[code] = _from_e2m1(np.uint32(code))
        values[code + 8] = np.float32(0) - values[code]
    return values


@_inlined
def _restore(pairs: Bytes, values: Floats, step: np.float32, out: Floats) -> None:
    """The numbers of pairs of codes times a block's step."""
    for k in range(pairs.size):
        out[2 * k] = values[pairs[k] & 0xF] * step
        out[2 * k + 1] = values[pairs[k] >> 4] * step


@_inlined
def _to_e4m3(value: np.float32) -> np.uint32:
    return _narrow(value, 3, 7)


@_inlined
def _from_e4m3(code: np.uint32) -> np.float32:
    magnitude = np.uint32(code) & np.uint32(0x7F)
    normal = _float((magnitude + np.uint32(120 << 3)) << np.uint32(20))
    denormal = np.float32(magnitude) * E4M3_MIN
    value = denormal if magnitude < np.uint32(8) else normal
    value = value if magnitude < np.uint32(0x7F) else np.float32(np.nan)
    return np.float32(value if np.uint32(code) < np.uint32(0x80) else -value)


@_inlined
def _signed_e4m3(quotient: np.float32) -> np.uint8:
    """The bits of E4M3 nearest to a quotient, which keeps its sign where it becomes zero."""
    magnitude = abs(quotient)
    magnitude = magnitude if magnitude < E4M3_MAX else E4M3_MAX
    sign = (_bits(quotient) >> np.uint32(24)) & np.uint32(0x80)
    return np.uint8(_to_e4m3(magnitude) | sign)


@_inlined
def _from_e8m0(exponent: np.uint32) -> np.float32:
    """2 ** (exponent - 127), where 0 stands for a denormal."""
    normal = np.uint32(exponent) << np.uint32(23)
    return _float(normal if exponent > np.uint32(0) else np.uint32(1 << 22))


@_inlined
def _magnitude_16(pattern: np.uint16) -> np.int16:
    """The float without its sign, as an integer that orders as the magnitude does."""
    return np.int16(pattern & np.uint16(0x7FFF))


@_inlined
def _magnitude_32(pattern: np.uint32) -> np.int32:
    return np.int32(pattern & np.uint32(0x7FFFFFFF))


@_inlined
def _peaks(blocks: Patterns, magnitude: Callable[[Any], Any], peaks: Keys) -> None:
    """The largest magnitude of every block, as ``magnitude`` gives it.

    The bound of the inner loop is not the constant that it could be: LLVM then unrolls it
    before it could vectorize the maximum.
    """
    for b in range(blocks.shape[0]):
        block = blocks[b]
        peak = magnitude(block[0])
        for k in range(blocks.shape[1]):
            peak = max(peak, magnitude(block[k]))
        peaks[b] = peak


@_inlined
def _any_non_finite(count: int, infinity: int, peaks: Keys) -> bool:
    """Whether a block reaches the pattern of Inf; those of NaN lie beyond."""
    found = False
    for b in range(count):
        found |= peaks[b] >= infinity
    return found


@_inlined
def _scales(
    count: int, kind: int, scale_2: np.float32, peaks: Keys, scales: Bytes, steps: Floats
) -> None:
    """The E4M3 scale of each block, and the step that one unit of E2M1 stands for.

    A quotient of zero, from a block of zeros or by underflow, gives the scale 1.
    """
    divisor = E2M1_MAX * scale_2
    for b in range(count):
        scale = _widen(peaks[b], kind) / divisor
        scale = scale if scale != np.float32(0) else np.float32(1)
        scale = scale if scale > E4M3_MIN else E4M3_MIN
        scale = scale if scale < E4M3_MAX else E4M3_MAX
        code = _to_e4m3(scale)
        scales[b] = np.uint8(code)
        steps[b] = _from_e4m3(code) * scale_2


@_inlined
def _encode(blocks: Patterns, kind: int, steps: Floats, codes: NDArray[np.uint8]) -> None:
    for b in range(blocks.shape[0]):
        block = blocks[b]
        row = codes[b]
        step = steps[b]
        for k in range(BLOCK):
            row[k] = np.uint8(_to_e2m1(_widen(block[k], kind) / step))


@_inlined
def _join(pairs: NDArray[np.uint16], out: Bytes) -> None:
    """Two codes of 4 bits to a byte, the first one lowest; each has a byte of ``pairs``."""
    for i in range(out.size):
        out[i] = np.uint8(pairs[i] | (pairs[i] >> np.uint16(4)))


@_inlined
def _quantize(
    blocks: Patterns,
    whole: np.float32,
    scales_of: Callable[..., None],
    kind: int,
    infinity: int,
    packed: Bytes,
    scales: Bytes,
) -> int:
    """``scales_of`` finds the scales of blocks under ``whole``, that of the tensor."""
    codes = np.empty((CHUNK_BLOCKS, BLOCK), np.uint8)
    pairs = codes.reshape(-1).view(np.uint16)
    peaks = np.empty(CHUNK_BLOCKS, np.int32)
    steps = np.empty(CHUNK_BLOCKS, np.float32)
    for first in range(0, blocks.shape[0], CHUNK_BLOCKS):
        chunk = blocks[first : first + CHUNK_BLOCKS]
        count = chunk.shape[0]
        if kind == F32:
            _peaks(chunk, _magnitude_32, peaks)
        else:
            _peaks(chunk, _magnitude_16, peaks)
        if _any_non_finite(count, infinity, peaks):
            return first
        scales_of(count, kind, whole, peaks, scales[first : first + count], steps)
        _encode(chunk, kind, steps, codes)
        _join(pairs, packed[first * BLOCK // 2 : (first + count) * BLOCK // 2])
    return -1


@_kernel
def quantize_bf16(blocks: Patterns, scale_2: np.float32, packed: Bytes, scales: Bytes) -> int:
    """Quantize blocks [n, 16] into flat outputs; -1, or the first block of the chunk that holds
    a NaN or an Inf."""
    return _quantize(blocks, scale_2, _scales, BF16, 0x7F80, packed, scales)


@_kernel
def quantize_f16(blocks: Patterns, scale_2: np.float32, packed: Bytes, scales: Bytes) -> int:
    """As ``quantize_bf16``, for F16."""
    return _quantize(blocks, scale_2, _scales, F16, 0x7C00, packed, scales)


@_kernel
def quantize_f32(blocks: Patterns, scale_2: np.float32, packed: Bytes, scales: Bytes) -> int:
    """As ``quantize_bf16``, for F32."""
    return _quantize(blocks, scale_2, _scales, F32, 0x7F800000, packed, scales)


@_kernel
def peak_16(patterns: Patterns) -> int:
    """The largest magnitude of BF16 or F16 patterns (flat), as a pattern."""
    peak = np.int16(0)
    for i in range(patterns.size):
        peak = max(peak, _magnitude_16(patterns[i]))
    return int(peak)


@_kernel
def peak_32(patterns: Patterns) -> int:
    """As ``peak_16``, for F32."""
    peak = np.int32(0)
    for i in range(patterns.size):
        peak = max(peak, _magnitude_32(patterns[i]))
    return int(peak)


@_kernel
def dequantize(packed: Bytes, scales: Bytes, scale_2: np.float32, out: Floats) -> None:
    """Each code of ``packed`` [n, 8] times its block's step, to blocks [n, 16]."""
    values = _numbers_of_e2m1()
    for b in range(out.shape[0]):
        step = _from_e4m3(np.uint32(scales[b])) * scale_2
        _restore(packed[b], values, step, out[b])


@_kernel
def round_blocks(blocks: Patterns, scale_2: np.float32, out: Floats) -> int:
    """Blocks [n, 16] of F32 patterns to the nearest values that NVFP4 has for them; -1, or the
    first block of the chunk that holds a NaN or an Inf."""
    divisor = E2M1_MAX * scale_2
    peaks = np.empty(CHUNK_BLOCKS, np.int32)
    for first in range(0, blocks.shape[0], CHUNK_BLOCKS):
        chunk = blocks[first : first + CHUNK_BLOCKS]
        _peaks(chunk, _magnitude_32, peaks)
        if _any_non_finite(chunk.shape[0], 0x7F800000, peaks):
            return first
        for b in range(chunk.shape[0]):
            scale = _widen(peaks[b], F32) / divisor
            scale = scale if scale < E4M3_MAX else E4M3_MAX
            step = _from_e4m3(_to_e4m3(scale)) * scale_2
            step = step if step >= SMALLEST_STEP else np.float32(1)
            block = chunk[b]
            row = out[first + b]
            for k in range(BLOCK):
                source = _widen(block[k], F32)
                value = _from_e2m1(_to_e2m1(source / step)) * step
                row[k] = value if source >= np.float32(0) else np.float32(0) - value
    return -1
