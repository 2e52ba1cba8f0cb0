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
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as Late
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeVar
from uuid import uuid4

from carnice_build.errors import StoreError, nearest
from carnice_build.extras import pip_install

PATIENCE = 30.0
"""Seconds in which a request has to be answered, beside the time that its bytes take."""

LEAST_RATE = 100_000
"""Bytes a second that each request has to bring, or the remote is too slow to be of use."""

ATTEMPTS = 4
FIRST_WAIT = 0.5
"""Seconds before the second attempt, twice as many before each further one."""

WIDTH = 16
"""Requests at once."""

MOST_FAILURES = 8
"""Requests in a row that may fail, each after all its attempts, before a remote is given up."""

_IN_MEMORY = 16 << 20
"""Bytes of an object that is put in one piece."""

_ATOMIC = frozenset({"s3", "s3a", "gs", "gcs", "hf", "abfs", "az"})
"""Where a put shows the whole object or none of it; elsewhere it is renamed into its place."""

_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "ssh": "ssh", "sftp": "ssh"}
_SCHEMES = ("file", "s3", "gs", "hf", "ssh")

_FINAL = (401, 403, 407)

_URL = re.compile(r"([a-z][a-z0-9+.-]*)://(?!.*::)\S+")

T = TypeVar("T")


class RemoteFailure(Exception):
    """Something that a remote did not do; its text is a clause for people."""


class Missing(RemoteFailure):
    """There is no such object."""


class Refused(RemoteFailure):
    """The remote forbids it, or wants to know who asks."""


class GivenUp(RemoteFailure):
    """The remote is of no use any more: too slow, or failing one request after another."""


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
        self._scheme, self._files, self._root = _open(url, self.name)
        self._crew = _Crew(WIDTH)

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
        yield from self._ordered(ranges, lambda item: item.count, self._read_range)

    def do_all(
        self, items: Iterable[T], size: Callable[[T], int], work: Callable[[T], None]
    ) -> Iterator[T]:
        """Do `work` for each item, many at once; gives each one that is done, in order.

        `work` calls what this class has for one call.
        Raises the first RemoteFailure.
        """
        for item, failure in self._ordered(items, size, work):
            if failure is not None:
                raise failure
            yield item

    def _read_range(self, item: Range) -> bytes:
        return _patiently(lambda: self._read_exactly(item))

    def _ordered(
        self,
        items: Iterable[T],
        size: Callable[[T], int],
        work: Callable[[T], Any],
    ) -> Iterator[tuple[T, Any]]:
        waiting: deque[tuple[T, Future[Any]]] = deque()
        failures = 0

        def settled() -> tuple[T, Any]:
            nonlocal failures
            item, future = waiting.popleft()
            try:
                result = future.result(_limit(size(item)))
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
            if len(waiting) >= WIDTH:
                yield settled()
        while waiting:
            yield settled()

    # --- what may never come back -----------------------------------------------------------------

    def _in_time(self, call: Callable[[], T], count: int) -> T:
        """What `call` returns; GivenUp unless it does in the time for `count` bytes.

        A thread that waits for an answer cannot be stopped: it is left behind.
        """
        if _Crew.is_member():
            return _patiently(call)
        try:
            return self._crew.submit(lambda: _patiently(call)).result(_limit(count))
        except Late:
            raise GivenUp("does not answer") from None

    def _path(self, name: str) -> str:
        return posixpath.join(self._root, name)

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


class _Crew:
    """Threads for calls that may never return; the process does not wait for them at its end."""

    _member = threading.local()

    def __init__(self, width: int) -> None:
        self._width = width
        self._calls: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        self._threads = 0

    @classmethod
    def is_member(cls) -> bool:
        """Whether the current thread is one of them, whose calls are waited for already."""
        return getattr(cls._member, "here", False)

    def submit(self, call: Callable[[], T]) -> Future[T]:
        """Have a thread make a call."""
        if self._threads < self._width:
            self._threads += 1
            threading.Thread(target=self._work, name="carnice-remote", daemon=True).start()
        future: Future[T] = Future()
        self._calls.put((future, call))
        return future

    def close(self) -> None:
        """Let go of those that wait for calls."""
        for _ in range(self._threads):
            self._calls.put(None)

    def _work(self) -> None:
        self._member.here = True
        while (item := self._calls.get()) is not None:
            future, call = item
            try:
                future.set_result(call())
            except BaseException as error:
                future.set_exception(error)


