"""A tensor in a local file, for code that reads and writes a part of it at a time."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from carnice_build.dtypes import NUMPY_NAME, TensorSpec
from carnice_build.errors import StoreError
from carnice_build.system import read_at, write_at

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, slots=True)
class TensorFile:
    """Where a tensor's bytes are; arrays are as `dtypes.NUMPY_NAME` carries its dtype.

    `name` is what messages call it.
    """

    spec: TensorSpec
    path: str
    offset: int = 0
    name: str = ""

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
        with Path(self.path).open("rb", buffering=0) as file:
            for row, index in zip(array, wanted, strict=True):
                view = row.reshape(-1).view(np.uint8).data
                if read_at(file.fileno(), view, self.offset + index * len(view)) < len(view):
                    raise StoreError("ends inside a tensor", where=self.path)
        return array

    def _read(self, start: int, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
        import numpy as np

        array = np.empty(shape, NUMPY_NAME[self.spec.dtype])
        with Path(self.path).open("rb", buffering=0) as file:
            view = array.reshape(-1).view(np.uint8).data
            if read_at(file.fileno(), view, self.offset + start) < len(view):
                raise StoreError("ends inside a tensor", where=self.path)
        return array

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
