"""Reading by the byte what can be made by whole rows only."""

from __future__ import annotations

from collections.abc import Callable

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
