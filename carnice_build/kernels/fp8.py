"""FP8 weights of compressed-tensors, bit for bit as llm-compressor makes them on a CPU.

The rule is that of compressed-tensors (quantization/utils/helpers.py ``calculate_qparams``,
lifecycle/forward_helpers.py ``_quantize``) for the strategies ``channel``, a scale for each row
(the scheme FP8_DYNAMIC), ``block``, one for each block of rows and columns (FP8_BLOCK), and
``tensor`` (FP8), which is one block: the scale is the largest magnitude over 448, the largest value
of E4M3, and each weight becomes the value of E4M3 nearest to weight / scale, ties to even.  Every
operation is rounded to the weight's own type.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from . import _fp8_loops as loops
from ._floats import Array, bad_index, float_format, read_only, require

_KERNELS = {"BF16": loops.quantize_bf16, "F16": loops.quantize_f16, "F32": loops.quantize_f32}

_BLOCK_KERNELS = {
    "BF16": loops.quantize_blocks_bf16,
    "F16": loops.quantize_blocks_f16,
    "F32": loops.quantize_blocks_f32,
}


def quantize_rows(rows: Array, dtype: str, codes: NDArray[np.uint8], scales: Array) -> int:
    """Quantize the rows of a weight on the calling thread, without the GIL.

    ``rows`` is [rows, columns] of ``dtype``.  The results go to ``codes``, uint8 [rows, columns],
    the bits of E4M3, and to ``scales``, [rows, 1] of ``dtype``.  All are C-contiguous.  Rows are
    independent: any split into blocks of rows, on any threads, gives the same bytes.

    Where the quotient of a row's scale is zero (a row of zeros, or of denormals), the scale is the
    distance from 1 to the next value of ``dtype``.  A weight of negative zero becomes zero.

    Returns -1, or the flat index of the first NaN or Inf of ``rows``; the outputs are then
    unspecified.  Raises ValueError for an unknown dtype and for arrays that do not fit each other.

    The first call per dtype on a machine compiles for seconds; the code is then on disk.
    """
    form = float_format(dtype)
    rows = np.require(rows, requirements=["C", "A"])
    if rows.ndim != 2:
        raise ValueError(f"shape {list(rows.shape)} is not [rows, columns]")
    require("rows", rows, form.storage, rows.shape)
    require("codes", codes, np.uint8, rows.shape)
    require("scales", scales, form.storage, (rows.shape[0], 1))
    if not rows.size:
        raise ValueError(f"shape {list(rows.shape)} has no weight")
    patterns = read_only(rows, form)
    bad_row = _KERNELS[dtype](patterns, codes, scales.reshape(-1).view(form.bits))
    return bad_index(bad_row, patterns, form)


def dequantize_rows(
    codes: NDArray[np.uint8], scales: NDArray[np.float32], out_float32: NDArray[np.float32]
) -> None:
    """Write code * scale, in float32, to ``out_float32`` [rows, columns].

    ``scales`` are [rows, 1], widened to float32.  The code of NaN gives NaN.  Raises ValueError as
    ``quantize_rows`` does.
    """
    require("codes", codes, np.uint8, out_float32.shape)
    require("scales", scales, np.float32, (codes.shape[0], 1))
    require("out_float32", out_float32, np.float32, codes.shape)
    loops.dequantize(codes, scales.reshape(-1), out_float32)


def quantize_blocks(
    rows: Array,
    dtype: str,
    height: int,
    width: int,
    codes: NDArray[np.uint8],
    scales: Array,
) -> int:
    """Quantize a weight by blocks of ``height`` rows and ``width`` columns, else as
    ``quantize_rows``.

    Blocks at the right and at the bottom are as small as what is left, as if zeros were beside it.
    ``scales`` is [blocks of rows, blocks of columns].  Any split into whole blocks of rows gives
    the same bytes.
    """
    form = float_format(dtype)
    rows = np.require(rows, requirements=["C", "A"])
    if rows.ndim != 2 or not rows.size or height < 1 or width < 1:
        raise ValueError(f"shape {list(rows.shape)} has no weight, or blocks {height} by {width}")
    require("rows", rows, form.storage, rows.shape)
    require("codes", codes, np.uint8, rows.shape)
    require("scales", scales, form.storage, block_grid(rows.shape, height, width))
    patterns = read_only(rows, form)
    kernel = _BLOCK_KERNELS[dtype]
    bad_row = kernel(patterns, height, width, codes, scales.view(form.bits))
    return bad_index(bad_row, patterns, form)


def block_grid(shape: tuple[int, ...], height: int, width: int) -> tuple[int, int]:
    """Blocks that cover a matrix, of rows and of columns."""
    rows, columns = shape
    return -(-rows // height), -(-columns // width)


def dequantize_blocks(
    codes: NDArray[np.uint8],
    scales: NDArray[np.float32],
    width: int,
    out_float32: NDArray[np.float32],
) -> None:
    """Write code * scale, in float32, to ``out_float32`` [rows, columns].

    ``scales``, [rows, blocks of columns], are those of each row, widened to float32.
    """
    require("codes", codes, np.uint8, out_float32.shape)
    require("out_float32", out_float32, np.float32, codes.shape)
    require("scales", scales, np.float32, block_grid(codes.shape, 1, width))
    loops.dequantize_blocks(codes, scales, width, out_float32)
