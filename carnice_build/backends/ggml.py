"""ggml's own quantization, behind the signature of our kernels, for any type that ggml has.

It is a library of C, which the wheel libggml-python brings. It is told every size, and ends the
process where one is wrong; so everything is checked before.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from carnice_build.errors import BackendError
from carnice_build.extras import pip_install
from carnice_build.kernels._floats import Array, require
from carnice_build.kernels.ggml.rows import checked_importance, checked_rows, wide_chunks

Bytes = NDArray[np.uint8]

_NUMBERS = 40
"""What the numbers of types are below, up to MXFP4; the library checks none."""

_FLOATS = (0, 1, 30)
"""F32, F16, BF16."""

_OF_ACTIVATIONS = ("Q8_1", "Q8_K")
"""What ggml quantizes to only as it multiplies."""


def quantize_with_ggml(
    type_name: str,
    rows: Array,
    importance: NDArray[np.float32] | None = None,
    out: Bytes | None = None,
) -> tuple[Bytes, int]:
    """As `carnice_build.kernels.ggml.quantize`, by `ggml_quantize_chunk`.

    Raises BackendError where the library is not installed, and ValueError also for a type that
    wants an importance and gets none.
    """
    library = _library()
    number = _types().get(type_name.upper())
    if number is None:
        raise ValueError(f"type is {type_name!r}, expected one of {', '.join(_types())}")
    rows = checked_rows(rows)
    count, cols = rows.shape
    elements = library.ggml_blck_size(number)
    if cols % elements:
        raise ValueError(f"{cols} columns are not whole blocks of {elements}")
    if importance is not None:
        importance = checked_importance(importance, cols)
    elif library.ggml_quantize_requires_imatrix(number):
        raise ValueError(f"{type_name} wants an importance of columns")
    shape = count, library.ggml_row_size(number, cols)
    if out is None:
        out = np.empty(shape, np.uint8)
    require("out", out, np.uint8, shape)
    first = 0
    for chunk, bad in wide_chunks(rows):
        if bad >= 0:
            return out, first * cols + bad
        library.ggml_quantize_chunk(
            number,
            chunk.ctypes.data,
            out[first:].ctypes.data,
            0,
            len(chunk),
            cols,
            None if importance is None else importance.ctypes.data,
        )
        first += len(chunk)
    return out, -1


@lru_cache
def _library() -> ctypes.CDLL:
    """The library, whose functions run without the GIL."""
    found = find_spec("libggml")
    folders = found.submodule_search_locations if found else None
    files = [file for folder in folders or () for file in Path(folder).glob("lib*/*ggml-base.*")]
    if not files:
        raise BackendError("ggml is not installed", expected=pip_install("ggml"))
    library = ctypes.CDLL(str(min(files, key=lambda file: len(file.name))))
    size, pointer, number = ctypes.c_int64, ctypes.c_void_p, ctypes.c_int
    library.ggml_type_name.restype = ctypes.c_char_p
    library.ggml_blck_size.restype = size
    library.ggml_row_size.argtypes = [number, size]
    library.ggml_row_size.restype = ctypes.c_size_t
    library.ggml_quantize_requires_imatrix.restype = ctypes.c_bool
    library.ggml_quantize_chunk.argtypes = [number, pointer, pointer, size, size, size, pointer]
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    return library


@lru_cache
def _types() -> dict[str, int]:
    """The number of each type that ggml makes of floats, by its name in upper case."""
    library = _library()
    made = [n for n in range(_NUMBERS) if n in _FLOATS or library.ggml_is_quantized(n)]
    names = {library.ggml_type_name(number).decode().upper(): number for number in made}
    return {name: number for name, number in names.items() if name not in _OF_ACTIVATIONS}
