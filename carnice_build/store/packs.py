"""Packs: files of many tensors, each one that is published so, written in place, then sealed.

A pack's *layout* names what it will hold before the bytes exist, so that a build which was
killed finds its unfinished file again.  Its *digest* names what it does hold.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import FileIO
from itertools import islice
from pathlib import Path

from blake3 import blake3

from carnice_build.checkpoint.gguf_header import MAX_HEADER_BYTES
from carnice_build.checkpoint.header import Entry
from carnice_build.errors import StoreError
from carnice_build.store.files import NO_SURPRISE, copy_range, set_mode
from carnice_build.store.locks import Taken, lock
from carnice_build.system import forget_pages, make_durable, write_at

_READ_SIZE = 1 << 20
_FLUSH_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Extent:
    """Tensors of a pack that have one digest: their names, and where their bytes are."""

    names: Sequence[str]
    offset: int
    nbytes: int


def extents(entries: Sequence[Entry], counts: Sequence[int]) -> list[Extent]:
    """`entries` of a header in groups of `counts`; ValueError when they are not as many."""
    found, rest = [], iter(entries)
    for count in counts:
        group = list(islice(rest, count))
        if len(group) < max(1, count):
            raise ValueError("fewer tensors than counted")
        nbytes = sum(entry.spec.nbytes for entry in group)
        found.append(Extent([entry.name for entry in group], group[0].offset, nbytes))
    if next(rest, None) is not None:
        raise ValueError("more tensors than counted")
    return found


@dataclass(frozen=True, slots=True)
class Location:
    """Bytes of a tensor in the cache."""

    path: Path
    offset: int


class PartialPack:
    """A pack being written; the lock on its file keeps other builds from writing it too."""

    def __init__(self, path: Path, layout: str, header: bytes, size: int) -> None:
        """Open or create the file at `path`; the caller has made sure that it holds the lock."""
        self.path = path
        self.layout = layout
        self.size = size
        self._header = header
        self._descriptor = -1
        self._keeper = -1
        self._unflushed = 0
        self._flush_error: OSError | None = None

    @property
    def header_digest(self) -> str:
        """Digest of the header bytes."""
        return blake3(self._header).hexdigest()

    @property
    def header_bytes(self) -> int:
        """How long the header is."""
        return len(self._header)

    def acquire(self, *, waiting: Callable[[], None]) -> bool:
        """Lock the file, creating it when needed; False when another build finished it meanwhile.

        `waiting` is called once if another build holds the lock.
        """
        self._descriptor = self._keeper = self._open()
        try:
            self._keeper = lock(self._descriptor, wait=False)
        except Taken:
            waiting()
            self._keeper = lock(self._descriptor)
        if self._is_current(self._descriptor):
            return True
        # Renamed into the store or removed while we waited for the lock.
        self.close()
        return False

    def _open(self) -> int:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | NO_SURPRISE
        if self.path.is_symlink() or (self.path.exists() and not is_plain_file(self.path)):
            raise StoreError("is not a file", where=str(self.path), expected="nothing there")
        return os.open(self.path, flags, 0o644)

    def _is_current(self, descriptor: int) -> bool:
        try:
            named = self.path.stat()
        except FileNotFoundError:
            return False
        mine = os.fstat(descriptor)
        return (named.st_dev, named.st_ino) == (mine.st_dev, mine.st_ino)

    def prepare(self) -> None:
        """Give the file its size and its header."""
        os.ftruncate(self._descriptor, self.size)
        self.write(0, memoryview(self._header))

    def write(self, offset: int, buffer: memoryview) -> None:
        """Write bytes into their place; safe from several threads for different places."""
        write_at(self._descriptor, buffer, offset)
        self._unflushed += len(buffer)

    def due_for_flush(self) -> bool:
        """True once for every 64 MB or so that were written: time to `flush`."""
        if self._unflushed < _FLUSH_BYTES:
            return False
        self._unflushed = 0
        return True

    def flush(self, *, forget: bool) -> None:
        """Bring to disk what was written so far, so that little is left to do at the end.

        With `forget` its memory may be used for what comes next.
        The system reports a failed write to one fsync only, so `seal` raises it in its place.
        """
        if self._descriptor < 0:
            return
        try:
            os.fsync(self._descriptor)
            if forget:
                forget_pages(self._descriptor)
        except OSError as error:
            self._flush_error = error

    def copy_from(self, location: Location, offset: int, count: int) -> None:
        """Copy `count` bytes of another file in the cache to `offset`."""
        with location.path.open("rb") as source:
            copy_range(source.fileno(), location.offset, self._descriptor, offset, count)

    def seal(self) -> None:
        """Make the bytes durable and the file read-only: links to it share its content."""
        if self._flush_error is not None:
            raise self._flush_error
        set_mode(self._descriptor, 0o444)
        make_durable(self._descriptor)

    def allocated_bytes(self) -> int:
        """Bytes of disk that the file takes already."""
        return os.fstat(self._descriptor).st_blocks * 512

    def discard(self) -> None:
        """Remove the file: its pack exists already."""
        self.path.unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        """Release the lock; the file stays."""
        if self._descriptor >= 0:
            for item in {self._descriptor, self._keeper}:
                os.close(item)
            self._descriptor = self._keeper = -1


def is_plain_file(path: Path) -> bool:
    """True for a regular file; not for a link, a folder, a pipe or a device."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except OSError:
        return False


def digest_range(path: Path, offset: int, count: int) -> str | None:
    """Digest of `count` bytes of a file, None when the file does not have them."""
    if not is_plain_file(path):
        return None
    try:
        with path.open("rb", buffering=0) as file:
            if offset + count > os.fstat(file.fileno()).st_size:
                return None
            file.seek(offset)
            return _digest_next(file, count)
    except FileNotFoundError:  # another build has just moved it
        return None


def _digest_next(file: FileIO, count: int) -> str | None:
    hasher = blake3()
    while count:
        piece = file.read(min(count, _READ_SIZE))
        if not piece:
            return None
        hasher.update(piece)
        count -= len(piece)
    return hasher.hexdigest()


def read_header_bytes(path: Path, count: int) -> bytes:
    """The first `count` bytes of a pack; 0 for those that the header of a safetensors has.

    b"" when the file does not begin with a header.
    """
    with path.open("rb", buffering=0) as file:
        limit = min(MAX_HEADER_BYTES, os.fstat(file.fileno()).st_size)
        length = count or 8 + int.from_bytes(file.read(8), "little")
        if length > limit:
            return b""
        file.seek(0)
        return file.read(length)
