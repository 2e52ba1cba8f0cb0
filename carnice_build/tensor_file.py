"""A tensor in a local file, for code that reads and writes a part of it at a time."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from carnice_build.dtypes import NUMPY_NAME, TensorSpec
from carnice_build.errors import StoreError
from carnice_build.system import read_at, write_at
from carnice_build.tensors import Place

if TYPE_CHECKING:
    import numpy as np


class _Files(ExitStack):
    """Files that are read, each opened when it is first asked for."""

    def __init__(self) -> None:
        super().__init__()
        self._descriptors: dict[str, int] = {}

    def descriptor(self, path: str) -> int:
        """That of the file `path`."""
        if path not in self._descriptors:
            self._descriptors[path] = os.open(path, os.O_RDONLY)
            self.callback(os.close, self._descriptors[path])
        return self._descriptors[path]


@dataclass(frozen=True, slots=True)
class TensorFile:
    """Where a tensor's bytes are; arrays are as `dtypes.NUMPY_NAME` carries its dtype.

    `name` is what messages call it.
    One that is only read may lie in several `ranges`, end to end, the first of which is at `path`
    and `offset`: experts that a checkpoint has one by one.
    """

    spec: TensorSpec
    path: str
    offset: int = 0
    name: str = ""
    ranges: tuple[Place, ...] = ()

    def read(self) -> np.ndarray[Any, Any]:
        """The whole tensor, in memory of its own."""
        return self._read(0, self.spec.shape)

    def read_row(self, index: int) -> np.ndarray[Any, Any]:
        """Index `index` of the first axis, in memory of its own."""
        return self._read(index * self.spec.row_bytes, self.spec.shape[1:])

    def gather(self, indices: Iterable[int]) -> np.ndarray[Any, Any]:
        """These indices of the first axis, in this order, without reading the others."""
        import numpy as np

        wanted = list(indices)
        array = np.empty((len(wanted), *self.spec.shape[1:]), NUMPY_NAME[self.spec.dtype])
        with _Files() as files:
            for row, index in zip(array, wanted, strict=True):
                view = row.reshape(-1).view(np.uint8).data
                self._fill(files, view, index * len(view))
        return array

    def _read(self, start: int, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
        import numpy as np

        array = np.empty(shape, NUMPY_NAME[self.spec.dtype])
        with _Files() as files:
            self._fill(files, array.reshape(-1).view(np.uint8).data, start)
        return array

    def _fill(self, files: _Files, view: memoryview, start: int) -> None:
        """Fill `view` with the bytes of the tensor from `start` on."""
        for path, offset, count in self.ranges or ((self.path, self.offset, self.spec.nbytes),):
            if start < count and view:
                some = view[: count - start]
                if read_at(files.descriptor(str(path)), some, offset + start) < len(some):
                    raise StoreError("ends inside a tensor", where=str(path))
                view = view[len(some) :]
            start = max(0, start - count)

    def write(self, array: np.ndarray[Any, Any]) -> None:
        """Write the whole tensor."""
        self._write(0, array)

    def write_row(self, index: int, array: np.ndarray[Any, Any]) -> None:
        """Write index `index` of the first axis, or the first part of it."""
        self._write(index * self.spec.row_bytes, array)

    def _write(self, start: int, array: np.ndarray[Any, Any]) -> None:
        import numpy as np

        view = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
        with Path(self.path).open("r+b", buffering=0) as file:
            write_at(file.fileno(), view, self.offset + start)
