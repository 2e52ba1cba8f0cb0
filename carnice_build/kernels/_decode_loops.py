"""The compiled loops of ``decode``: numba, one thread, no GIL, cached on disk.

A number is one float32 product of a code's value and its scale, rounded once to the type of the
output. ``kind`` is the output's, and a constant in each kernel.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ._affine_loops import (
    BF16,
    F16,
    F32,
    Floats,
    Patterns,
    Words,
    _bits,
    _float,
    _inlined,
    _kernel,
    _narrow,
)
from ._nvfp4_loops import Bytes, _from_e2m1, _from_e4m3

Zeros = NDArray[np.int32]

TILE_ROWS = 64
"""Rows of a transposed layout that are decoded at a time: a line of them is read as neighbours."""


@_inlined
def _rounded(value: np.float32, kind: int) -> np.uint32:
    """As ``_narrow``, of any value; there is one NaN."""
    bits = _narrow(value, kind)
    nan = np.uint32(0x7FC0 if kind == BF16 else 0x7E00 if kind == F16 else 0x7FC00000)
    return np.uint32(bits if value == value else nan)


@_inlined
def _fp8(
    codes: Bytes, scales: Floats, high: int, wide: int, first: int, kind: int, out: Patterns
) -> None:
    for r in range(codes.shape[0]):
        row, target = codes[r], out[r]
        line = scales[(first + r) // high]
        for b in range(scales.shape[1]):
            scale = line[b]
            for k in range(b * wide, min((b + 1) * wide, codes.shape[1])):
                target[k] = _rounded(_from_e4m3(row[k]) * scale, kind)


@_kernel
def fp8_bf16(codes: Bytes, scales: Floats, high: int, wide: int, first: int, out: Patterns) -> None:
    """Decode rows ``first`` and following of blocks that are ``high`` rows, ``wide`` columns."""
    _fp8(codes, scales, high, wide, first, BF16, out)


@_kernel
def fp8_f16(codes: Bytes, scales: Floats, high: int, wide: int, first: int, out: Patterns) -> None:
    """As ``fp8_bf16``, to F16."""
    _fp8(codes, scales, high, wide, first, F16, out)


@_kernel
def fp8_f32(codes: Bytes, scales: Floats, high: int, wide: int, first: int, out: Patterns) -> None:
    """As ``fp8_bf16``, to F32."""
    _fp8(codes, scales, high, wide, first, F32, out)


@_inlined
def _power(exponent: np.uint32) -> np.float32:
    """The value of E8M0: 2**(exponent - 127), of which the least is a denormal of float32."""
    bits = np.uint32(exponent) << np.uint32(23)
    return _float(bits if bits else np.uint32(0x00400000))


@_inlined
def _signed_e2m1(code: np.uint32) -> np.float32:
    magnitude = _from_e2m1(code)
    return _float(_bits(magnitude) | ((np.uint32(code) & np.uint32(8)) << np.uint32(28)))


@_inlined
def _mxfp4(codes: Bytes, scales: Bytes, kind: int, out: Patterns) -> None:
    half = codes.shape[1] // scales.shape[1]
    for r in range(codes.shape[0]):
        row, target = codes[r], out[r]
        for g in range(scales.shape[1]):
            scale = _power(np.uint32(scales[r, g]))
            for k in range(g * half, (g + 1) * half):
                code = np.uint32(row[k])
                target[2 * k] = _rounded(_signed_e2m1(code & np.uint32(15)) * scale, kind)
                target[2 * k + 1] = _rounded(_signed_e2m1(code >> np.uint32(4)) * scale, kind)


@_kernel
def mxfp4_bf16(codes: Bytes, scales: Bytes, out: Patterns) -> None:
    """Decode rows of E2M1, two a byte, the first one lowest."""
    _mxfp4(codes, scales, BF16, out)


@_kernel
def mxfp4_f16(codes: Bytes, scales: Bytes, out: Patterns) -> None:
    """As ``mxfp4_bf16``, to F16."""
    _mxfp4(codes, scales, F16, out)


@_kernel
def mxfp4_f32(codes: Bytes, scales: Bytes, out: Patterns) -> None:
    """As ``mxfp4_bf16``, to F32."""
    _mxfp4(codes, scales, F32, out)


@_inlined
def _code(line: Words, index: int, bits: int) -> np.uint32:
    """Code number ``index`` of a dense stream, of which one may lie in two words."""
    position = index * bits
    word, shift = position >> 5, np.uint32(position & 31)
    code = line[word] >> shift
    if shift + np.uint32(bits) > np.uint32(32):
        code |= line[word + 1] << (np.uint32(32) - shift)
    return np.uint32(code & np.uint32((1 << bits) - 1))


@_inlined
def _packed(
    words: Words, bits: int, scales: Floats, zeros: Zeros, kind: int, out: Patterns
) -> None:
    """Word by word where no code and no group is in two of them, else code by code."""
    columns = out.shape[1]
    group = -(-columns // scales.shape[1])
    each = 32 // bits
    aligned = each * bits == 32 and group % each == 0 and columns % each == 0
    mask = np.uint32((1 << bits) - 1)
    for r in range(words.shape[0]):
        row, target = words[r], out[r]
        for g in range(scales.shape[1]):
            scale, zero = scales[r, g], zeros[r, g]
            first, stop = g * group, min((g + 1) * group, columns)
            if aligned:
                for w in range(first // each, stop // each):
                    word = row[w]
                    for j in range(each):
                        code = np.int32((word >> np.uint32(j * bits)) & mask)
                        target[w * each + j] = _rounded(np.float32(code - zero) * scale, kind)
            else:
                for k in range(first, stop):
                    code = np.int32(_code(row, k, bits))
                    target[k] = _rounded(np.float32(code - zero) * scale, kind)


@_kernel
def packed_bf16(words: Words, bits: int, scales: Floats, zeros: Zeros, out: Patterns) -> None:
    """Decode rows of integers packed along a row."""
    _packed(words, bits, scales, zeros, BF16, out)


@_kernel
def packed_f16(words: Words, bits: int, scales: Floats, zeros: Zeros, out: Patterns) -> None:
    """As ``packed_bf16``, to F16."""
    _packed(words, bits, scales, zeros, F16, out)


@_kernel
def packed_f32(words: Words, bits: int, scales: Floats, zeros: Zeros, out: Patterns) -> None:
    """As ``packed_bf16``, to F32."""
    _packed(words, bits, scales, zeros, F32, out)


@_inlined
def _columns(
    words: Words, bits: int, scales: Floats, zeros: Zeros, kind: int, out: Patterns
) -> None:
    each = 32 // bits
    mask = np.uint32((1 << bits) - 1)
    group = out.shape[1] // scales.shape[0]
    for start in range(0, words.shape[1], TILE_ROWS):
        stop = min(start + TILE_ROWS, words.shape[1])
        for line in range(words.shape[0]):
            row, g = words[line], line * each // group
            scale, zero = scales[g], zeros[g]
            for r in range(start, stop):
                word = row[r]
                for j in range(each):
                    code = (word >> np.uint32(j * bits)) & mask
                    value = np.float32(np.int32(code) - zero[r])
                    out[r, line * each + j] = _rounded(value * scale[r], kind)


@_kernel
def columns_bf16(words: Words, bits: int, scales: Floats, zeros: Zeros, out: Patterns) -> None:
    """Decode rows of integers packed along a row, of which each lies in a column of ``words``."""
    _columns(words, bits, scales, zeros, BF16, out)


@_kernel
def columns_f16(words: Words, bits: int, scales: Floats, zeros: Zeros, out: Patterns) -> None:
    """As ``columns_bf16``, to F16."""
    _columns(words, bits, scales, zeros, F16, out)


@_kernel
def columns_f32(words: Words, bits: int, scales: Floats, zeros: Zeros, out: Patterns) -> None:
    """As ``columns_bf16``, to F32."""
    _columns(words, bits, scales, zeros, F32, out)
