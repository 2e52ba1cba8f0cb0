"""Rows of weights as ggml takes them: finite, in float32, with an importance for every column."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from .._affine_loops import Floats
from .._floats import FORMATS, Array, FloatFormat, first_non_finite, read_only, require
from .._nvfp4_loops import peak_16, peak_32
from . import _widen_loops as loops

CHUNK = 1 << 16
"""Values that are widened at a time, in whole rows: 256 kB, of the second-level cache."""

_DTYPES = {form.storage: dtype for dtype, form in FORMATS.items()}
_WIDENERS = {"BF16": loops.widen_bf16, "F16": loops.widen_f16}


def checked_rows(rows: Array) -> Array:
    """The rows, C-contiguous; ValueError for what is no matrix of floats."""
    if rows.ndim != 2 or rows.dtype not in _DTYPES:
        kinds = ", ".join(str(storage) for storage in _DTYPES)
        raise ValueError(f"rows is {rows.dtype}{list(rows.shape)}, expected {kinds} [rows, cols]")
    return np.require(rows, requirements=["C", "A"])


def wide_chunks(rows: Array) -> Iterator[tuple[Floats, int]]:
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


def checked_importance(importance: NDArray[np.float32], cols: int) -> Floats:
    """The importance, never writable; ValueError for another number of columns, and for what is
    no importance."""
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
