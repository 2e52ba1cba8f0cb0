"""The door of the package: rows of weights to rows of bytes, by the name of the type."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .._affine_loops import Floats
from .._floats import Array, require
from .._nvfp4_loops import Bytes
from . import (
    _cast_loops,
    _iq4_loops,
    _k_loops,
    _plain_loops,
    _q3_k_loops,
    _q6_k_loops,
    _weighted_loops,
)
from .rows import checked_importance, checked_rows, wide_chunks

Plain = Callable[[Floats, Bytes], None]
"""Of finite float32 rows [rows, cols], which it must not write, to uint8 [rows, row_bytes]."""

Weighted = Callable[[Floats, Floats, Bytes], None]
"""As ``Plain``, with the importance of every column, float32 [cols], between the two."""


class Quantizer(NamedTuple):
    """How a type is made: values and bytes of a block, and the kernels.

    ``weighted`` is None for a type to which ggml quantizes without regard of importance.
    """

    elements: int
    nbytes: int
    plain: Plain
    weighted: Weighted | None

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row; ValueError for one that is not whole blocks."""
        blocks, rest = divmod(columns, self.elements)
        if rest:
            raise ValueError(f"{columns} columns are not whole blocks of {self.elements}")
        return blocks * self.nbytes


QUANTIZERS: Mapping[str, Quantizer] = {
    "F32": Quantizer(1, 4, _cast_loops.f32, None),
    "F16": Quantizer(1, 2, _cast_loops.f16, None),
    "BF16": Quantizer(1, 2, _cast_loops.bf16, None),
    "Q4_0": Quantizer(32, 18, _plain_loops.q4_0, _weighted_loops.q4_0),
    "Q4_1": Quantizer(32, 20, _plain_loops.q4_1, _weighted_loops.q4_1),
    "Q5_0": Quantizer(32, 22, _plain_loops.q5_0, _weighted_loops.q5_0),
    "Q5_1": Quantizer(32, 24, _plain_loops.q5_1, _weighted_loops.q5_1),
    "Q8_0": Quantizer(32, 34, _plain_loops.q8_0, None),
    "Q2_K": Quantizer(256, 84, _k_loops.plain_2, _k_loops.weighted_2),
    "Q3_K": Quantizer(256, 110, _q3_k_loops.plain, _q3_k_loops.weighted),
    "Q4_K": Quantizer(256, 144, _k_loops.plain_4, _k_loops.weighted_4),
    "Q5_K": Quantizer(256, 176, _k_loops.plain_5, _k_loops.weighted_5),
    "Q6_K": Quantizer(256, 210, _q6_k_loops.plain, _q6_k_loops.weighted),
    "IQ4_NL": Quantizer(32, 18, _iq4_loops.plain_nl, _iq4_loops.weighted_nl),
    "IQ4_XS": Quantizer(256, 136, _iq4_loops.plain_xs, _iq4_loops.weighted_xs),
    "MXFP4": Quantizer(32, 17, _plain_loops.mxfp4, None),
}
"""By the name that ggml has for the type."""


def quantize(
    type_name: str,
    rows: Array,
    importance: NDArray[np.float32] | None = None,
    out: Bytes | None = None,
) -> tuple[Bytes, int]:
    """Quantize rows on the calling thread, without the GIL.

    ``rows`` is [rows, cols] of uint16 (the patterns of BF16), float16 or float32, cols a multiple
    of the type's block; ``importance`` is float32 [cols], finite and not negative (llama.cpp's
    imatrix: means of squares of what a linear reads). Types that ggml makes without regard of it
    ignore it. Rows are independent: any split into blocks of rows, on any threads, gives the same
    bytes.

    Returns the bytes, uint8 [rows, row_bytes], which are ``out`` where that is given, and -1 or
    the flat index of the first NaN or Inf of ``rows``; the bytes are then unspecified. Raises
    ValueError for an unknown type and for arrays that do not fit.

    The first call per type on a machine compiles for seconds; the code is then on disk.
    """
    if type_name not in QUANTIZERS:
        raise ValueError(f"type is {type_name!r}, expected one of {', '.join(QUANTIZERS)}")
    quantizer = QUANTIZERS[type_name]
    rows = checked_rows(rows)
    count, cols = rows.shape
    shape = count, quantizer.row_bytes(cols)
    if importance is not None:
        importance = checked_importance(importance, cols)
    if out is None:
        out = np.empty(shape, np.uint8)
    require("out", out, np.uint8, shape)
    first = 0
    for chunk, bad in wide_chunks(rows):
        if bad >= 0:
            return out, first * cols + bad
        made = out[first : first + len(chunk)]
        if importance is None or quantizer.weighted is None:
            quantizer.plain(chunk, made)
        else:
            quantizer.weighted(chunk, importance, made)
        first += len(chunk)
    return out, -1
