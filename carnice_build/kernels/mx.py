"""MXFP4 and MXFP8 weights of compressed-tensors 0.19, bit for bit (``mxfp4-pack-quantized``,
``mxfp8-quantized``).

A block of 32 neighbours in a row shares a power of two, stored as its exponent plus 127 (E8M0), and
each weight becomes the code in E2M1 or E4M3 nearest to weight / scale, ties to even.  The rule is
that of llm-compressor's observer ``memoryless_minmax`` with ``generate_mx_scales``
(compressed_tensors/quantization/utils/mxfp_utils.py): the power of two that is not above the
block's largest magnitude, or the next one from 1.75 times it on, over 4 for E2M1 and 256 for E4M3.

The smallest scale is 2**-127; in F16, which holds none below 2**-24, smaller ones become 1, and so
do those of blocks of F16's denormals.  A magnitude of 1.75 times the largest power of two of its
dtype, or more, is refused: the library makes zeros of its block.  A weight of negative zero becomes
zero, as where ``oneshot`` adds a zero point of 0; ``model_free_ptq`` keeps the sign in E4M3.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from . import _mx_loops as loops
from ._floats import Array, blocks_per_row, first_non_finite, float_format, read_only, require

BLOCK_SIZE = loops.BLOCK

_KERNELS = {"BF16": loops.quantize_bf16, "F16": loops.quantize_f16, "F32": loops.quantize_f32}
_LARGEST = {"BF16": 0x7F60, "F16": 0x7B00, "F32": 0x7F600000}
"""1.75 times the largest power of two, as bits."""

BITS = (4, 8)


def quantize_rows(
    rows: Array,
    dtype: str,
    bits: int,
    codes: NDArray[np.uint8],
    scales: NDArray[np.uint8],
) -> int:
    """Quantize the rows of a weight on the calling thread, without the GIL.

    ``rows`` is [rows, columns] of ``dtype``, columns a multiple of 32.  ``codes`` is uint8
    [rows, columns], the bits of E4M3, for ``bits`` 8, and [rows, columns / 2], the first code of
    each pair in the low half, for 4; ``scales`` is uint8 [rows, columns / 32].  All are
    C-contiguous.  Rows are independent: any split into blocks of rows gives the same bytes.

    Returns -1, or the flat index of the first NaN or Inf of ``rows``; the outputs are then
    unspecified.  Raises ValueError for a weight too large for a scale, and for arrays that do not
    fit each other.

    The first call per dtype on a machine compiles for seconds; the code is then on disk.
    """
    form = float_format(dtype)
    rows = np.require(rows, requirements=["C", "A"])
    require("rows", rows, form.storage, rows.shape)
    _require_fit(rows.shape, bits, codes, scales)
    blocks = read_only(rows, form).reshape(-1, BLOCK_SIZE)
    chunk = int(_KERNELS[dtype](blocks, bits, codes.reshape(-1), scales.reshape(-1)))
    if chunk < 0:
        return -1
    bad = first_non_finite(blocks[chunk:], form)
    if bad < 0:
        raise ValueError(f"a weight of {_largest(dtype)} or more has no scale in {dtype}")
    return chunk * BLOCK_SIZE + bad


def dequantize_rows(
    codes: NDArray[np.uint8],
    bits: int,
    scales: NDArray[np.uint8],
    out_float32: NDArray[np.float32],
) -> None:
    """Write code * scale to ``out_float32`` [rows, columns]; the rest as ``quantize_rows``.

    The product is rounded to float32; the scale of 255, NaN in E8M0, gives Inf.
    """
    require("out_float32", out_float32, np.float32, out_float32.shape)
    _require_fit(out_float32.shape, bits, codes, scales)
    loops.dequantize(
        codes.reshape(-1), bits, scales.reshape(-1), out_float32.reshape(-1, BLOCK_SIZE)
    )


def _require_fit(
    shape: tuple[int, ...], bits: int, codes: NDArray[np.uint8], scales: NDArray[np.uint8]
) -> None:
    if bits not in BITS:
        raise ValueError(f"bits is {bits}, expected one of {BITS}")
    per_row = blocks_per_row(shape, BLOCK_SIZE)
    rows, columns = shape
    require("codes", codes, np.uint8, (rows, columns * bits // 8))
    require("scales", scales, np.uint8, (rows, per_row))


def _largest(dtype: str) -> str:
    return "57344" if dtype == "F16" else "1.75 * 2**127"
