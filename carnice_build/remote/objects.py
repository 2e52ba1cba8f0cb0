"""Objects below a URL, by fsspec: listed, read in part, put as a whole, removed.

    FORMAT                       the version of this layout
    packs/<pack>.safetensors     finished packs, as a cache has them
    blobs/<two>/<digest>         tensors that no pack there holds, named by their digest
    records/<digest>             batches: what a push remembers (see `batches`)

Whatever a remote does, a call ends: answers are limited in size and in time, and errors become
`RemoteFailure`, whose words hold nothing that a driver or a server said, for these know secrets.
"""

from __future__ import annotations

import os
import posixpath
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as Late
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

from carnice_build.remote.calls import (
    Crew,
    GivenUp,
    Missing,
    RemoteFailure,
    patiently,
    time_for,
)
from carnice_build.remote.drivers import connect, scheme_of, shown

WIDTH = 16
"""Requests at once."""

PUTS = 4
"""Of objects at once that are put: drivers hold some 50 MB of each."""

MOST_FAILURES = 8
"""Requests in a row that may fail, each after all its attempts, before a remote is given up."""

_IN_MEMORY = 16 << 20
"""Bytes of an object that is put in one piece."""

_ATOMIC = frozenset({"s3", "s3a", "gs", "gcs", "hf", "abfs", "az"})
"""Where a put shows the whole object or none of it; elsewhere it is renamed into its place."""

