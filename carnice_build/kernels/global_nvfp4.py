"""NVFP4 weights of compressed-tensors 0.19 (``nvfp4-pack-quantized``), bit for bit.

A block of 16 neighbours in a row shares a scale in E4M3, a tensor a float32 ``global_scale``, and
each weight becomes a code in E2M1 with weight ~ code * (scale / global scale).  The rule is that
of llm-compressor's observer ``memoryless_minmax`` with ``generate_gparam`` and
``calculate_qparams`` (compressed_tensors/quantization/utils/helpers.py): the global scale is
2688 times the inverse of the largest magnitude, both rounded to the weight's dtype, and the scale
of a block E4M3(global scale * its largest magnitude / 6), the quotient rounded to that dtype.

So it is near to ModelOpt's NVFP4, whose ``scale_2`` is the inverse, and not equal: ModelOpt
computes all of this in float32.  In BF16 the two steps differ by up to a part in 256, by which
some codes fall to the other side of a tie.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from . import _global_nvfp4_loops as loops
from ._floats import Array, bad_index, blocks_per_row, float_format, read_only, require, widen
from .elementwise import narrow
from .nvfp4 import BLOCK_SIZE, Scalar

_KERNELS = {"BF16": loops.quantize_bf16, "F16": loops.quantize_f16, "F32": loops.quantize_f32}

_LARGEST = 6 * 448
"""The largest magnitude times the global scale: that of E2M1 under that of E4M3."""


def global_scale(amax: Scalar, dtype: str) -> np.float32:
    """The ``weight_global_scale`` of weights of ``dtype`` of that largest magnitude.

    1 where 2688 / amax overflows the dtype: for a weight of zeros or hardly more, which becomes
    zeros, but in F16 for every weight below 0.041.  ValueError unless ``amax`` is finite.
    """
    if not 0 <= amax < np.inf:
        raise ValueError(f"amax is {amax}, expected a finite number that is not negative")
    if amax == 0:
        return np.float32(1)
    with np.errstate(over="ignore"):
        inverse = widen(narrow(np.float32(1) / np.array([amax], np.float32), dtype), dtype)
        scale = np.float32(widen(narrow(inverse * np.float32(_LARGEST), dtype), dtype)[0])
    return scale if np.isfinite(scale) else np.float32(1)


def quantize_rows(
    rows: Array,
    dtype: str,
    scale: Scalar,
    packed: NDArray[np.uint8],
    scales: NDArray[np.uint8],
) -> int:
    """Quantize the rows of a weight under the global scale ``scale``.

    Arguments, layouts and what is returned are as in ``nvfp4.quantize_rows``.  A block whose scale
    rounds to zero gets 0.125; a negative quotient that rounds to zero keeps its sign bit, negative
    zero does not.
    """
    form = float_format(dtype)
    rows = np.require(rows, requirements=["C", "A"])
    per_row = blocks_per_row(rows.shape, BLOCK_SIZE)
    count, columns = rows.shape
    require("rows", rows, form.storage, rows.shape)
    require("packed", packed, np.uint8, (count, columns // 2))
    require("scales", scales, np.uint8, (count, per_row))
    blocks = read_only(rows, form).reshape(-1, BLOCK_SIZE)
    chunk = _KERNELS[dtype](blocks, _positive(scale), packed.reshape(-1), scales.reshape(-1))
    return bad_index(chunk, blocks, form)


def dequantize_rows(
    packed: NDArray[np.uint8],
    scales: NDArray[np.uint8],
    scale: Scalar,
    out_float32: NDArray[np.float32],
) -> None:
    """Write code * (scale / global scale), both rounded to float32, to ``out_float32``.

    It is [rows, columns]; the rest is as in ``quantize_rows``.
    """
    per_row = blocks_per_row(out_float32.shape, BLOCK_SIZE)
    count, columns = out_float32.shape
    require("out_float32", out_float32, np.float32, (count, columns))
    require("packed", packed, np.uint8, (count, columns // 2))
    require("scales", scales, np.uint8, (count, per_row))
    loops.dequantize(
        packed.reshape(-1, BLOCK_SIZE // 2),
        scales.reshape(-1),
        _positive(scale),
        out_float32.reshape(-1, BLOCK_SIZE),
    )


def _positive(scale: Scalar) -> np.float32:
    if not 0 < np.float32(scale) < np.inf:
        raise ValueError(f"the global scale is {scale}, expected a positive finite number")
    return np.float32(scale)
