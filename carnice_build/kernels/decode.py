"""Numbers of quantized weights, as the libraries that quantized them give them back.

A number is the value of its code, less the zero point where there is one, times its scale: one
product in float32, rounded once to the type that is asked for, to nearest with ties to even.
docs/quantized-sources.md says which library does the same, and which rounds more than once.

Rows are independent: any split into blocks of rows, on any threads, gives the same bytes.
The first call of a function per dtype on a machine compiles for seconds; the code is then on disk.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from . import _decode_loops as loops
from ._floats import Array, float_format, require, widen

Scales = NDArray[np.float32]
Codes = NDArray[np.uint8]
Words = NDArray[np.uint32]
Zeros = NDArray[np.int32]

_FP8 = {"BF16": loops.fp8_bf16, "F16": loops.fp8_f16, "F32": loops.fp8_f32}
_MXFP4 = {"BF16": loops.mxfp4_bf16, "F16": loops.mxfp4_f16, "F32": loops.mxfp4_f32}
_PACKED = {"BF16": loops.packed_bf16, "F16": loops.packed_f16, "F32": loops.packed_f32}
_COLUMNS = {"BF16": loops.columns_bf16, "F16": loops.columns_f16, "F32": loops.columns_f32}


def fp8_rows(
    codes: Codes, scales: Scales, block: tuple[int, int], first: int, dtype: str, out: Array
) -> None:
    """Write rows ``first`` and following of a matrix in E4M3 to ``out`` [n, columns] of ``dtype``.

    ``codes`` are theirs, [n, columns].  ``scales`` [rows / block[0], columns / block[1]], rounded
    up, are those of the whole matrix, one for each block, of which the last may be cut off.
    The two codes of NaN give NaN.  Raises ValueError for arrays that do not fit each other.
    """
    high, wide = block
    require("codes", codes, np.uint8, out.shape)
    require("scales", scales, np.float32, (scales.shape[0], -(-codes.shape[1] // wide)))
    if first + len(codes) > high * len(scales):
        raise ValueError(f"{first + len(codes)} rows are more than {len(scales)} blocks of {high}")
    _FP8[dtype](codes, scales, high, wide, first, _patterns(out, dtype))


def mxfp4_rows(codes: Codes, scales: Codes, dtype: str, out: Array) -> None:
    """Write rows of E2M1 with a scale in E8M0 for each group to ``out`` [n, columns].

    ``codes`` [n, columns / 2] hold two each, the first one lowest; ``scales`` are [n, groups], and
    none of them is 255, which stands for no number.  Raises ValueError as ``fp8_rows`` does.
    """
    require("codes", codes, np.uint8, (out.shape[0], out.shape[1] // 2))
    require("scales", scales, np.uint8, (out.shape[0], scales.shape[1]))
    if out.shape[1] % max(1, 2 * scales.shape[1]):
        raise ValueError(f"{scales.shape[1]} groups do not divide {out.shape[1]} columns")
    _MXFP4[dtype](codes, scales, _patterns(out, dtype))


def packed_rows(
    words: Words, bits: int, scales: Scales, zeros: Zeros, dtype: str, out: Array
) -> None:
    """Write rows of integers of ``bits`` bits, packed without gaps, to ``out`` [n, columns].

    ``words`` [n, columns * bits / 32], rounded up, hold the first one lowest; ``scales`` and
    ``zeros``, codes that stand for 0, are [n, groups].  Raises ValueError as ``fp8_rows`` does.
    """
    rows, columns = out.shape
    require("words", words, np.uint32, (rows, -(-columns * bits // 32)))
    require("scales", scales, np.float32, (rows, scales.shape[1]))
    require("zeros", zeros, np.int32, scales.shape)
    _PACKED[dtype](words, bits, scales, zeros, _patterns(out, dtype))


def packed_columns(
    words: Words, bits: int, scales: Scales, zeros: Zeros, dtype: str, out: Array
) -> None:
    """As ``packed_rows`` of arrays that are transposed: a row of ``out`` is a column of them all.

    ``bits`` divides 32, and a word holds neighbours in a row of ``out``.
    """
    rows, columns = out.shape
    require("words", words, np.uint32, (columns * bits // 32, rows))
    require("scales", scales, np.float32, (scales.shape[0], rows))
    require("zeros", zeros, np.int32, scales.shape)
    if columns % max(1, len(scales)) or (columns // len(scales)) % (32 // bits):
        raise ValueError(f"{len(scales)} groups do not divide {columns} columns into whole words")
    _COLUMNS[dtype](words, bits, scales, zeros, _patterns(out, dtype))


def unpack(words: Words, bits: int, count: int) -> Zeros:
    """The first ``count`` codes of each row of ``words``, packed as for ``packed_rows``."""
    position = np.arange(count, dtype=np.int64) * bits
    index, shift = position >> 5, position & 31
    wide = np.zeros((words.shape[0], words.shape[1] + 1), np.uint64)
    wide[:, :-1] = words
    both = wide[:, index] | wide[:, index + 1] << np.uint64(32)
    codes = both >> shift.astype(np.uint64) & np.uint64((1 << bits) - 1)
    return np.ascontiguousarray(codes, np.int32)


def widened(scales: Array, dtype: str) -> Scales:
    """The same scales in float32, C-contiguous."""
    return np.ascontiguousarray(widen(scales, dtype))


def _patterns(out: Array, dtype: str) -> Array:
    form = float_format(dtype)
    require("out", out, form.storage, out.shape)
    return out.view(form.bits)
