"""Integer weights of compressed-tensors 0.19 from two to eight bits, bit for bit, by extremes.

The rule is that of the observer ``memoryless_minmax`` of llm-compressor, with ``calculate_qparams``
(compressed_tensors/quantization/utils/helpers.py) and ``quantize`` (lifecycle/forward.py), where
``group_size`` neighbours of a row share a scale; a channel is one group as long as the row.  For
``bits`` b, codes are integers of -2**(b-1) .. 2**(b-1) - 1:

- symmetric: scale = largest magnitude / ((2**b - 1) / 2), code = rint(clip(w / scale));
- else: scale = (max - min) / (2**b - 1) with 0 always between the two, zero point =
  rint(clip(-2**(b-1) - min / scale)), code = rint(clip(w / scale + zero point)).

A scale of 0 becomes eps of the weight's dtype, the zero point of a group of zeros is 0.  Every
operation is rounded to the weight's dtype, ties to even.

Codes are stored one a byte (``int-quantized``, ``naive-quantized``), or as one stream of bits a
row, the first code lowest, plus 2**(b-1) each, in as few int32 as hold it (``pack-quantized``);
what the last word lacks is 0.  Zero points are packed along the rows of the weight.

Functions run on the calling thread, without the GIL.  Arrays are C-contiguous and aligned, and
misfits raise ValueError.  Rows are independent: any split into blocks of rows gives the same bytes.
The first call per dtype on a machine compiles for seconds; the code is then on disk.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from . import _integer_loops as loops
from ._floats import (
    Array,
    FloatFormat,
    bad_index,
    first_non_finite,
    float_format,
    read_only,
    require,
)

Codes = NDArray[np.int8]
Packed = NDArray[np.int32]

BITS = (2, 3, 4, 5, 6, 7, 8)

_KERNELS = {"BF16": loops.quantize_bf16, "F16": loops.quantize_f16, "F32": loops.quantize_f32}


def words(count: int, bits: int) -> int:
    """The int32 that so many codes take in a row."""
    return -(-count * bits // 32)


def quantize_rows(
    rows: Array,
    dtype: str,
    bits: int,
    group_size: int,
    codes: Codes | Packed,
    scales: Array,
    zero_points: Codes | None = None,
    *,
    given: bool = False,
) -> int:
    """Quantize the rows of a weight.

    ``rows`` is [rows, columns] of ``dtype``, columns a multiple of ``group_size``.  ``codes`` is
    int8 [rows, columns], or int32 [rows, words] to pack them.  ``scales``, of ``dtype``, and
    ``zero_points``, int8, are [rows, columns / group_size]; without zero points the codes are
    symmetric.  Both are outputs, unless they are ``given``.

    Returns -1, or the flat index of the first NaN or Inf of ``rows``; the outputs are then
    unspecified.  A range that overflows ``dtype``, and so has no scale, raises ValueError, as does
    a scale that is given and is 0 or not finite.
    """
    form = float_format(dtype)
    rows = np.require(rows, requirements=["C", "A"])
    if bits not in BITS:
        raise ValueError(f"bits is {bits}, expected one of {BITS}")
    if rows.ndim != 2 or not rows.size or group_size < 1 or rows.shape[1] % group_size:
        raise ValueError(f"shape {list(rows.shape)} is not [rows, a multiple of {group_size}]")
    count, columns = rows.shape
    grid = count, columns // group_size
    packs = codes.dtype == np.int32
    require("rows", rows, form.storage, rows.shape)
    require("scales", scales, form.storage, grid)
    if packs:
        require("codes", codes, np.int32, (count, words(columns, bits)))
    else:
        require("codes", codes, np.int8, rows.shape)
    symmetric = zero_points is None
    zeros = np.empty((0, 0), np.int8) if zero_points is None else zero_points
    if not symmetric:
        require("zero_points", zeros, np.int8, grid)
    if given and not _are_scales(scales, form):
        raise ValueError("a scale is 0 or not finite")
    patterns = read_only(rows, form)
    outputs = codes.view(np.uint8), scales.view(form.bits), zeros
    how = group_size, bits, symmetric, packs, given
    bad_row = _KERNELS[dtype](patterns, *how, *outputs)
    if bad_row >= 0:
        return bad_index(bad_row, patterns, form)
    if not symmetric and first_non_finite(scales, form) >= 0:
        raise ValueError("a range of weights overflows their type")
    return -1


def _are_scales(scales: Array, form: FloatFormat) -> bool:
    magnitudes = scales.view(form.bits) << 1
    return first_non_finite(scales, form) < 0 and bool(magnitudes.all())


def pack_rows(codes: Codes, bits: int, packed: Packed) -> None:
    """Pack each row of ``codes``, int8 [rows, count], into ``packed``, int32 [rows, words]."""
    require("codes", codes, np.int8, codes.shape)
    require("packed", packed, np.int32, (codes.shape[0], words(codes.shape[1], bits)))
    half = 1 << (bits - 1)
    if codes.size and not (-half <= codes.min() and codes.max() < half):
        raise ValueError(f"a code is not in {-half}..{half - 1}")
    loops.pack(codes, bits, packed.view(np.uint8))


def unpack_rows(packed: Packed, bits: int, codes: Codes) -> None:
    """The reverse of ``pack_rows``."""
    require("packed", packed, np.int32, (codes.shape[0], words(codes.shape[1], bits)))
    require("codes", codes, np.int8, codes.shape)
    loops.unpack(packed.view(np.uint8), bits, codes)


def pack_zero_points(zero_points: Codes, bits: int, packed: Packed) -> None:
    """Pack [rows, groups] zero points along the rows into ``packed``, int32 [words, groups]."""
    turned = np.empty(packed.shape[::-1], np.int32)
    pack_rows(np.ascontiguousarray(zero_points.T), bits, turned)
    packed[...] = turned.T


def unpack_zero_points(packed: Packed, bits: int, zero_points: Codes) -> None:
    """The reverse of ``pack_zero_points``."""
    turned = np.empty(zero_points.shape[::-1], np.int8)
    unpack_rows(np.ascontiguousarray(packed.T), bits, turned)
    zero_points[...] = turned.T


def dequantize_rows(
    codes: Codes,
    scales: NDArray[np.float32],
    zero_points: Codes | None,
    out_float32: NDArray[np.float32],
) -> None:
    """Write (code - zero point) * scale, in float32, to ``out_float32`` [rows, columns].

    ``scales``, widened to float32, and ``zero_points`` are [rows, groups].
    """
    require("codes", codes, np.int8, out_float32.shape)
    require("out_float32", out_float32, np.float32, codes.shape)
    zeros = np.zeros(scales.shape, np.int8) if zero_points is None else zero_points
    require("scales", scales, np.float32, (codes.shape[0], scales.shape[1]))
    require("zero_points", zeros, np.int8, scales.shape)
    loops.dequantize(codes, scales, zeros, out_float32)
