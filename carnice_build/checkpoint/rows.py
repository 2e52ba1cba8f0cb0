"""Reading by the byte what can be made by whole rows only."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from carnice_build.tensors import ByteSource, Reader, SourceTensor

FillRows = Callable[[memoryview], None]
"""Fills a buffer with as many whole rows as fit, which follow those of the call before."""


class RowReader:
    """Rows as bytes, of which any number may be asked for."""

    def __init__(self, row_bytes: int, fill: FillRows) -> None:
        self._row_bytes = row_bytes
        self._fill = fill
        self._rest = memoryview(b"")

    def skip(self, count: int) -> None:
        """Leave out some bytes of the first row."""
        if count:
            self._rest = self._row()[count:]

    def read(self, buffer: memoryview) -> None:
        """Fill `buffer` with what follows."""
        done = min(len(self._rest), len(buffer))
        buffer[:done], self._rest = self._rest[:done], self._rest[done:]
        whole = (len(buffer) - done) // self._row_bytes * self._row_bytes
        if whole:
            self._fill(buffer[done : done + whole])
            done += whole
        if done < len(buffer):
            row, left = self._row(), len(buffer) - done
            buffer[done:], self._rest = row[:left], row[left:]

    def _row(self) -> memoryview:
        row = memoryview(bytearray(self._row_bytes))
        self._fill(row)
        return row


class RowsFile(ABC):
    """Rows that are made while they are read, as if a file held them; see `ByteSource`."""

    _row_bytes: int

    @abstractmethod
    def _open_rows(self, first: int, stop: int) -> AbstractContextManager[FillRows]:
        """What fills buffers with the rows from `first` to `stop`, in order."""

    def path(self) -> None:
        """See `ByteSource.path`: there is no such file."""
        return

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """See `Readable.read_into`."""
        with self.open_range(offset, len(buffer)) as read:
            read(buffer)

    @contextmanager
    def open_range(self, offset: int, count: int) -> Iterator[Reader]:
        """See `ByteSource.open_range`."""
        if not count:
            yield lambda buffer: None
            return
        first, skipped = divmod(offset, self._row_bytes)
        stop = -(-(offset + count) // self._row_bytes)
        with self._open_rows(first, stop) as fill:
            reader = RowReader(self._row_bytes, fill)
            reader.skip(skipped)
            yield reader.read


class RowsOfTensor(RowsFile):
    """Rows that are pieces of one tensor in a file."""

    def __init__(self, tensor: SourceTensor, row_bytes: int) -> None:
        """`tensor` has bytes."""
        self._tensor = tensor
        self._row_bytes = row_bytes

    @property
    def _file(self) -> ByteSource:
        assert self._tensor.file is not None
        return self._tensor.file

    @property
    def name(self) -> str:
        """That of the tensor's file."""
        return self._file.name

    @property
    def local(self) -> bool:
        """True when the tensor's file is."""
        return self._file.local
