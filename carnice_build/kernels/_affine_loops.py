"""The compiled loops of ``affine``: numba, one thread, no GIL, cached on disk.

A kernel walks its groups in chunks that stay in the first-level cache, and runs four loops
over each chunk: extremes, parameters, codes, packing. Apart, each of them vectorizes; in one
loop the latency of a group's three dependent divisions would stand between two groups.

There is one kernel per float format, and nothing else is specialised, so that a build loads
one or two from disk. The helpers are inlined into it, where ``kind`` and the packers' ``bits``
become constants. There are no fast-math flags here: every float operation is one IEEE
single-precision operation, in the order mlx has them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint32]
Floats = NDArray[np.float32]
Keys = NDArray[np.int32]
Patterns = NDArray[Any]
"""Floats as unsigned integers: uint16 for BF16 and F16, uint32 for F32."""

Function = TypeVar("Function", bound=Callable[..., Any])

BF16, F16, F32 = 0, 1, 2

CHUNK_CODES = 4096
"""Values per chunk: 8 kB of BF16 or 16 kB of F32, beside 4 kB of codes."""

SMALLEST_SCALE = np.float32(1e-7)
TWO_TO_23 = np.float32(2.0**23)


def _inlined(function: Function) -> Function:
    """Compile as a part of every kernel that calls it."""
    compiled = numba.njit(nogil=True, error_model="numpy", forceinline=True)(function)
    return cast(Function, compiled)


def _kernel(function: Function) -> Function:
    """Compile on first call, and keep the machine code on disk.

    Where numba may write neither beside this file nor in the home folder, every process compiles
    for itself.
    """
    try:
        compiled = numba.njit(nogil=True, error_model="numpy", cache=True)(function)
    except RuntimeError:
        compiled = numba.njit(nogil=True, error_model="numpy")(function)
    return cast(Function, compiled)


@_inlined
def _float(bits: np.uint32) -> np.float32:
    return np.uint32(bits).view(np.float32)


@_inlined
def _bits(value: np.float32) -> np.uint32:
    return np.float32(value).view(np.uint32)


@_inlined
def _widen(pattern: Any, kind: int) -> np.float32:
    """The float32 of the same value. Times 2**112 moves F16's exponent to float32's, and
    makes its denormals normal; it is exact."""
    bits = np.uint32(pattern)
    if kind == BF16:
        return _float(bits << np.uint32(16))
    if kind == F16:
        magnitude = _float((bits & np.uint32(0x7FFF)) << np.uint32(13)) * np.float32(2.0**112)
        return _float(_bits(magnitude) | ((bits & np.uint32(0x8000)) << np.uint32(16)))
    return _float(bits)


@_inlined
def _f16_bits(bits: np.uint32) -> np.uint32:
    """F16 nearest to a float32 that is not NaN, ties to even, both as bit patterns.

    Adding 0.5 leaves the result of a denormal in the lowest bits, in units of 2**-24. For the
    others the exponent is rebased by 112, and the 13 bits that go carry as they round.
    """
    sign = (bits >> np.uint32(16)) & np.uint32(0x8000)
    magnitude = np.uint32(bits & np.uint32(0x7FFFFFFF))
    denormal = _bits(_float(magnitude) + np.float32(0.5)) - np.uint32(0x3F000000)
    odd = (magnitude >> np.uint32(13)) & np.uint32(1)
    rebased = magnitude - np.uint32(112 << 23) + np.uint32(0xFFF) + odd
    result = np.uint32(rebased) >> np.uint32(13)
    if magnitude < np.uint32(113 << 23):
        result = denormal
    if magnitude >= np.uint32(143 << 23):
        result = np.uint32(0x7C00)
    return np.uint32(sign | result)


@_inlined
def _narrow(value: np.float32, kind: int) -> np.uint32:
    """The nearest value of the format, ties to even, as a bit pattern."""
    bits = _bits(value)
    if kind == BF16:
        odd = (bits >> np.uint32(16)) & np.uint32(1)
        return np.uint32((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16))
    if kind == F16:
        return _f16_bits(bits)
    return np.uint32(bits)


@_inlined
def _key_16(pattern: np.uint16) -> np.int16:
    """An integer that orders as the float does, in as few bits as the float has: a vector
    register then compares twice as many 16-bit floats as it could after widening them."""
    key = np.int16(pattern)
    return np.int16(key ^ ((key >> np.int16(15)) & np.int16(0x7FFF)))


@_inlined
def _key_32(pattern: np.uint32) -> np.int32:
    """As ``_key_16``, for F32."""
    key = np.int32(pattern)
    return np.int32(key ^ ((key >> np.int32(31)) & np.int32(0x7FFFFFFF)))


@_inlined
def _from_key(key: np.int32, kind: int) -> np.float32:
    if kind == F32:
        return _widen(key ^ ((key >> 31) & 0x7FFFFFFF), kind)
    return _widen((key ^ ((key >> 31) & 0x7FFF)) & 0xFFFF, kind)


@_inlined
def _extremes(groups: Patterns, key_of: Callable[[Any], Any], lows: Keys, highs: Keys) -> None:
    """The keys of the least and the greatest value of every group."""
    for g in range(groups.shape[0]):
        group = groups[g]
        low = key_of(group[0])
        high = low
        for k in range(groups.shape[1]):
            key = key_of(group[k])
            low = min(low, key)
            high = max(high, key)
        lows[g] = low
        highs[g] = high


@_inlined
def _parameters(
    count: int, top: np.float32, kind: int, lows: Keys, highs: Keys, scales: Floats, biases: Floats
) -> None:
    """Scale and bias of each group, in float32.

    The scale spans the group in ``top`` steps, is at least 1e-7, and is negative unless the
    low end is the larger in magnitude. The end of larger magnitude, ``edge``, becomes the bias,
    and the scale is then stretched so that zero falls on a step, ``zero`` steps from the edge;
    a group whose edge rounds to no step at all gets bias 0.
    """
    for g in range(count):
        low = _from_key(lows[g], kind)
        high = _from_key(highs[g], kind)
        below = abs(low) > abs(high)
        span = (high - low) / top
        span = span if span > SMALLEST_SCALE else SMALLEST_SCALE
        span = span if below else -span
        edge = low if below else high
        zero = np.rint(edge / span)
        steps = zero if zero != np.float32(0) else np.float32(1)
        scales[g] = edge / steps if zero != np.float32(0) else span
        biases[g] = edge if zero != np.float32(0) else np.float32(0)


@_inlined
def _encode(
    groups: Patterns,
    top: np.float32,
    kind: int,
    scales: Floats,
    biases: Floats,
    codes: NDArray[np.uint8],
) -> None:
    """Each value's step number, clipped to 0..top, as one byte.

    Clipping before rounding gives what clipping after it gives, since both ends are integers.
    Adding 2**23 then rounds to an integer, ties to even, and leaves it in the lowest bits.
    """
    for g in range(groups.shape[0]):
        group = groups[g]
        row = codes[g]
        scale = scales[g]
        bias = biases[g]
        for k in range(groups.shape[1]):
            step = (_widen(group[k], kind) - bias) / scale
            step = step if step > np.float32(0) else np.float32(0)
            step = step if step < top else top
            row[k] = np.uint8(_bits(step + TWO_TO_23))


@_inlined
def _squeeze(codes: np.uint64, bits: int) -> np.uint64:
    """Eight codes of one byte each, as the lowest 8 * bits bits: neighbours close up to
    pairs, pairs to fours, fours to eight."""
    gap = 8 - bits
    one = ((1 << bits) - 1) * 0x0001000100010001
    two = ((1 << 2 * bits) - 1) * 0x0000000100000001
    four = (1 << 4 * bits) - 1
    x = codes
    x = (x & np.uint64(one)) | ((x >> np.uint64(gap)) & np.uint64(one << bits))
    x = (x & np.uint64(two)) | ((x >> np.uint64(2 * gap)) & np.uint64(two << 2 * bits))
    return (x & np.uint64(four)) | ((x >> np.uint64(4 * gap)) & np.uint64(four << 4 * bits))


@_inlined
def _pack_2(eights: NDArray[np.uint64], out: Words) -> None:
    for i in range(out.size):
        a = _squeeze(eights[2 * i], 2)
        b = _squeeze(eights[2 * i + 1], 2)
        out[i] = np.uint32(a | (b << np.uint64(16)))


@_inlined
def _pack_3(eights: NDArray[np.uint64], out: Words) -> None:
    for i in range(out.size // 3):
        a = _squeeze(eights[4 * i], 3)
        b = _squeeze(eights[4 * i + 1], 3)
        c = _squeeze(eights[4 * i + 2], 3)
        d = _squeeze(eights[4 * i + 3], 3)
        out[3 * i] = np.uint32(a | (b << np.uint64(24)))
        out[3 * i + 1] = np.uint32((b >> np.uint64(8)) | (c << np.uint64(16)))
        out[3 * i + 2] = np.uint32((c >> np.uint64(16)) | (d << np.uint64(8)))


@_inlined
def _pack_4(eights: NDArray[np.uint64], out: Words) -> None:
    for i in range(out.size):
        out[i] = np.uint32(_squeeze(eights[i], 4))


@_inlined
def _pack_5(eights: NDArray[np.uint64], out: Words) -> None:
    for i in range(out.size // 5):
        a = _squeeze(eights[4 * i], 5)
        b = _squeeze(eights[4 * i + 1], 5)
        c = _squeeze(eights[4 * i + 2], 5)
        d = _squeeze(eights[4 * i + 3], 5)
        out[5 * i] = np.uint32(a)
        out[5 * i + 1] = np.uint32((a >> np.uint64(32)) | (b << np.uint64(8)))
        out[5 * i + 2] = np.uint32((b >> np.uint64(24)) | (c << np.uint64(16)))
        out[5 * i + 3] = np.uint32((c >> np.uint64(16)) | (d << np.uint64(24)))
        out[5 * i + 4] = np.uint32(d >> np.uint64(8))


@_inlined
def _pack_6(eights: NDArray[np.uint64], out: Words) -> None:
    for i in range(out.size // 3):
        a = _squeeze(eights[2 * i], 6)
        b = _squeeze(eights[2 * i + 1], 6)
        out[3 * i] = np.uint32(a)
        out[3 * i + 1] = np.uint32((a >> np.uint64(32)) | (b << np.uint64(16)))
        out[3 * i + 2] = np.uint32(b >> np.uint64(16))


@_inlined
def _pack_8(eights: NDArray[np.uint64], out: Words) -> None:
    for i in range(out.size // 2):
        out[2 * i] = np.uint32(eights[i])
        out[2 * i + 1] = np.uint32(eights[i] >> np.uint64(32))


@_inlined
def _pack(eights: NDArray[np.uint64], bits: int, out: Words) -> None:
    """The codes as one stream of bits, the first code lowest, in little-endian words."""
    if bits == 2:
        _pack_2(eights, out)
    elif bits == 3:
        _pack_3(eights, out)
    elif bits == 4:
        _pack_4(eights, out)
    elif bits == 5:
        _pack_5(eights, out)
    elif bits == 6:
        _pack_6(eights, out)
    else:
        _pack_8(eights, out)


@_inlined
def _any_non_finite(count: int, infinity: int, lows: Keys, highs: Keys) -> bool:
    """Whether a group reaches the key of Inf or that of -Inf; the keys of NaN lie beyond."""
    found = False
    for g in range(count):
        found |= (highs[g] >= infinity) | (lows[g] <= -infinity - 1)
    return found


@_inlined
def _quantize(
    groups: Patterns,
    bits: int,
    kind: int,
    infinity: int,
    packed: Words,
    scales: Patterns,
    biases: Patterns,
) -> int:
    group_size = groups.shape[1]
    room = CHUNK_CODES // group_size
    words = group_size * bits // 32
    top = np.float32((1 << bits) - 1)
    codes = np.empty((room, group_size), np.uint8)
    eights = codes.reshape(-1).view(np.uint64)
    lows = np.empty(room, np.int32)
    highs = np.empty(room, np.int32)
    wide_scales = np.empty(room, np.float32)
    wide_biases = np.empty(room, np.float32)
    for first in range(0, groups.shape[0], room):
        chunk = groups[first : first + room]
        count = chunk.shape[0]
        if kind == F32:
            _extremes(chunk, _key_32, lows, highs)
        else:
            _extremes(chunk, _key_16, lows, highs)
        if _any_non_finite(count, infinity, lows, highs):
            return first
        _parameters(count, top, kind, lows, highs, wide_scales, wide_biases)
        _encode(chunk, top, kind, wide_scales, wide_biases, codes)
        _pack(eights, bits, packed[first * words : (first + count) * words])
        for g in range(count):
            scales[first + g] = _narrow(wide_scales[g], kind)
            biases[first + g] = _narrow(wide_biases[g], kind)
    return -1


@_kernel
def quantize_bf16(
    groups: Patterns, bits: int, packed: Words, scales: Patterns, biases: Patterns
) -> int:
    """Quantize groups [n, group_size] into flat outputs; -1, or the first group of the chunk
    that holds a NaN or an Inf."""
    return _quantize(groups, bits, BF16, 0x7F80, packed, scales, biases)


@_kernel
def quantize_f16(
    groups: Patterns, bits: int, packed: Words, scales: Patterns, biases: Patterns
) -> int:
    """As ``quantize_bf16``, for F16."""
    return _quantize(groups, bits, F16, 0x7C00, packed, scales, biases)


@_kernel
def quantize_f32(
    groups: Patterns, bits: int, packed: Words, scales: Patterns, biases: Patterns
) -> int:
    """As ``quantize_bf16``, for F32."""
    return _quantize(groups, bits, F32, 0x7F800000, packed, scales, biases)


@_kernel
def dequantize(packed: Words, scales: Floats, biases: Floats, bits: int, out: Floats) -> None:
    """Each code of ``packed`` (flat) times its group's scale plus its bias, each rounded."""
    mask = np.uint64((1 << bits) - 1)
    held = np.uint64(0)
    holding = 0
    word = 0
    for g in range(out.shape[0]):
        group = out[g]
        for k in range(out.shape[1]):
            if holding < bits:
                held |= np.uint64(packed[word]) << np.uint64(holding)
                holding += 32
                word += 1
            group[k] = np.float32(held & mask) * scales[g] + biases[g]
            held >>= np.uint64(bits)
            holding -= bits
