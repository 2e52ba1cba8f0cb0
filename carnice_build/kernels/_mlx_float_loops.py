"""The compiled loops of ``mlx_floats``: numba, one thread, no GIL, cached on disk.

As in ``_nvfp4_loops``, a kernel walks its groups in chunks that stay in the first-level cache, one
loop per step over each chunk, and every float operation is one IEEE single-precision operation.
Where mlx computes in the type of the weight, the result is rounded to that type at once.
"""

from __future__ import annotations

import numpy as np

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
from ._affine_loops import _narrow as _narrow_wide
from ._nvfp4_loops import (
    E2M1_MAX,
    E4M3_MAX,
    Bytes,
    _any_non_finite,
    _from_e2m1,
    _from_e4m3,
    _from_e8m0,
    _join,
    _magnitude_16,
    _magnitude_32,
    _peaks,
    _signed_e4m3,
    _to_e4m3,
)

MXFP4, NVFP4, MXFP8 = 0, 1, 2

CHUNK_VALUES = 4096
"""Values per chunk: 8 kB of BF16 or 16 kB of F32, beside 4 kB of codes."""


@_inlined
def _to_e2m1_down(magnitude: np.float32) -> np.uint32:
    """The code of a magnitude, ties to the smaller; more than 6 becomes 6.

    mlx takes the first of the nearest codes, and they are in the order of magnitudes.  Below 1,
    where codes are halves, two comparisons say it; above, adding all but half of what goes.
    """
    value = magnitude if magnitude < E2M1_MAX else E2M1_MAX
    small = np.uint32(value > np.float32(0.25)) + np.uint32(value > np.float32(0.75))
    normal = ((_bits(value) + np.uint32(0x1FFFFF)) >> np.uint32(22)) - np.uint32(126 << 1)
    return np.uint32(small if value < np.float32(1) else normal)


@_inlined
def _quotient(peak: np.int32, largest: np.float32, kind: int) -> np.float32:
    """A group's largest magnitude over the format's, in the weight's type."""
    return _widen(_narrow_wide(_widen(peak, kind) / largest, kind), kind)


@_inlined
def _powers(
    count: int, kind: int, largest: np.float32, peaks: Keys, scales: Bytes, by: Floats
) -> None:
    """The E8M0 scale of each group, and its inverse: the least power of two that is not below the
    quotient; at least 2**-127, and 1 for a quotient of zero."""
    for g in range(count):
        bits = _bits(_quotient(peaks[g], largest, kind))
        exponent = bits >> np.uint32(23)
        rest = np.uint32(bits & np.uint32(0x7FFFFF))
        # A denormal's exponent is stored as 0 and is -127 for up to half of its range.
        least = np.uint32(0) if exponent > np.uint32(0) else np.uint32(0x400000)
        scale = exponent + np.uint32(rest > least)
        scale = scale if bits > np.uint32(0) else np.uint32(127)
        scales[g] = np.uint8(scale)
        by[g] = _float((np.uint32(254) - np.uint32(scale)) << np.uint32(23))


@_inlined
def _steps(count: int, kind: int, peaks: Keys, scales: Bytes, steps: Floats) -> None:
    """The E4M3 scale of each group, which may be 0, and the step that it stands for."""
    for g in range(count):
        scale = _quotient(peaks[g], E2M1_MAX, kind)
        scale = scale if scale < E4M3_MAX else E4M3_MAX
        code = _to_e4m3(scale)
        scales[g] = np.uint8(code)
        # All weights of a group without a step become 0, as they do over infinity.
        steps[g] = _from_e4m3(code) if code > np.uint32(0) else np.float32(np.inf)


@_inlined
def _signed_e2m1(value: np.float32, magnitude: np.float32) -> np.uint8:
    """mlx knows no negative zero."""
    code = _to_e2m1_down(magnitude)
    sign = np.uint32(8) if value < np.float32(0) else np.uint32(0)
    return np.uint8(code | (sign if code > np.uint32(0) else np.uint32(0)))


@_inlined
def _encode_mxfp4(groups: Patterns, kind: int, by: Floats, codes: Bytes) -> None:
    for g in range(groups.shape[0]):
        group = groups[g]
        row = codes[g]
        factor = by[g]
        for k in range(32):
            value = _widen(group[k], kind)
            row[k] = _signed_e2m1(value, abs(value) * factor)


