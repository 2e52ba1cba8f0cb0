"""MLX's floating-point modes, bit for bit as ``mlx.core.quantize(mode=...)`` has them on a CPU.

The rule is that of ``fp_quantize`` of mlx 0.32 (mlx/ops.cpp).  A group of neighbours in a row
shares a scale of one byte, and each weight becomes a code of E2M1 or of E4M3:

- ``mxfp4`` and ``mxfp8``: the scale is the least power of two that is not below the group's
  largest magnitude over 6 or 448, that quotient rounded to the weight's type first.
- ``nvfp4``: the scale is the E4M3 nearest to that quotient, 448 at most, and the quotients of
  weights are rounded to the weight's type; a group whose scale rounds to 0 becomes 0.
- A code of E2M1 is the nearest, of two the smaller, and no zero is negative; one of E4M3 is the
  nearest, ties to even, and keeps the sign.  What lies beyond the largest becomes the largest.

In two places mlx's bytes stand for other numbers than it was given, and ours do not: a group whose
quotient is below 2**-127 gets that scale, the least there is, where mlx counts on below and stores
what is left of the number modulo 256, a huge scale; and in ``nvfp4`` weights beyond 1.5e10, to
which several codes are equally near in float32, become the largest, not 0 or another.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from . import _mlx_float_loops as loops
from ._floats import Array, bad_index, blocks_per_row, float_format, read_only, require


@dataclass(frozen=True, slots=True)
class FloatMode:
    """``bits`` a code, ``group_size`` codes a scale, and its number in the loops."""

    bits: int
    group_size: int
    number: int


MODES = {
    "mxfp4": FloatMode(4, 32, loops.MXFP4),
    "nvfp4": FloatMode(4, 16, loops.NVFP4),
    "mxfp8": FloatMode(8, 32, loops.MXFP8),
}

_KERNELS = {"BF16": loops.quantize_bf16, "F16": loops.quantize_f16, "F32": loops.quantize_f32}


def quantize_rows(
    weight: Array, dtype: str, mode: str, packed: NDArray[np.uint32], scales: NDArray[np.uint8]
) -> int:
    """Quantize the rows of ``weight`` on the calling thread, without the GIL.

    ``weight`` is [rows, cols] of ``dtype``, cols a multiple of the mode's group size.
    The codes go to ``packed``, uint32 [rows, cols * bits / 32], the first one lowest, and the
    scales to ``scales``, uint8 [rows, cols / group size].  All are C-contiguous; the outputs are
    aligned too.  Rows are independent: any split into blocks of rows, on any threads, gives the
    same bytes.

    Returns -1, or the flat index of the first NaN or Inf of ``weight``; the outputs are then
    unspecified.  Raises ValueError for an unknown dtype or mode, and for arrays that do not fit
    each other.

    The first call per dtype on a machine compiles for seconds; the code is then on disk.
    """
    form = float_format(dtype)
    weight = np.require(weight, requirements=["C", "A"])
    found = _fitting(weight.shape, mode, packed, scales)
    require("weight", weight, form.storage, weight.shape)
    groups = read_only(weight, form).reshape(-1, found.group_size)
    chunk = _KERNELS[dtype](
        groups, found.number, packed.reshape(-1).view(np.uint8), scales.reshape(-1)
    )
    return bad_index(chunk, groups, form)


def dequantize_rows(
    packed: NDArray[np.uint32],
    scales: NDArray[np.uint8],
    mode: str,
    out_float32: NDArray[np.float32],
) -> None:
    """Write code * scale to ``out_float32`` [rows, cols], one product in float32.

    ``mlx.core.dequantize(dtype=float32)`` gives the same bits.  Raises ValueError as
    ``quantize_rows`` does.
    """
    found = _fitting(out_float32.shape, mode, packed, scales)
    require("out_float32", out_float32, np.float32, out_float32.shape)
    codes = packed.reshape(-1).view(np.uint8)
    groups = out_float32.reshape(-1, found.group_size)
    loops.dequantize(codes, scales.reshape(-1), found.number, groups)


def _fitting(
    shape: tuple[int, ...], mode: str, packed: NDArray[np.uint32], scales: NDArray[np.uint8]
) -> FloatMode:
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}, expected one of {', '.join(MODES)}")
    found = MODES[mode]
    per_row = blocks_per_row(shape, found.group_size)
    rows, cols = shape
    require("packed", packed, np.uint32, (rows, cols * found.bits // 32))
    require("scales", scales, np.uint8, (rows, per_row))
    return found
