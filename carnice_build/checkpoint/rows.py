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

    in_files = False
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
        first, stop = self._range(offset, count)
        with self._open_rows(first, stop) as fill:
            yield self._reader(fill, first, offset)

    def _reader(self, fill: FillRows, first: int, offset: int) -> Reader:
        """Reads bytes from `offset` on, given what fills buffers from row `first` on."""
        reader = RowReader(self._row_bytes, fill)
        reader.skip(offset - first * self._row_bytes)
        return reader.read

    def _range(self, offset: int, count: int) -> tuple[int, int]:
        """The rows that hold `count` bytes from `offset` on."""
        return offset // self._row_bytes, -(-(offset + count) // self._row_bytes)


class RowsOfTensor(RowsFile):
    """Rows that are pieces of one tensor in a file, of which a range is read for a range of rows.

    Several of one tensor may be read together; see `together`.
    """

    def __init__(self, tensor: SourceTensor, row_bytes: int) -> None:
        """`tensor` has bytes."""
        self.tensor = tensor
        self._row_bytes = row_bytes

    @abstractmethod
    def _span(self, first: int, stop: int) -> tuple[int, int]:
        """Where in the tensor's file the rows from `first` to `stop` are: offset and count."""

    @abstractmethod
    def _filled_from(self, read: Reader, first: int, stop: int) -> FillRows:
        """What fills buffers with these rows, given what reads their span."""

    def span(self, offset: int, count: int) -> tuple[int, int]:
        """Where in the tensor's file `count` bytes from `offset` on are: offset and count."""
        return self._span(*self._range(offset, count))

    def reader(self, read: Reader, offset: int, count: int) -> Reader:
        """Reads `count` bytes from `offset` on, given what reads their `span`."""
        first, stop = self._range(offset, count)
        return self._reader(self._filled_from(read, first, stop), first, offset)

    @contextmanager
    def _open_rows(self, first: int, stop: int) -> Iterator[FillRows]:
        with self._file.open_range(*self._span(first, stop)) as read:
            yield self._filled_from(read, first, stop)

    @property
    def _file(self) -> ByteSource:
        assert self.tensor.file is not None
        return self.tensor.file

    @property
    def name(self) -> str:
        """That of the tensor's file."""
        return self._file.name

    @property
    def local(self) -> bool:
        """True when the tensor's file is."""
        return self._file.local

    @property
    def random_access(self) -> bool:
        """As the tensor's file."""
        return self._file.random_access

    def held_bytes(self) -> int:
        """See `Holding.held_bytes`."""
        return self.tensor.held_bytes
