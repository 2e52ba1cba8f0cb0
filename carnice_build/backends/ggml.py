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

from carnice_build.checkpoint.gguf_types import TYPES
from carnice_build.errors import BackendError
from carnice_build.extras import pip_install
from carnice_build.kernels._floats import Array, require
from carnice_build.kernels.ggml import checked_importance, checked_rows, wide_chunks

Bytes = NDArray[np.uint8]

_NOT_MADE = ("I8", "I16", "I32", "I64", "F64")


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
    types = {name: found for name, found in TYPES.items() if name not in _NOT_MADE}
    if type_name not in types:
        raise ValueError(f"type is {type_name!r}, expected one of {', '.join(types)}")
    number = types[type_name].number
    rows = checked_rows(rows)
    count, cols = rows.shape
    shape = count, types[type_name].row_bytes(cols)
    if importance is not None:
        importance = checked_importance(importance, cols)
    elif library.ggml_quantize_requires_imatrix(number):
        raise ValueError(f"{type_name} wants an importance of columns")
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
    library.ggml_quantize_requires_imatrix.restype = ctypes.c_bool
    library.ggml_quantize_chunk.argtypes = [number, pointer, pointer, size, size, size, pointer]
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    return library
