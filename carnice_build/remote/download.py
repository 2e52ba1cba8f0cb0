"""Tensors out of a remote's objects: neighbours in one request, many requests at once.

Whatever arrives is digested: a tensor counts once all of its bytes are those of its digest.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from blake3 import blake3

from carnice_build.remote.calls import RemoteFailure
from carnice_build.remote.index import RemotePlace
from carnice_build.remote.objects import Objects, Range

REQUEST_BYTES = 8 << 20
"""Of one request at most, so that all those on their way take little memory."""

_GAP = 64 << 10
"""Bytes between two tensors that cost less than a second request."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Bytes of a tensor from `offset` on; nobody has vouched for them yet."""

    digest: str
    offset: int
    content: memoryview


@dataclass(frozen=True, slots=True)
class Ended:
    """A tensor is through: whole, or with the reason why it is not."""

    digest: str
    failure: RemoteFailure | None


@dataclass
class _Run:
    """One request, and the tensors of which it brings all or a part."""

    wanted: Range
    members: list[tuple[str, RemotePlace]] = field(default_factory=list)


def download(objects: Objects, places: Mapping[str, RemotePlace]) -> Iterator[Chunk | Ended]:
    """The bytes of each digest, in any order of tensors, those of each one in order.

    Raises GivenUp when the remote is of no use any more.
    """
    runs = iter(_runs(places))
    pending: list[_Run] = []

    def ranges() -> Iterator[Range]:
        for run in runs:
            pending.append(run)
            yield run.wanted

    parts: dict[str, _Part] = {}
    for wanted, content in objects.read_ranges(ranges()):
        run = pending.pop(0)
        for digest, place in run.members:
            part = parts.setdefault(digest, _Part(digest, place))
            yield from part.take(wanted, content)
            if part.ended:
                del parts[digest]


class _Part:
    """A tensor that is on its way."""

    def __init__(self, digest: str, place: RemotePlace) -> None:
        self._digest = digest
        self._place = place
        self._hasher = blake3()
        self._done = 0
        self._failure: RemoteFailure | None = None
        self.ended = False

    def take(self, wanted: Range, content: bytes | RemoteFailure) -> Iterator[Chunk | Ended]:
        """What follows from the answer to a request."""
        start = self._place.offset + self._done
        end = min(wanted.offset + wanted.count, self._place.offset + self._place.count)
        if isinstance(content, RemoteFailure):
            self._failure = content
        elif self._failure is None:
            piece = memoryview(content)[start - wanted.offset : end - wanted.offset]
            self._hasher.update(piece)
            yield Chunk(self._digest, self._done, piece)
        self._done += end - start
        if self._done == self._place.count:
            self.ended = True
            if self._failure is None and self._hasher.hexdigest() != self._digest:
                self._failure = RemoteFailure(f"{self._place.name} was altered")
            yield Ended(self._digest, self._failure)


def _runs(places: Mapping[str, RemotePlace]) -> Iterator[_Run]:
    """Requests for all places, in the order of their objects."""
    ordered = sorted(places.items(), key=lambda item: (item[1].name, item[1].offset))
    run: _Run | None = None
    for digest, place in ordered:
        if run is not None and not _joins(run.wanted, place):
            yield run
            run = None
        if place.count > REQUEST_BYTES:
            yield from _cut(digest, place)
            continue
        if run is None:
            run = _Run(Range(place.name, place.offset, place.count))
        run.wanted = _reaching(run.wanted, place)
        run.members.append((digest, place))
    if run is not None:
        yield run


def _joins(wanted: Range, place: RemotePlace) -> bool:
    end = wanted.offset + wanted.count
    near = wanted.name == place.name and place.offset <= end + _GAP
    return near and place.offset + place.count - wanted.offset <= REQUEST_BYTES


def _reaching(wanted: Range, place: RemotePlace) -> Range:
    end = max(wanted.offset + wanted.count, place.offset + place.count)
    return Range(wanted.name, wanted.offset, end - wanted.offset)


def _cut(digest: str, place: RemotePlace) -> Iterator[_Run]:
    """Requests for a tensor that is too large for one."""
    for start in range(0, place.count, REQUEST_BYTES):
        count = min(REQUEST_BYTES, place.count - start)
        yield _Run(Range(place.name, place.offset + start, count), [(digest, place)])
