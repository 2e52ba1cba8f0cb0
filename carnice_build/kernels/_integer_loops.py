"""The compiled loops of ``integers``: numba, one thread, no GIL, cached on disk.

torch computes in the weight's dtype, one operation at a time, as in ``_compressed_loops``.
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
    TWO_TO_23,
    Floats,
    Patterns,
    _bits,
    _from_key,
    _inlined,
    _kernel,
    _key_16,
    _key_32,
    _narrow,
    _squeeze,
    _widen,
)
from ._compressed_loops import ZeroPoints, _eps, _round_to
from ._nvfp4_loops import Bytes, _magnitude_16, _magnitude_32

EIGHT = 8
"""Codes that are squeezed at once; together they take as many bytes as each has bits."""


@_inlined
def _clip(code: np.float32, half: np.float32) -> np.float32:
    """Within the codes, of which there are ``half`` below zero."""
    code = code if code > -half else -half
    return code if code < half - np.float32(1) else half - np.float32(1)


@_inlined
def _scale(peak: np.float32, half: np.float32, kind: int) -> np.float32:
    """That of symmetric codes: the largest magnitude over half the steps."""
    scale = _round_to(peak / (half - np.float32(0.5)), kind)
    return scale if scale != np.float32(0) else _eps(kind)


@_inlined
def _scale_and_zero(
    low: np.float32, high: np.float32, half: np.float32, kind: int
) -> tuple[np.float32, np.float32]:
    """The length of a step from the low end to the high one, 0 always between them, and the code
    of 0."""
    low = low if low < np.float32(0) else np.float32(0)
    high = high if high > np.float32(0) else np.float32(0)
    steps = np.float32(2) * half - np.float32(1)
    scale = _round_to(_round_to(high - low, kind) / steps, kind)
    zero = _round_to(-half - _round_to(low / scale, kind), kind)
    # A group of zeros, whose 0 / 0 is NaN, has its zero at code 0.
    zero = np.float32(0) if zero != zero else np.rint(_clip(zero, half))
    return (scale if scale != np.float32(0) else _eps(kind)), zero


@_inlined
def _scales(
    groups: Patterns,
    magnitude: Callable[[Any], Any],
    kind: int,
    infinity: int,
    half: np.float32,
    scales: Floats,
) -> bool:
    """The scale of each group; False where one holds a NaN or an Inf."""
    finite = True
    for g in range(groups.shape[0]):
        group = groups[g]
        peak = magnitude(group[0])
        for k in range(groups.shape[1]):
            peak = max(peak, magnitude(group[k]))
        finite &= peak < infinity
        scales[g] = _scale(_widen(peak, kind), half, kind)
    return finite


@_inlined
def _scales_and_zeros(
    groups: Patterns,
    key_of: Callable[[Any], Any],
    kind: int,
    infinity: int,
    half: np.float32,
    scales: Floats,
    zeros: Floats,
) -> bool:
    """Scale and zero point of each group from its extremes; False where one holds a NaN or an
    Inf."""
    finite = True
    for g in range(groups.shape[0]):
        group = groups[g]
        least = key_of(group[0])
        most = least
        for k in range(groups.shape[1]):
            key = key_of(group[k])
            least = min(least, key)
            most = max(most, key)
        finite &= (most < infinity) & (least > -infinity - 1)
        low, high = _from_key(least, kind), _from_key(most, kind)
        scales[g], zeros[g] = _scale_and_zero(low, high, half, kind)
    return finite


@_inlined
def _parameters(
    groups: Patterns,
    symmetric: bool,
    kind: int,
    infinity: int,
    half: np.float32,
    scales: Floats,
    zeros: Floats,
) -> bool:
    """Scale and zero point of each group; False where one holds a NaN or an Inf."""
    if symmetric:
        if kind == F32:
            return _scales(groups, _magnitude_32, kind, infinity, half, scales)
        return _scales(groups, _magnitude_16, kind, infinity, half, scales)
    if kind == F32:
        return _scales_and_zeros(groups, _key_32, kind, infinity, half, scales, zeros)
    return _scales_and_zeros(groups, _key_16, kind, infinity, half, scales, zeros)


@_inlined
def _take(
    scales: Patterns,
    zero_points: ZeroPoints,
    row: int,
    symmetric: bool,
    kind: int,
    wide_scales: Floats,
    zeros: Floats,
) -> None:
    """The scales and zero points that are given for a row."""
    for g in range(scales.size):
        wide_scales[g] = _widen(scales[g], kind)
        if not symmetric:
            zeros[g] = np.float32(zero_points[row, g])


@_inlined
def _all_finite(row: Patterns, infinity: int) -> bool:
    finite = True
    for k in range(row.size):
        finite &= (np.int32(row[k]) & infinity) != infinity
    return finite


@_inlined
def _encode(
    groups: Patterns, kind: int, half: np.float32, scales: Floats, zeros: Floats, codes: Bytes
) -> None:
    """Codes plus ``half``, one a byte.  Clipping before rounding gives what clipping after it
    gives, since both ends are integers; adding 2**23 rounds to an integer, ties to even, and
    ``half``, which is even, keeps the parity."""
    size = groups.shape[1]
    for g in range(groups.shape[0]):
        group = groups[g]
        row = codes[g * size : (g + 1) * size]
        scale, zero = scales[g], zeros[g]
        for k in range(size):
            quotient = _round_to(_widen(group[k], kind) / scale, kind)
            code = _clip(_round_to(quotient + zero, kind), half)
            row[k] = np.uint8(_bits(code + (TWO_TO_23 + half)))


@_inlined
def _pack_row(codes: Bytes, bits: int, out: Bytes) -> None:
    """Codes, whose count eights divide, as one stream of bits; the rest of ``out`` is zeros."""
    eights = codes.view(np.uint64)
    used = min(out.size, eights.size * bits)
    whole = used // bits
    for i in range(whole):
        held = _squeeze(eights[i], bits)
        for j in range(bits):
            out[i * bits + j] = np.uint8(held >> np.uint64(8 * j))
    for j in range(whole * bits, used):
        held = _squeeze(eights[whole], bits)
        out[j] = np.uint8(held >> np.uint64(8 * (j - whole * bits)))
    out[used:] = np.uint8(0)


@_inlined
def _put(codes: Bytes, bits: int, packs: bool, out: Bytes) -> None:
    """A row of codes where it belongs, packed or as signed bytes."""
    if not packs:
        half = np.uint8(1 << (bits - 1))
        for k in range(out.size):
            out[k] = np.uint8(codes[k] - half)
    elif bits == 4:
        _pack_row(codes, 4, out)
    elif bits == 8:
        out[: codes.size] = codes[: out.size]
        out[codes.size :] = np.uint8(0)
    else:
        _pack_row(codes, bits, out)


@_inlined
def _quantize(
    rows: Patterns,
    group_size: int,
    bits: int,
    symmetric: bool,
    packs: bool,
    given: bool,
    kind: int,
    infinity: int,
    out: Bytes,
    scales: Patterns,
    zero_points: ZeroPoints,
) -> int:
    columns = rows.shape[1]
    count = columns // group_size
    half = np.float32(1 << (bits - 1))
    codes = np.zeros(-(-columns // EIGHT) * EIGHT, np.uint8)
    wide_scales = np.empty(count, np.float32)
    zeros = np.zeros(count, np.float32)
    for r in range(rows.shape[0]):
        groups = rows[r].reshape((count, group_size))
        if given:
            _take(scales[r], zero_points, r, symmetric, kind, wide_scales, zeros)
            finite = _all_finite(rows[r], infinity)
        else:
            finite = _parameters(groups, symmetric, kind, infinity, half, wide_scales, zeros)
        if not finite:
            return r
        _encode(groups, kind, half, wide_scales, zeros, codes)
        _put(codes, bits, packs, out[r])
        if not given:
            for g in range(count):
                scales[r, g] = _narrow(wide_scales[g], kind)
                if not symmetric:
                    zero_points[r, g] = np.int8(zeros[g])
    return -1


@_kernel
def quantize_bf16(
    rows: Patterns,
    group_size: int,
    bits: int,
    symmetric: bool,
    packs: bool,
    given: bool,
    out: Bytes,
    scales: Patterns,
    zero_points: ZeroPoints,
) -> int:
    """Quantize rows [n, columns]; -1, or the first row that holds a NaN or an Inf.

    ``out`` [n, bytes of a row] has codes packed, or one a byte.  Scales and zero points are outputs
    too, unless they are ``given``.
    """
    return _quantize(
        rows, group_size, bits, symmetric, packs, given, BF16, 0x7F80, out, scales, zero_points
    )


@_kernel
def quantize_f16(
    rows: Patterns,
    group_size: int,
    bits: int,
    symmetric: bool,
    packs: bool,
    given: bool,
    out: Bytes,
    scales: Patterns,
    zero_points: ZeroPoints,
) -> int:
    """As ``quantize_bf16``, for F16."""
    return _quantize(
        rows, group_size, bits, symmetric, packs, given, F16, 0x7C00, out, scales, zero_points
    )


@_kernel
def quantize_f32(
    rows: Patterns,
    group_size: int,
    bits: int,
    symmetric: bool,
    packs: bool,
    given: bool,
    out: Bytes,
    scales: Patterns,
    zero_points: ZeroPoints,
) -> int:
    """As ``quantize_bf16``, for F32."""
    return _quantize(
        rows, group_size, bits, symmetric, packs, given, F32, 0x7F800000, out, scales, zero_points
    )


@_kernel
def pack(codes: NDArray[np.int8], bits: int, out: Bytes) -> None:
    """Pack each row of signed codes [n, count] to ``out`` [n, bytes of a row]."""
    half = np.uint8(1 << (bits - 1))
    row = np.zeros(-(-codes.shape[1] // EIGHT) * EIGHT, np.uint8)
    for r in range(codes.shape[0]):
        for k in range(codes.shape[1]):
            row[k] = np.uint8(codes[r, k]) + half
        _pack_row(row, bits, out[r])


@_kernel
def unpack(packed: Bytes, bits: int, out: NDArray[np.int8]) -> None:
    """The signed codes of rows that are packed, the reverse of ``pack``."""
    mask, half = (1 << bits) - 1, 1 << (bits - 1)
    for r in range(out.shape[0]):
        row = packed[r]
        held, holding, at = 0, 0, 0
        for k in range(out.shape[1]):
            if holding < bits:
                held |= int(row[at]) << holding
                holding += 8
                at += 1
            out[r, k] = np.int8((held & mask) - half)
            held >>= bits
            holding -= bits


@_kernel
def dequantize(
    codes: NDArray[np.int8], scales: Floats, zero_points: ZeroPoints, out: Floats
) -> None:
    """(code - zero point) * scale of each group of a row, in float32."""
    size = codes.shape[1] // scales.shape[1]
    for r in range(codes.shape[0]):
        for g in range(scales.shape[1]):
            scale, zero = scales[r, g], np.float32(zero_points[r, g])
            for k in range(g * size, (g + 1) * size):
                out[r, k] = (np.float32(codes[r, k]) - zero) * scale
