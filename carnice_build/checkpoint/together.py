"""Reading several parts of one tensor together: its bytes come once for all of them.

Rows of gates and ups may take turns in a tensor, so that whoever reads the ones reads the others.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

from carnice_build.checkpoint.rows import RowsOfTensor
from carnice_build.tensors import Reader, SourceTensor

_PIECE_BYTES = 1 << 20


def whole(source: SourceTensor) -> SourceTensor:
    """The tensor whose bytes are read for `source`: one that it is a part of, or itself."""
    return source.file.tensor if isinstance(source.file, RowsOfTensor) else source


def together(sources: Iterable[SourceTensor]) -> Sequence[Sequence[SourceTensor]]:
    """The sources, those beside each other for which the same bytes are read."""
    groups: dict[str, list[SourceTensor]] = {}
    for source in sources:
        groups.setdefault(whole(source).identity, []).append(source)
    return list(groups.values())


@contextmanager
def open_together(sources: Sequence[SourceTensor]) -> Iterator[Sequence[Reader]]:
    """Read all bytes of each of `sources` in order, one thread all of them.

    Bytes that several need come once, and are held while one has read them and another has not.
    """
    readers: dict[str, Reader] = {}
    with ExitStack() as opened:
        for group in together(sources):
            if len(group) > 1:
                readers |= opened.enter_context(_shared(group))
                continue
            (source,) = group
            assert source.file is not None
            read = source.file.open_range(source.offset, source.spec.nbytes)
            readers[source.identity] = opened.enter_context(read)
        yield [readers[source.identity] for source in sources]


def read_together(sources: Sequence[SourceTensor], buffers: Sequence[memoryview]) -> None:
    """Fill each of `buffers` with all bytes of its source."""
    pieces = 1 + max(len(buffer) for buffer in buffers) // _PIECE_BYTES
    with open_together(sources) as readers:
        for piece in range(pieces):
            for read, buffer in zip(readers, buffers, strict=True):
                start, stop = (len(buffer) * end // pieces for end in (piece, piece + 1))
                read(buffer[start:stop])


@contextmanager
def _shared(group: Sequence[SourceTensor]) -> Iterator[Mapping[str, Reader]]:
    """What reads each of `group`, by their identities."""
    file = whole(group[0]).file
    assert file is not None
    spans = [_span(source) for source in group]
    first = min(start for start, _ in spans)
    stop = max(start + count for start, count in spans)
    with file.open_range(first, stop - first) as read:
        shared = _Shared(read, [start for start, _ in spans])
        yield {
            source.identity: _reader(source, partial(shared.read, number))
            for number, source in enumerate(group)
        }


def _span(source: SourceTensor) -> tuple[int, int]:
    if isinstance(source.file, RowsOfTensor):
        return source.file.span(source.offset, source.spec.nbytes)
    return source.offset, source.spec.nbytes


def _reader(source: SourceTensor, read: Reader) -> Reader:
    if isinstance(source.file, RowsOfTensor):
        return source.file.reader(read, source.offset, source.spec.nbytes)
    return read


class _Shared:
    """Bytes that come in order, for several who read them, each in order from a place of its own.

    What all have read is forgotten.
    """

    def __init__(self, read: Reader, places: Sequence[int]) -> None:
        """`read` gives the bytes from the first of `places` on, where the readers begin."""
        self._read = read
        self._places = list(places)
        self._first = min(places)
        self._held = bytearray()

    def read(self, number: int, buffer: memoryview) -> None:
        """Fill `buffer` with what follows for reader `number`."""
        place = self._places[number]
        if (skipped := place - self._first - len(self._held)) > 0:
            before = memoryview(bytearray(skipped))
            self._read(before)
            self._held += before
        start = place - self._first
        ready = min(len(buffer), len(self._held) - start)
        with memoryview(self._held) as held:
            buffer[:ready] = held[start : start + ready]
        if ready < len(buffer):
            self._read(buffer[ready:])
            self._held += buffer[ready:]
        self._places[number] = place + len(buffer)
        self._forget()

    def _forget(self) -> None:
        first = min(self._places)
        del self._held[: first - self._first]
        self._first = first