@_inlined
def _encode_nvfp4(groups: Patterns, kind: int, steps: Floats, codes: Bytes) -> None:
    for g in range(groups.shape[0]):
        group = groups[g]
        row = codes[g]
        step = steps[g]
        for k in range(16):
            value = _widen(group[k], kind)
            units = _widen(_narrow_wide(abs(value) / step, kind), kind)
            row[k] = _signed_e2m1(value, units)


@_inlined
def _encode_mxfp8(groups: Patterns, kind: int, by: Floats, codes: Bytes) -> None:
    for g in range(groups.shape[0]):
        group = groups[g]
        row = codes[g]
        factor = by[g]
        for k in range(32):
            value = _widen(group[k], kind)
            row[k] = _signed_e4m3(value * factor)


@_inlined
def _quantize(
    groups: Patterns, mode: int, kind: int, infinity: int, packed: Bytes, scales: Bytes
) -> int:
    size = groups.shape[1]
    room = CHUNK_VALUES // size
    codes = np.empty((room, size), np.uint8)
    flat = codes.reshape(-1)
    pairs = flat.view(np.uint16)
    peaks = np.empty(room, np.int32)
    steps = np.empty(room, np.float32)
    for first in range(0, groups.shape[0], room):
        chunk = groups[first : first + room]
        count = chunk.shape[0]
        if kind == F32:
            _peaks(chunk, _magnitude_32, peaks)
        else:
            _peaks(chunk, _magnitude_16, peaks)
        if _any_non_finite(count, infinity, peaks):
            return first
        own = scales[first : first + count]
        if mode == MXFP8:
            _powers(count, kind, E4M3_MAX, peaks, own, steps)
            _encode_mxfp8(chunk, kind, steps, codes)
            packed[first * size : (first + count) * size] = flat[: count * size]
            continue
        if mode == MXFP4:
            _powers(count, kind, E2M1_MAX, peaks, own, steps)
            _encode_mxfp4(chunk, kind, steps, codes)
        else:
            _steps(count, kind, peaks, own, steps)
            _encode_nvfp4(chunk, kind, steps, codes)
        _join(pairs, packed[first * size // 2 : (first + count) * size // 2])
    return -1


@_kernel
def quantize_bf16(groups: Patterns, mode: int, packed: Bytes, scales: Bytes) -> int:
    """Quantize groups [n, group size of ``mode``] into flat outputs; -1, or the first group of the
    chunk that holds a NaN or an Inf."""
    return _quantize(groups, mode, BF16, 0x7F80, packed, scales)


@_kernel
def quantize_f16(groups: Patterns, mode: int, packed: Bytes, scales: Bytes) -> int:
    """As ``quantize_bf16``, for F16."""
    return _quantize(groups, mode, F16, 0x7C00, packed, scales)


@_kernel
def quantize_f32(groups: Patterns, mode: int, packed: Bytes, scales: Bytes) -> int:
    """As ``quantize_bf16``, for F32."""
    return _quantize(groups, mode, F32, 0x7F800000, packed, scales)


@_kernel
def dequantize(codes: Bytes, scales: Bytes, mode: int, out: Floats) -> None:
    """Each code (flat) times its group's scale, to groups [n, group size of ``mode``]."""
    table = np.empty(256, np.float32)
    numbers = np.empty(256, np.float32)
    for code in range(256):
        numbers[code] = _from_e4m3(np.uint32(code))
    for code in range(8):
        table[code] = _from_e2m1(np.uint32(code))
        table[code + 8] = -table[code]
    for g in range(out.shape[0]):
        row = out[g]
        step = numbers[scales[g]] if mode == NVFP4 else _from_e8m0(np.uint32(scales[g]))
        if mode == MXFP8:
            for k in range(32):
                row[k] = numbers[codes[g * 32 + k]] * step
        else:
            half = row.size // 2
            for k in range(half):
                pair = codes[g * half + k]
                row[2 * k] = table[pair & 0xF] * step
                row[2 * k + 1] = table[pair >> 4] * step
