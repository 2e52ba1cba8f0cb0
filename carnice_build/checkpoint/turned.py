"""Matrices of a stack that lie with columns for rows in their file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from carnice_build.checkpoint.rows import FillRows, RowsOfTensor
from carnice_build.dtypes import ITEM_SIZE, TensorSpec
from carnice_build.tensors import Reader, SourceTensor

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]


class Turned(RowsOfTensor):
    """Columns of the matrices [lines, columns] of a stack, as rows; see `ByteSource`.

    A column is a piece of every line, so a matrix is read and held as a whole while its columns
    are read.
    """

    def __init__(self, tensor: SourceTensor, columns: range) -> None:
        """`tensor` [slabs, lines, columns] has bytes; of its columns, those that are chosen."""
        self._columns = columns
        self._slabs, self._lines, self._width = tensor.spec.shape
        self._item = ITEM_SIZE[tensor.spec.dtype]
        super().__init__(tensor, self._lines * self._item)

    @property
    def size(self) -> int:
        """Bytes of all chosen columns."""
        return self._slabs * len(self._columns) * self._row_bytes

    @property
    def identity(self) -> str:
        """The tensor's, and how it is turned."""
        chosen = self._columns
        how = f"{chosen.start}:{chosen.stop}:{chosen.step} of {list(self.tensor.spec.shape)}"
        return f"turned|{how}|{self.tensor.identity}"

    @property
    def random_access(self) -> bool:
        """False: a small read costs a matrix."""
        return False

    @property
    def _matrix_bytes(self) -> int:
        return self._lines * self._width * self._item

    def locate(self, offset: int) -> tuple[SourceTensor, int]:
        """See `Composite.locate`."""
        row, inner = divmod(offset, self._row_bytes)
        slab, column = divmod(row, len(self._columns))
        line, rest = divmod(inner, self._item)
        index = (slab * self._lines + line) * self._width + self._columns[column]
        return self.tensor, index * self._item + rest

    def held_bytes(self) -> int:
        """See `Holding.held_bytes`: a matrix, and its columns as rows."""
        rows = len(self._columns) * self._row_bytes
        return self._matrix_bytes + rows + self.tensor.held_bytes

    def _span(self, first: int, stop: int) -> tuple[int, int]:
        slabs = range(first // len(self._columns), -(-stop // len(self._columns)))
        start = self.tensor.offset + slabs.start * self._matrix_bytes
        return start, len(slabs) * self._matrix_bytes

    def _filled_from(self, read: Reader, first: int, stop: int) -> FillRows:
        import numpy as np

        held: Array | None = None
        at = first

        def fill(buffer: memoryview) -> None:
            nonlocal at, held
            rows = np.frombuffer(buffer, np.uint8).reshape(-1, self._row_bytes)
            done = 0
            while done < len(rows):
                column = at % len(self._columns)
                if held is None or column == 0:
                    held = None  # or two matrices would be there while the next is turned
                    held = self._matrix(read)
                some = rows[done : done + len(held) - column]
                some[:] = held[column : column + len(some)]
                done, at = done + len(some), at + len(some)

        return fill

    def _matrix(self, read: Reader) -> Array:
        """The chosen columns of the next matrix, [columns, bytes of a row]."""
        import numpy as np

        lines = np.empty((self._lines, self._width), f"u{self._item}")
        read(lines.reshape(-1).view(np.uint8).data)
        chosen = self._columns
        columns = lines[:, chosen.start : chosen.stop : chosen.step].T
        return np.ascontiguousarray(columns).view(np.uint8)


def turned_stack(
    name: str, tensor: SourceTensor, start: int, stop: int, step: int = 1
) -> SourceTensor:
    """Columns `start` to `stop`, or every `step`-th, of every matrix of [slabs, lines, columns].

    As a stack [slabs, columns, lines] called `name`.
    """
    slabs, lines, width = tensor.spec.shape
    columns = range(start, stop, step)
    assert 0 <= start <= stop <= width, "columns beyond the matrix"
    spec = TensorSpec(tensor.spec.dtype, (slabs, len(columns), lines))
    file = Turned(tensor, columns) if tensor.file is not None else None
    return SourceTensor(name, spec, file, 0, tensor.share(spec))