def _limit(count: int) -> float:
    return PATIENCE + count / LEAST_RATE


def _patiently(call: Callable[[], T]) -> T:
    """What `call` returns, called again after failures that may pass."""
    for attempt in range(ATTEMPTS):
        try:
            return call()
        except RemoteFailure:
            raise
        except FileNotFoundError:
            raise Missing("lacks an object") from None
        except Exception as error:
            failure = _failure(error)
            if isinstance(failure, Refused) or attempt == ATTEMPTS - 1:
                raise failure from None
            time.sleep(FIRST_WAIT * 2**attempt)
    raise AssertionError("an attempt returns or raises")


def _failure(error: Exception) -> RemoteFailure:
    """The error of a driver in our words: its own may hold addresses with keys in them."""
    kind = type(error).__name__
    if "Credential" in kind or "TokenNotFound" in kind:
        return Refused("wants credentials, and there are none here")
    status = _status(error)
    if isinstance(error, PermissionError) or status in _FINAL:
        return Refused("forbids it")
    if status:
        return RemoteFailure(f"answered {status}")
    if isinstance(error, OSError) and error.errno:
        return RemoteFailure(f"failed: {os.strerror(error.errno)}")
    return RemoteFailure(f"failed ({kind})")


def _status(error: Exception) -> int | None:
    """The HTTP status behind a driver's error, if it says so."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        found = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    else:
        found = getattr(response, "status_code", None) or getattr(error, "status", None)
    return found if type(found) is int else None


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


def shown(url: str) -> str:
    """A URL without what may be secret in it: user, password, query; "" for what is no URL."""
    scheme, separator, rest = url.partition("://")
    place = re.split(r"[?#]", rest, maxsplit=1)[0]
    host, slash, path = place.partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}" if separator else ""


def _open(url: str, name: str) -> tuple[str, Any, str]:
    """The scheme, the driver and the root of a URL."""
    match = _URL.fullmatch(url)
    if match is None:
        raise StoreError(
            "is no URL of a remote", where=name or "--remote", expected="s3://BUCKET/PATH, say"
        )
    scheme = match[1]
    try:
        import fsspec
        from fsspec.registry import known_implementations
    except ImportError:
        raise StoreError(
            "a remote needs fsspec", where=name, expected=pip_install("remote")
        ) from None
    try:
        fsspec.get_filesystem_class(scheme)
    except ImportError:
        extra = _EXTRAS.get(scheme)
        wanted = known_implementations.get(scheme, {}).get("err", "its driver for fsspec")
        raise StoreError(
            f"there is no driver for {scheme}:// here",
            where=name,
            expected=pip_install(extra) if extra else wanted,
        ) from None
    except ValueError:
        raise StoreError(
            f"there are no remotes of the kind {scheme}://",
            where=name,
            expected=", ".join(f"{item}://" for item in _SCHEMES),
            nearest=nearest(scheme, _SCHEMES),
        ) from None
    try:
        files, root = fsspec.core.url_to_fs(url, **_settings(scheme))
    except Exception as error:
        raise StoreError(str(_failure(error)), where=name) from None
    return scheme, files, str(root)


def _settings(scheme: str) -> dict[str, Any]:
    settings: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}
    if scheme == "file":
        settings["auto_mkdir"] = True
    if scheme in ("s3", "s3a"):
        # Attempts and waits are ours; the driver's own would multiply with them.
        settings["config_kwargs"] = {
            "connect_timeout": 10,
            "read_timeout": PATIENCE,
            "retries": {"mode": "standard", "max_attempts": 2},
            "max_pool_connections": 2 * WIDTH,
        }
    return settings
