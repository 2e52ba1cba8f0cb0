"""Importance matrices for tests, written as llama-imatrix writes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from carnice_build.checkpoint.gguf_header import encode_gguf
from carnice_build.formats.gguf.imatrix_file import described, imatrix_metadata

Floats = NDArray[np.float32]


def imatrix_file(
    entries: Mapping[str, tuple[Floats, Floats]], datasets: Sequence[str], chunks: int, size: int
) -> bytes:
    """A file in GGUF of sums [matrices, columns] and counts [matrices], by name."""
    names = sorted(entries)
    tensors = [item for name in names for item in described(name, *entries[name][0].shape)]
    arrays = [array for name in names for array in entries[name]]
    made = encode_gguf(imatrix_metadata(datasets, chunks, size), tensors)
    file = bytearray(made.size)
    file[: len(made.header)] = made.header
    for offset, array in zip(made.offsets, arrays, strict=True):
        file[offset : offset + array.nbytes] = array.tobytes()
    return bytes(file)
