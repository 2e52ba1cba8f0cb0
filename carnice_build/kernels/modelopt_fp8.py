"""FP8 and MXFP8 weights, bit for bit as NVIDIA ModelOpt exports them from a CPU.

The rules are those of modelopt 0.47: ``to_quantized_weight`` (torch/export/quant_utils.py) for FP8,
one float32 scale a tensor, and ``MXFP8QTensor`` (torch/quantization/qtensor/mxfp8_tensor.py) for
MXFP8, a power of two for each 32 neighbours of a row.  They are not those of compressed-tensors
(``fp8``): zero keeps its sign, and so does what is rounded to it; the scale of FP8 is float32
whatever the weight; and the power of two is the least under which nothing is cut.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from . import _modelopt_fp8_loops as loops
from ._floats import (
    Array,
    bad_index,
    blocks_per_row,
    first_non_finite,
    float_format,
    read_only,
    require,
)
from .nvfp4 import Scalar, _positive

BLOCK_SIZE = loops.BLOCK

SCALE_OF_ZEROS = np.float32(1)
"""The scale of a tensor of zeros, as if its largest magnitude were that of E4M3."""

_LARGEST = np.float32(448)
_SMALLEST_AMAX = np.finfo(np.float32).tiny

_KERNELS = {"BF16": loops.quantize_bf16, "F16": loops.quantize_f16, "F32": loops.quantize_f32}

_BLOCK_KERNELS = {
    "BF16": loops.quantize_blocks_bf16,
    "F16": loops.quantize_blocks_f16,
    "F32": loops.quantize_blocks_f32,
}


def weight_scale(amax: Scalar) -> np.float32:
    """The scale of a weight of that largest magnitude: amax / 448, in float32.

    Where that is zero (a weight of zeros, or of nothing above 3e-43), modelopt exports the scale 0
    and NaN codes.  Here it is ``SCALE_OF_ZEROS`` instead: such a weight dequantizes to zeros.

    Raises ValueError for a negative, infinite or NaN ``amax``.
    """
    quotient = np.float32(_finite(amax)) / _LARGEST
    return quotient if quotient > 0 else SCALE_OF_ZEROS


def input_scale(amax: Scalar) -> np.float32:
    """The ``input_scale`` of a linear whose inputs have that largest magnitude: amax / 448.

    For inputs that were all zero it is ``SCALE_OF_ZEROS``, and other magnitudes count as the
    smallest normal float32 at least, both as modelopt's export has it.

    Raises ValueError for a negative, infinite or NaN ``amax``.
    """
    if _finite(amax) == 0:
        return SCALE_OF_ZEROS
    return np.float32(max(np.float32(amax), _SMALLEST_AMAX) / _LARGEST)


def quantize_tensor(values: Array, dtype: str, scale: Scalar, codes: NDArray[np.uint8]) -> int:
    """Quantize any part of a tensor on the calling thread, without the GIL.

    ``values`` are of ``dtype`` and any shape, ``scale`` is the one of the whole tensor, and
    ``codes``, uint8 of the same shape, get the bits of E4M3.  All are C-contiguous.

    Each weight becomes the value of E4M3 nearest to weight / scale, ties to even, where the
    quotient is first rounded to ``dtype``.  A quotient beyond 448, from a scale that underflowed,
    becomes 448.

    Returns -1, or the flat index of the first NaN or Inf of ``values``; the outputs are then
    unspecified.  Raises ValueError for an unknown dtype, a ``scale`` that is not positive and
    finite, and for arrays that do not fit each other.
    """
    form = float_format(dtype)
    values = np.require(values, requirements=["C", "A"])
    require("values", values, form.storage, values.shape)
    require("codes", codes, np.uint8, values.shape)
    bad = first_non_finite(values, form)
    if bad < 0:
        patterns = read_only(values, form).reshape(-1)
        _KERNELS[dtype](patterns, _positive(scale), codes.reshape(-1))
    return bad


def dequantize_tensor(
    codes: NDArray[np.uint8], scale: Scalar, out_float32: NDArray[np.float32]
) -> None:
    """Write code * scale, in float32; the code of NaN gives NaN."""
    require("codes", codes, np.uint8, out_float32.shape)
    require("out_float32", out_float32, np.float32, codes.shape)
    loops.dequantize(codes.reshape(-1), _positive(scale), out_float32.reshape(-1))


def quantize_rows(
    rows: Array, dtype: str, codes: NDArray[np.uint8], scales: NDArray[np.uint8]
) -> int:
    """Quantize the rows of a weight to MXFP8 on the calling thread, without the GIL.

    ``rows`` is [rows, cols] of ``dtype``, cols a multiple of 32.  The results go to ``codes``,
    uint8 [rows, cols], the bits of E4M3, and to ``scales``, uint8 [rows, cols / 32], the exponents
    of the scales with a bias of 127.  All are C-contiguous.  Rows are independent.

    The scale is the least power of two, from 2**-127 on, that is amax / 448 or more.  modelopt
    finds it by a logarithm in float32, which for float32 weights within a few units in the last
    place above 448 times a power of two can be the power below; here it is exact.

    Returns -1, or the flat index of the first NaN or Inf of ``rows``; the outputs are then
    unspecified.  Raises ValueError for an unknown dtype and for arrays that do not fit each other.
    """
    form = float_format(dtype)
    rows = np.require(rows, requirements=["C", "A"])
    per_row = blocks_per_row(rows.shape, BLOCK_SIZE)
    require("rows", rows, form.storage, rows.shape)
    require("codes", codes, np.uint8, rows.shape)
    require("scales", scales, np.uint8, (rows.shape[0], per_row))
    blocks = read_only(rows, form).reshape(-1, BLOCK_SIZE)
    bad = _BLOCK_KERNELS[dtype](blocks, codes.reshape(-1, BLOCK_SIZE), scales.reshape(-1))
    return bad_index(bad, blocks, form)


def dequantize_rows(
    codes: NDArray[np.uint8], scales: NDArray[np.uint8], out_float32: NDArray[np.float32]
) -> None:
    """Write code * scale, in float32, of MXFP8 rows; arrays as ``quantize_rows`` has them."""
    per_row = blocks_per_row(codes.shape, BLOCK_SIZE)
    require("out_float32", out_float32, np.float32, codes.shape)
    require("codes", codes, np.uint8, codes.shape)
    require("scales", scales, np.uint8, (codes.shape[0], per_row))
    blocks = codes.reshape(-1, BLOCK_SIZE)
    loops.dequantize_blocks(blocks, scales.reshape(-1), out_float32.reshape(-1, BLOCK_SIZE))


def _finite(amax: Scalar) -> Scalar:
    if not 0 <= amax < np.inf:
        raise ValueError(f"amax is {amax}, expected a finite number that is not negative")
    return amax
