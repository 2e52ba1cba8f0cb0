"""Moving bytes on disk so that a crash at any instant leaves either the old or the new."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from carnice_build.errors import BuildError, StoreError
from carnice_build.system import (
    UNSUPPORTED,
    make_durable,
    make_folder_durable,
    read_at,
    write_at,
)

NO_SURPRISE = os.O_NOFOLLOW | os.O_NONBLOCK
"""Neither follow a link out of the cache nor wait for the other end of a pipe."""


@contextmanager
def io_errors_named(where: Path) -> Iterator[None]:
    """Turn an operating system's error inside the block into a BuildError that names the place."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            what = "the disk is full; what was finished is kept, free some space and build again"
        else:
            what = f"{error.strerror or error}; what was finished is kept"
        raise BuildError(what, where=str(error.filename or where)) from None


@contextmanager
def open_regular(path: Path) -> Iterator[BinaryIO]:
    """`path`, open to read; OSError for anything but a file, which could be read without end."""
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_CLOEXEC | NO_SURPRISE), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(f"{path} is no file")
        yield file


def write_atomically(path: Path, content: bytes) -> None:
    """Write `content` to `path`: temporary file, fsync, rename."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=".new-")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            set_mode(file.fileno(), 0o644)
            make_durable(file.fileno())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def sync_folder(path: Path) -> None:
    """Make renames and links inside `path` durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        make_folder_durable(descriptor)
    finally:
        os.close(descriptor)


def set_mode(file: int | Path, mode: int) -> None:
    """Give an open file, or the file or folder of a path, its mode, where there are modes."""
    try:
        os.chmod(file, mode)  # noqa: PTH101
    except OSError as error:
        if error.errno not in UNSUPPORTED | {errno.EPERM}:
            raise


_NO_LINK = UNSUPPORTED | {errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK}
_EVEN = 2_000_000_000


def link_or_copy(source: Path, target: Path) -> None:
    """Hard-link `target` to `source`; copy where the file system cannot link."""
    if not _link(source, target):
        shutil.copyfile(source, target)
        time = copied_time(source)
        os.utime(target, ns=(time, time))
        with target.open("rb") as file:
            make_durable(file.fileno())


def _link(source: Path, target: Path) -> bool:
    """False when the file system cannot link."""
    try:
        target.hardlink_to(source)
    except OSError as error:
        if error.errno not in _NO_LINK:
            raise
        return False
    return True


def copied_time(path: Path) -> int:
    """When a copy of `path` that nobody touched since was changed, in ns.

    Full even seconds: file systems without links may know no others.
    """
    return path.stat().st_mtime_ns // _EVEN * _EVEN


def hold_range(source: Path, offset: int, count: int, target: Path) -> int:
    """Keep `count` bytes of `source` as `target`, whoever removes it; returns where they begin.

    `target` is a link to the whole file, or a copy of the range where there are none.
    """
    if _link(source, target):
        return offset
    with source.open("rb") as read, target.open("xb") as write:
        copy_range(read.fileno(), offset, write.fileno(), 0, count)
    return 0


def copy_range(
    source: int, source_offset: int, target: int, target_offset: int, count: int
) -> None:
    """Copy `count` bytes between open files; inside the kernel, sharing blocks, where it can.

    Raises StoreError when `source` does not have them, else OSError.
    """
    done = _copy_in_kernel(source, source_offset, target, target_offset, count)
    buffer = memoryview(bytearray(min(count - done, _PIECE)))
    while done < count:
        piece = buffer[: count - done]
        if read_at(source, piece, source_offset + done) < len(piece):
            raise StoreError("a file in the cache is shorter than it was")
        write_at(target, piece, target_offset + done)
        done += len(piece)


_PIECE = 1 << 20


def _copy_in_kernel(
    source: int, source_offset: int, target: int, target_offset: int, count: int
) -> int:
    """How many of the bytes were copied; fewer where the system or a file system cannot do it."""
    done = 0
    while done < count and hasattr(os, "copy_file_range"):
        try:
            copied = os.copy_file_range(
                source, target, count - done, source_offset + done, target_offset + done
            )
        except OSError as error:
            if error.errno not in _NO_LINK:
                raise
            break
        if not copied:
            break
        done += copied
    return done
