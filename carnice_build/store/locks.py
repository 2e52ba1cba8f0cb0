"""Locks among threads and processes: the system releases those of a process that dies.

A lock is an flock of a file.
On a file system that has none it is one of a file of this machine that stands for the other, so
that the builds of one machine still see each other.
"""

from __future__ import annotations

import errno
import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from carnice_build.errors import StoreError
from carnice_build.system import UNSUPPORTED

_NO_LOCKS = UNSUPPORTED | {errno.ENOLCK}


class Taken(Exception):
    """Somebody else holds the lock."""


def lock(descriptor: int, *, wait: bool = True, shared: bool = False) -> int:
    """Lock an open file; returns the descriptor that keeps the lock until it is closed.

    That is another one where the file system has no locks.
    The file must be open for reading and writing: NFS asks for the one for a shared lock, for the
    other for a lock of one's own.
    Raises Taken when another holds the lock and this one does not `wait`, StoreError when there
    are no locks at all, else OSError.
    """
    kind = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
    if _flock(descriptor, kind):
        return descriptor
    stand_in = _open_stand_in(descriptor)
    try:
        if not _flock(stand_in, kind):
            raise StoreError("there are no file locks here", where=tempfile.gettempdir())
    except BaseException:
        os.close(stand_in)
        raise
    return stand_in


def _flock(descriptor: int, kind: int) -> bool:
    """False when the file system has no locks."""
    try:
        fcntl.flock(descriptor, kind)
    except BlockingIOError:
        raise Taken from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return False
    return True


def _open_stand_in(descriptor: int) -> int:
    """A file of this machine for an open one, the same for whoever opens that."""
    folder = Path(tempfile.gettempdir()) / f"carnice-locks-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise StoreError("belongs to somebody else", where=str(folder))
    stat = os.fstat(descriptor)
    name = f"{stat.st_dev:x}-{stat.st_ino:x}"
    return os.open(folder / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)


@contextmanager
def locked(path: Path, *, wait: bool = True, shared: bool = False) -> Iterator[bool]:
    """Hold the lock that is the file `path`, which stays there.

    Gives False when only builds on this machine heed it.
    Raises what `lock` does.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    descriptor = keeper = os.open(path, flags, 0o644)
    try:
        keeper = lock(descriptor, wait=wait, shared=shared)
        yield keeper == descriptor
    finally:
        for item in {descriptor, keeper}:
            os.close(item)
