"""NVFP4 quantization of weights, bit for bit as NVIDIA ModelOpt does it on a CPU.

The rule is that of ``NVFP4QTensor`` of modelopt 0.47 (torch/quantization/qtensor/nvfp4_tensor.py),
which ``export_hf_checkpoint`` applies to each weight. A block of 16 neighbours in a row shares a
scale in E4M3, a tensor a float32 ``scale_2``, and each weight becomes a code in E2M1 (0, 0.5, 1,
1.5, 2, 3, 4, 6 and a sign) with weight ~ code * (scale * scale_2). The arithmetic is float32.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import _nvfp4_loops as loops
from ._floats import (
    Array,
    bad_index,
    blocks_per_row,
    first_non_finite,
    float_format,
    read_only,
    require,
    widen,
)

Scalar = float | np.floating[Any]

BLOCK_SIZE = loops.BLOCK

SCALE_2_OF_ZEROS = np.float32(6) / np.float32(2688)
"""The ``scale_2`` of a tensor of zeros, as if its largest magnitude were that of E2M1."""

_KERNELS = {"BF16": loops.quantize_bf16, "F16": loops.quantize_f16, "F32": loops.quantize_f32}


def amax(rows: Array, dtype: str) -> tuple[np.float32, int]:
    """The largest magnitude of an array of ``dtype`` and any shape; 0 for an empty one.

    Beside it stands -1, or the flat index of the first NaN or Inf; the magnitude is then
    unspecified. Runs on the calling thread, without the GIL. Raises ValueError for an unknown
    dtype, or an array that is not of it.
    """
    form = float_format(dtype)
    rows = np.require(rows, requirements=["C", "A"])
    require("rows", rows, form.storage, rows.shape)
    patterns = read_only(rows, form).reshape(-1)
    peak = (loops.peak_32 if dtype == "F32" else loops.peak_16)(patterns)
    bad = first_non_finite(patterns, form) if peak >= form.exponent else -1
    return np.float32(widen(np.array([peak], form.bits).view(form.storage), dtype)[0]), bad


def weight_scale_2(amax: Scalar) -> np.float32:
    """The ``scale_2`` of a weight of that largest magnitude: amax / (6 * 448), in float32.

    Where that is zero (a weight of zeros, or of nothing above 1.9e-42), modelopt exports NaN
    scales. Here it is ``SCALE_2_OF_ZEROS`` instead: such a weight is quantized to codes that
    stand for zero, under finite scales, and dequantizes to exact zeros.

    Raises ValueError for a negative, infinite or NaN ``amax``.
    """
    return _scale_2(amax)


def input_scale(amax: Scalar) -> np.float32:
    """The ``input_scale`` of a linear whose inputs have that largest magnitude, in float32.

    It is amax / (6 * 448). For inputs that were all zero it is ``SCALE_2_OF_ZEROS``, as
    modelopt's export has it; and the same where the quotient underflows, which modelopt refuses.

    Raises ValueError for a negative, infinite or NaN ``amax``.
    """
    return _scale_2(amax)


def quantize_rows(
    rows: Array,
    dtype: str,
    scale_2: Scalar,
    packed: NDArray[np.uint8],
    scales: NDArray[np.uint8],
) -> int:
    """Quantize the rows of a weight on the calling thread, without the GIL.

    ``rows`` is [rows, cols] of ``dtype``, cols a multiple of 16, and ``scale_2`` the one of the
    whole tensor (or of the tensors fused with it), rounded to float32 here. The results go to
    ``packed``, uint8 [rows, cols / 2], the first code of each pair in the low half; and to
    ``scales``, uint8 [rows, cols / 16], the bits of E4M3. All are C-contiguous. Rows are
    independent: any split into blocks of rows, on any threads, gives the same bytes.

    Every byte is that of ``NVFP4QTensor.quantize``, which has these corners:
    a scale is amax / (6 * scale_2), clamped to [2**-9, 448] and rounded to E4M3;
    a block for which the quotient is zero gets the scale 1;
    a negative quotient that rounds to zero keeps its sign bit, negative zero does not;
    where scale * scale_2 underflows to zero, zero too gets the code of 6 (which stands for zero).

    Returns -1, or the flat index of the first NaN or Inf of ``rows``; the outputs are then
    unspecified. Raises ValueError for an unknown dtype, a ``scale_2`` that is not positive and
    finite, and for arrays that do not fit each other.

    The first call per dtype on a machine compiles for seconds; the code is then on disk.
    """
    form = float_format(dtype)
    rows = np.require(rows, requirements=["C", "A"])
    per_row = blocks_per_row(rows.shape, BLOCK_SIZE)
    count, cols = rows.shape
    require("rows", rows, form.storage, (count, cols))
    require("packed", packed, np.uint8, (count, cols // 2))
    require("scales", scales, np.uint8, (count, per_row))
    blocks = read_only(rows, form).reshape(-1, BLOCK_SIZE)
    chunk = _KERNELS[dtype](blocks, _positive(scale_2), packed.reshape(-1), scales.reshape(-1))
    return bad_index(chunk, blocks, form)


def dequantize_rows(
    packed: NDArray[np.uint8],
    scales: NDArray[np.uint8],
    scale_2: Scalar,
    out_float32: NDArray[np.float32],
) -> None:
    """Write code * (scale * scale_2) to ``out_float32``, [rows, cols]; the rest as
    ``quantize_rows``.

    Both products are rounded to float32. The result is that of ``NVFP4QTensor.dequantize`` to
    float32: the code of negative zero gives zero, and an E4M3 NaN gives NaN. Raises ValueError
    as ``quantize_rows`` does.
    """
    per_row = blocks_per_row(out_float32.shape, BLOCK_SIZE)
    count, cols = out_float32.shape
    require("out_float32", out_float32, np.float32, (count, cols))
    require("packed", packed, np.uint8, (count, cols // 2))
    require("scales", scales, np.uint8, (count, per_row))
    loops.dequantize(
        packed.reshape(-1, BLOCK_SIZE // 2),
        scales.reshape(-1),
        _positive(scale_2),
        out_float32.reshape(-1, BLOCK_SIZE),
    )


def round_rows(rows: NDArray[np.float32], scale_2: Scalar, out_float32: NDArray[np.float32]) -> int:
    """Write the activations ``rows`` to ``out_float32`` as NVFP4 rounds them when a model runs.

    Both are float32 [rows, cols], cols a multiple of 16, and may be one array; ``scale_2`` is
    the ``input_scale`` of the linear. Each block of 16 gets its own E4M3 scale.

    The rule is that of modelopt's fake quantization of inputs, the Triton kernel
    ``fp4_fake_quant_block`` for GPUs, in IEEE arithmetic. (There the divisions of float32 may
    be wrong by 2 units in the last place, so a value that lies that near to a tie can go to the
    other side.) The result is that of ``dequantize_rows`` after ``quantize_rows``, except that
    the scale of a block has no lower bound, and that where scale * scale_2 is below 1e-5 the
    block is rounded in units of 1, which makes zeros of such small values.

    Returns and raises as ``quantize_rows`` does.
    """
    form = float_format("F32")
    rows = np.require(rows, requirements=["C", "A"])
    blocks_per_row(rows.shape, BLOCK_SIZE)
    require("rows", rows, np.float32, rows.shape)
    require("out_float32", out_float32, np.float32, rows.shape)
    blocks = read_only(rows, form).reshape(-1, BLOCK_SIZE)
    chunk = loops.round_blocks(blocks, _positive(scale_2), out_float32.reshape(-1, BLOCK_SIZE))
    return bad_index(chunk, blocks, form)


def _scale_2(amax: Scalar) -> np.float32:
    if not 0 <= amax < np.inf:
        raise ValueError(f"amax is {amax}, expected a finite number that is not negative")
    quotient = np.float32(amax) / np.float32(2688)
    return quotient if quotient > 0 else SCALE_2_OF_ZEROS


def _positive(scale_2: Scalar) -> np.float32:
    if not 0 < np.float32(scale_2) < np.inf:
        raise ValueError(f"scale_2 is {scale_2}, expected a positive finite number")
    return np.float32(scale_2)
