"""The compiled loops of ``fp8``: numba, one thread, no GIL, cached on disk.

torch computes in the weight's dtype, one operation at a time, as in ``_compressed_loops``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ._affine_loops import BF16, F16, F32, Floats, Patterns, _inlined, _kernel, _narrow, _widen
from ._compressed_loops import _eps, _round_to
from ._nvfp4_loops import E4M3_MAX, Bytes, _from_e4m3, _magnitude_16, _magnitude_32, _signed_e4m3


@_inlined
def _scale(peak: np.float32, kind: int) -> np.float32:
    """What 1 stands for in a row of this largest magnitude."""
    scale = _round_to(peak / E4M3_MAX, kind)
    return scale if scale != np.float32(0) else _eps(kind)


@_inlined
def _code(value: np.float32, scale: np.float32, kind: int) -> np.uint8:
    """The bits of E4M3.  Adding the zero point, 0, makes zero of negative zero, and of nothing
    else; a quotient that rounds to zero in E4M3 keeps its sign."""
    return _signed_e4m3(_round_to(value / scale, kind) + np.float32(0))


@_inlined
def _quantize(
    rows: Patterns,
    magnitude: Callable[[Any], Any],
    kind: int,
    infinity: int,
    codes: Bytes,
    scales: Patterns,
) -> int:
    for r in range(rows.shape[0]):
        row, out = rows[r], codes[r]
        peak = magnitude(row[0])
        for k in range(rows.shape[1]):
            peak = max(peak, magnitude(row[k]))
        if peak >= infinity:
            return r
        scale = _scale(_widen(peak, kind), kind)
        scales[r] = _narrow(scale, kind)
        for k in range(rows.shape[1]):
            out[k] = _code(_widen(row[k], kind), scale, kind)
    return -1


@_kernel
def quantize_bf16(rows: Patterns, codes: Bytes, scales: Patterns) -> int:
    """Quantize rows [n, columns], of one column at least; -1, or the first row that holds a NaN
    or an Inf."""
    return _quantize(rows, _magnitude_16, BF16, 0x7F80, codes, scales)


@_kernel
def quantize_f16(rows: Patterns, codes: Bytes, scales: Patterns) -> int:
    """As ``quantize_bf16``, for F16."""
    return _quantize(rows, _magnitude_16, F16, 0x7C00, codes, scales)


@_kernel
def quantize_f32(rows: Patterns, codes: Bytes, scales: Patterns) -> int:
    """As ``quantize_bf16``, for F32."""
    return _quantize(rows, _magnitude_32, F32, 0x7F800000, codes, scales)


@_inlined
def _quantize_blocks(
    rows: Patterns,
    height: int,
    width: int,
    magnitude: Callable[[Any], Any],
    kind: int,
    infinity: int,
    codes: Bytes,
    scales: Patterns,
) -> int:
    count = scales.shape[1]
    peaks = np.empty(count, np.int32)
    for b in range(scales.shape[0]):
        first, last = b * height, min((b + 1) * height, rows.shape[0])
        peaks[:] = 0
        for r in range(first, last):
            for c in range(count):
                block = rows[r, c * width : (c + 1) * width]
                peak = magnitude(block[0])
                for k in range(block.size):
                    peak = max(peak, magnitude(block[k]))
                peaks[c] = max(peaks[c], np.int32(peak))
        for c in range(count):
            if peaks[c] >= infinity:
                return first
            scales[b, c] = _narrow(_scale(_widen(peaks[c], kind), kind), kind)
        for r in range(first, last):
            for c in range(count):
                block, out = (
                    rows[r, c * width : (c + 1) * width],
                    codes[r, c * width : (c + 1) * width],
                )
                scale = _widen(scales[b, c], kind)
                for k in range(block.size):
                    out[k] = _code(_widen(block[k], kind), scale, kind)
    return -1


@_kernel
def quantize_blocks_bf16(
    rows: Patterns, height: int, width: int, codes: Bytes, scales: Patterns
) -> int:
    """Quantize rows [n, columns] by blocks of ``height`` rows and ``width`` columns, the last
    ones smaller; -1, or the first row of blocks that hold a NaN or an Inf."""
    return _quantize_blocks(rows, height, width, _magnitude_16, BF16, 0x7F80, codes, scales)


@_kernel
def quantize_blocks_f16(
    rows: Patterns, height: int, width: int, codes: Bytes, scales: Patterns
) -> int:
    """As ``quantize_blocks_bf16``, for F16."""
    return _quantize_blocks(rows, height, width, _magnitude_16, F16, 0x7C00, codes, scales)


@_kernel
def quantize_blocks_f32(
    rows: Patterns, height: int, width: int, codes: Bytes, scales: Patterns
) -> int:
    """As ``quantize_blocks_bf16``, for F32."""
    return _quantize_blocks(rows, height, width, _magnitude_32, F32, 0x7F800000, codes, scales)


@_kernel
def dequantize_blocks(codes: Bytes, scales: Floats, width: int, out: Floats) -> None:
    """Write code * scale in float32; each row has the scales of its own blocks."""
    for r in range(codes.shape[0]):
        for k in range(codes.shape[1]):
            out[r, k] = _from_e4m3(codes[r, k]) * scales[r, k // width]


@_kernel
def dequantize(codes: Bytes, scales: Floats, out: Floats) -> None:
    """Write code * scale of each row, in float32."""
    for r in range(codes.shape[0]):
        for k in range(codes.shape[1]):
            out[r, k] = _from_e4m3(codes[r, k]) * scales[r]
