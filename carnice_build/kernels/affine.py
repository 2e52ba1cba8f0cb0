"""Affine quantization of weights, bit for bit as ``mlx.core.quantize`` does it on a CPU.

The rule is that of the CPU ``Quantize`` primitive of mlx 0.32 (mlx/backend/cpu/quantized.cpp).
A group of ``group_size`` neighbours in a row shares a scale and a bias, and each weight becomes
an integer code of ``bits`` bits with weight ~ scale * code + bias. The arithmetic is float32;
scales and biases are rounded to the weight's dtype only when they are stored, after the codes
were computed with the unrounded ones.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from . import _affine_loops as loops
from ._floats import Array, bad_index, float_format, read_only, require, widen

BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)

_KERNELS = {"BF16": loops.quantize_bf16, "F16": loops.quantize_f16, "F32": loops.quantize_f32}


def quantize_rows(
    weight: Array,
    dtype: str,
    bits: int,
    group_size: int,
    packed: NDArray[np.uint32],
    scales: Array,
    biases: Array,
) -> int:
    """Quantize the rows of ``weight`` on the calling thread, without the GIL.

    ``weight`` is [rows, cols] of ``dtype``, cols a multiple of ``group_size``.
    The results go to ``packed``, uint32 [rows, cols * bits / 32], the codes as one stream of
    bits, the first one lowest; and to ``scales`` and ``biases``, [rows, cols / group_size] of
    ``dtype``. All are C-contiguous; the outputs are aligned too. Rows are independent: any
    split into blocks of rows, on any threads, gives the same bytes.

    Returns -1, or the flat index of the first NaN or Inf of ``weight``; the outputs are then
    unspecified. Raises ValueError for an unknown dtype, bits or group size, and for arrays
    that do not fit each other.

    The first call per dtype on a machine compiles for seconds; the code is then on disk.
    The first call of a process starts numba, which takes far longer than loading a kernel:
    make it on a worker thread, beside the first reads.
    """
    form = float_format(dtype)
    weight = np.require(weight, requirements=["C", "A"])
    groups_per_row = _groups_per_row(weight.shape, bits, group_size)
    rows, cols = weight.shape
    require("weight", weight, form.storage, (rows, cols))
    require("packed", packed, np.uint32, (rows, cols * bits // 32))
    require("scales", scales, form.storage, (rows, groups_per_row))
    require("biases", biases, form.storage, (rows, groups_per_row))
    groups = read_only(weight, form).reshape(-1, group_size)
    chunk = _KERNELS[dtype](
        groups,
        bits,
        packed.reshape(-1),
        scales.reshape(-1).view(form.bits),
        biases.reshape(-1).view(form.bits),
    )
    return bad_index(chunk, groups, form)


def dequantize_rows(
    packed: NDArray[np.uint32],
    scales: Array,
    biases: Array,
    dtype: str,
    bits: int,
    group_size: int,
    out_float32: NDArray[np.float32],
) -> None:
    """Write scale * code + bias to ``out_float32``, [rows, cols]; the rest as ``quantize_rows``.

    The product and the sum are each rounded to float32. ``mlx.core.dequantize`` gives the same
    bits for F32 scales and biases; for BF16 and F16 ones it rounds the product and the sum to
    that dtype instead. Raises ValueError as ``quantize_rows`` does.
    """
    form = float_format(dtype)
    groups_per_row = _groups_per_row(out_float32.shape, bits, group_size)
    rows, cols = out_float32.shape
    require("out_float32", out_float32, np.float32, (rows, cols))
    require("packed", packed, np.uint32, (rows, cols * bits // 32))
    require("scales", scales, form.storage, (rows, groups_per_row))
    require("biases", biases, form.storage, (rows, groups_per_row))
    loops.dequantize(
        packed.reshape(-1),
        widen(scales.reshape(-1), dtype),
        widen(biases.reshape(-1), dtype),
        bits,
        out_float32.reshape(-1, group_size),
    )


def _groups_per_row(shape: tuple[int, ...], bits: int, group_size: int) -> int:
    if bits not in BITS:
        raise ValueError(f"bits is {bits}, expected one of {BITS}")
    if group_size not in GROUP_SIZES:
        raise ValueError(f"group_size is {group_size}, expected one of {GROUP_SIZES}")
    if len(shape) != 2 or shape[1] % group_size:
        raise ValueError(f"shape {list(shape)} is not [rows, a multiple of {group_size}]")
    return shape[1] // group_size
