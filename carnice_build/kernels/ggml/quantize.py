"""The door of the package: rows of weights to rows of bytes, by the name of the type."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .._affine_loops import Floats
from .._floats import FORMATS, Array, FloatFormat, first_non_finite, read_only, require
from .._nvfp4_loops import Bytes, peak_16, peak_32
from . import _k_loops
from . import _widen_loops as loops

Plain = Callable[[Floats, Bytes], None]
"""Of finite float32 rows [rows, cols], which it must not write, to uint8 [rows, row_bytes]."""

Weighted = Callable[[Floats, Floats, Bytes], None]
"""As ``Plain``, with the importance of every column, float32 [cols], between the two."""

CHUNK = 1 << 16
"""Values that are widened at a time, in whole rows: 256 kB, of the second-level cache."""


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
    "Q2_K": Quantizer(256, 84, _k_loops.plain_2, _k_loops.weighted_2),
    "Q4_K": Quantizer(256, 144, _k_loops.plain_4, _k_loops.weighted_4),
    "Q5_K": Quantizer(256, 176, _k_loops.plain_5, _k_loops.weighted_5),
}
"""By the name that ggml has for the type."""

_DTYPES = {form.storage: dtype for dtype, form in FORMATS.items()}
_WIDENERS = {"BF16": loops.widen_bf16, "F16": loops.widen_f16}


def quantize(
    type_name: str,
    rows: Array,
    importance: NDArray[np.float32] | None = None,
    out: Bytes | None = None,
) -> tuple[Bytes, int]:
    """Quantize rows on the calling thread, without the GIL.

    ``rows`` is [rows, cols] of uint16 (the patterns of BF16), float16 or float32, cols a multiple
    of the type's block; ``importance`` is float32 [cols], numbers that are not negative, of which
    only the ratios matter (llama.cpp's imatrix: means of squares of what a linear reads). Types
    that ggml makes without regard of it ignore it. Rows are independent: any split into blocks
    of rows, on any threads, gives the same bytes.

    Returns the bytes, uint8 [rows, row_bytes], which are ``out`` where that is given, and -1 or
    the flat index of the first NaN or Inf of ``rows``; the bytes are then unspecified. Raises
    ValueError for an unknown type and for arrays that do not fit.

    The first call per type on a machine compiles for seconds; the code is then on disk.
    """
    if type_name not in QUANTIZERS:
        raise ValueError(f"type is {type_name!r}, expected one of {', '.join(QUANTIZERS)}")
    quantizer = QUANTIZERS[type_name]
    if rows.ndim != 2 or rows.dtype not in _DTYPES:
        kinds = ", ".join(str(storage) for storage in _DTYPES)
        raise ValueError(f"rows is {rows.dtype}{list(rows.shape)}, expected {kinds} [rows, cols]")
    rows = np.require(rows, requirements=["C", "A"])
    count, cols = rows.shape
    shape = count, quantizer.row_bytes(cols)
    if importance is not None:
        importance = _checked(importance, cols)
    if out is None:
        out = np.empty(shape, np.uint8)
    require("out", out, np.uint8, shape)
    first = 0
    for chunk, bad in _wide_chunks(rows):
        if bad >= 0:
            return out, first * cols + bad
        made = out[first : first + len(chunk)]
        if importance is None or quantizer.weighted is None:
            quantizer.plain(chunk, made)
        else:
            quantizer.weighted(chunk, importance, made)
        first += len(chunk)
    return out, -1


def _wide_chunks(rows: Array) -> Iterator[tuple[Floats, int]]:
    """Blocks of rows in float32, never writable, and the flat index in each of its first NaN or
    Inf, or -1; a block is valid until the next one is asked for."""
    dtype = _DTYPES[rows.dtype]
    form = FORMATS[dtype]
    count, cols = rows.shape
    step = max(1, CHUNK // max(1, cols))
    patterns = read_only(rows, form)
    if dtype == "F32":
        for first in range(0, count, step):
            chunk = patterns[first : first + step]
            yield chunk.view(np.float32), _bad(chunk, form)
        return
    scratch = np.empty((min(step, count), cols), np.float32)
    wide = scratch.view()
    wide.flags.writeable = False
    for first in range(0, count, step):
        chunk = patterns[first : first + step]
        _WIDENERS[dtype](chunk.reshape(-1), scratch[: len(chunk)].reshape(-1))
        yield wide[: len(chunk)], _bad(chunk, form)


def _bad(patterns: Array, form: FloatFormat) -> int:
    """The flat index of the first NaN or Inf, or -1."""
    peak = (peak_32 if form.exponent > 0xFFFF else peak_16)(patterns.reshape(-1))
    return first_non_finite(patterns, form) if peak >= form.exponent else -1


def _checked(importance: NDArray[np.float32], cols: int) -> Floats:
    """The importance, never writable, of as many columns and no nonsense."""
    importance = np.require(importance, requirements=["C", "A"])
    require("importance", importance, np.float32, (cols,))
    sound = np.isfinite(importance) & (importance >= 0)
    if not sound.all():
        column = int(sound.argmin())
        raise ValueError(
            f"importance of column {column} is {importance[column]}, "
            "expected a finite number that is not negative"
        )
    view = importance.view()
    view.flags.writeable = False
    return view