_ONE_BY_ONE = frozenset({"ssh", "sftp"})
"""Where a connection serves one thread: of two that wait, one would take the other's answer."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Listed:
    """What a listing says of an object: bytes, and when it was put, in seconds, if it says so."""

    size: int
    time: float | None


@dataclass(frozen=True, slots=True)
class Range:
    """Bytes of an object that are asked for in one request."""

    name: str
    offset: int
    count: int


class Objects:
    """The objects below one URL; every call is safe from several threads."""

    def __init__(self, url: str) -> None:
        """StoreError for what is no URL, or one that nothing here can open."""
        self.url = url
        self.name = shown(url)
        self._scheme = scheme_of(url)
        self._width = PUTS if self._scheme in _ONE_BY_ONE else WIDTH
        self._crew = Crew(self._width)
        self._shared = threading.Lock()
        self._connection: tuple[Any, str] | None = None
        self._own = threading.local()

    def close(self) -> None:
        """Let the threads go that wait for nothing."""
        self._crew.close()

    # --- one call, in time ----------------------------------------------------------------------

    def listing(self, folder: str) -> dict[str, Listed]:
        """The objects below a folder by their names in it; none where there is no such folder."""
        return self._in_time(lambda: self._listing(folder), 0)

    def head(self, name: str, most: int) -> bytes:
        """The first bytes of an object, `most` of them at most."""
        return self._in_time(lambda: self._read(name, 0, most)[:most], most)

    def put(self, name: str, content: bytes) -> None:
        """Put an object, which replaces one of that name."""
        self._in_time(lambda: self._put(name, lambda path: self._pipe(path, content)), len(content))

    def put_range(self, name: str, path: Path, offset: int, count: int) -> None:
        """Put a range of a local file as an object."""

        def send(target: str) -> None:
            with path.open("rb") as file:
                file.seek(offset)
                if count <= _IN_MEMORY:
                    self._pipe(target, file.read(count))
                elif offset == 0 and count == os.fstat(file.fileno()).st_size:
                    self._files.put_file(str(path), target)
                else:
                    with self._files.open(target, "wb") as out:
                        for start in range(0, count, _IN_MEMORY):
                            out.write(file.read(min(_IN_MEMORY, count - start)))

        self._in_time(lambda: self._put(name, send), count)

    def remove(self, name: str) -> None:
        """Remove an object; one that is not there is no error."""
        with suppress(Missing):
            self._in_time(lambda: self._files.rm_file(self._path(name)), 0)

    # --- many at once ---------------------------------------------------------------------------

    def read_ranges(self, ranges: Iterable[Range]) -> Iterator[tuple[Range, bytes | RemoteFailure]]:
        """The bytes of each range, in order, while those of the next ones are on their way.

        Raises GivenUp when the remote is of no use any more.
        """
        yield from self._ordered(ranges, lambda item: item.count, self._read_range, self._width)

    def do_all(
        self, items: Iterable[T], size: Callable[[T], int], work: Callable[[T], None]
    ) -> Iterator[T]:
        """Do `work` for each item, some at once; gives each one that is done, in order.

        `work` calls what is here for one call.

        Raises the first RemoteFailure.
        """
        for item, failure in self._ordered(items, size, work, PUTS):
            if failure is not None:
                raise failure
            yield item

    def _read_range(self, item: Range) -> bytes:
        return patiently(lambda: self._read_exactly(item))

    def _ordered(
        self,
        items: Iterable[T],
        size: Callable[[T], int],
        work: Callable[[T], Any],
        width: int,
    ) -> Iterator[tuple[T, Any]]:
        waiting: deque[tuple[T, Future[Any]]] = deque()
        failures = 0

        def settled() -> tuple[T, Any]:
            nonlocal failures
            item, future = waiting.popleft()
            try:
                result = future.result(time_for(size(item)))
            except Late:
                raise GivenUp("answers too slowly") from None
            except RemoteFailure as failure:
                # That an object is not there is an answer like others.
                failures += not isinstance(failure, Missing)
                if failures == MOST_FAILURES:
                    raise GivenUp(f"{failure}, again and again") from None
                return item, failure
            failures = 0
            return item, result

        for item in items:
            waiting.append((item, self._crew.submit(lambda item=item: work(item))))  # type: ignore[misc]
            if len(waiting) >= width:
                yield settled()
        while waiting:
            yield settled()

    # --- what may never come back -----------------------------------------------------------------

    def _in_time(self, call: Callable[[], T], count: int) -> T:
        """What `call` returns; GivenUp unless it does in the time for `count` bytes.

        A thread that waits for an answer cannot be stopped: it is left behind.
        """
        if Crew.is_member():
            return patiently(call)
        try:
            return self._crew.submit(lambda: patiently(call)).result(time_for(count))
        except Late:
            raise GivenUp("does not answer") from None

    @property
    def _files(self) -> Any:
        """The driver, which is asked for by those alone whom nobody waits for without end."""
        return self._connected()[0]

    def _connected(self) -> tuple[Any, str]:
        if self._scheme in _ONE_BY_ONE:
            if not hasattr(self._own, "connection"):
                self._own.connection = connect(self.url)
            own: tuple[Any, str] = self._own.connection
            return own
        with self._shared:
            if self._connection is None:
                self._connection = connect(self.url)
            return self._connection

    def _path(self, name: str) -> str:
        return posixpath.join(self._connected()[1], name)

    def _listing(self, folder: str) -> dict[str, Listed]:
        root = self._path(folder)
        self._files.invalidate_cache()
        try:
            found = self._files.find(root, detail=True)
        except (FileNotFoundError, NotADirectoryError):
            return {}
        start = len(root.rstrip("/")) + 1
        return {
            path[start:]: Listed(_size(info), _time(info))
            for path, info in found.items()
            if info.get("type") == "file" and path.startswith(root)
        }

    def _read(self, name: str, start: int, end: int) -> bytes:
        return bytes(self._files.cat_file(self._path(name), start=start, end=end))

    def _read_exactly(self, item: Range) -> bytes:
        content = self._read(item.name, item.offset, item.offset + item.count)
        if len(content) != item.count:
            raise Missing(f"{item.name} has other bytes than its record says")
        return content

    def _put(self, name: str, send: Callable[[str], None]) -> None:
        path = self._path(name)
        if self._scheme in _ATOMIC:
            send(path)
            return
        self._files.makedirs(posixpath.dirname(path), exist_ok=True)
        temporary = f"{path}.{uuid4().hex}.part"
        try:
            send(temporary)
            self._files.mv(temporary, path)
        except BaseException:
            with suppress(Exception):
                self._files.rm_file(temporary)
            raise

    def _pipe(self, path: str, content: bytes) -> None:
        self._files.pipe_file(path, content)


def _size(info: dict[str, Any]) -> int:
    size = info.get("size")
    return size if type(size) is int and size >= 0 else 0


def _time(info: dict[str, Any]) -> float | None:
    """When an object was put, as drivers spell it."""
    for key in ("mtime", "LastModified", "last_modified", "updated", "created"):
        value = info.get(key)
        if isinstance(value, datetime):
            return (value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp()
        if isinstance(value, int | float):
            return float(value)
        if isinstance(value, str):
            with suppress(ValueError):
                return datetime.fromisoformat(value).timestamp()
    return None
