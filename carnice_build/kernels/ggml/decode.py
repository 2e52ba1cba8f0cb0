"""Rows of ggml's types back to float32, as ``gguf.quants.dequantize`` and ggml itself do it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from .._affine_loops import Floats
from .._floats import require
from .._nvfp4_loops import Bytes
from . import _decode_loops as loops
from .quantize import QUANTIZERS

DECODERS: Mapping[str, Callable[[Bytes, Floats], None]] = {
    "F32": loops.f32,
    "F16": loops.f16,
    "BF16": loops.bf16,
    "Q4_0": loops.q4_0,
    "Q4_1": loops.q4_1,
    "Q5_0": loops.q5_0,
    "Q5_1": loops.q5_1,
    "Q8_0": loops.q8_0,
    "Q2_K": loops.q2_k,
    "Q3_K": loops.q3_k,
    "Q4_K": loops.q4_k,
    "Q5_K": loops.q5_k,
    "Q6_K": loops.q6_k,
    "IQ4_NL": loops.iq4_nl,
    "IQ4_XS": loops.iq4_xs,
    "MXFP4": loops.mxfp4,
}
"""By the name that ggml has for the type, of blocks [n, nbytes]."""


def dequantize(
    type_name: str, data: Bytes, out: NDArray[np.float32] | None = None
) -> NDArray[np.float32]:
    """Decode rows on the calling thread, without the GIL.

    ``data`` is uint8 [rows, row_bytes] of whole blocks. Returns float32 [rows, cols], which is
    ``out`` where that is given. NaN and Inf of a scale go on into its values. Raises ValueError for
    an unknown type and for arrays that do not fit.
    """
    if type_name not in DECODERS:
        raise ValueError(f"type is {type_name!r}, expected one of {', '.join(DECODERS)}")
    elements, nbytes = QUANTIZERS[type_name].elements, QUANTIZERS[type_name].nbytes
    if data.ndim != 2 or data.shape[1] % nbytes:
        raise ValueError(f"data is {list(data.shape)}, expected [rows, a multiple of {nbytes}]")
    data = np.require(data, requirements=["C"])
    require("data", data, np.uint8, data.shape)
    shape = data.shape[0], data.shape[1] // nbytes * elements
    if out is None:
        out = np.empty(shape, np.float32)
    require("out", out, np.float32, shape)
    blocks = data.view()
    blocks.flags.writeable = False
    DECODERS[type_name](blocks.reshape(-1, nbytes), out.reshape(-1, elements))
    return out
