"""Moving bytes on disk so that a crash at any instant leaves either the old or the new."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from carnice_build.errors import BuildError, StoreError


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


def write_atomically(path: Path, content: bytes) -> None:
    """Write `content` to `path`: temporary file, fsync, rename."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fchmod(file.fileno(), 0o644)
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def sync_folder(path: Path) -> None:
    """Make renames and links inside `path` durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


_NO_LINK = {errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}


def link_or_copy(source: Path, target: Path) -> None:
    """Hard-link `target` to `source`; copy where the file system cannot link."""
    try:
        target.hardlink_to(source)
    except OSError as error:
        if error.errno not in _NO_LINK:
            raise
        shutil.copyfile(source, target)
        stat = source.stat()
        # The copy's time tells later whether it was touched.
        os.utime(target, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        with target.open("rb") as file:
            os.fsync(file.fileno())


def copy_range(
    source: int, source_offset: int, target: int, target_offset: int, count: int
) -> None:
    """Copy `count` bytes between open files inside the kernel; shares blocks where it can."""
    done = 0
    while done < count:
        try:
            copied = os.copy_file_range(
                source, target, count - done, source_offset + done, target_offset + done
            )
        except OSError as error:
            if error.errno not in _NO_LINK | {errno.EINVAL}:
                raise
            copied = _copy_piece(
                source, source_offset + done, target, target_offset + done, count - done
            )
        if copied == 0:
            raise StoreError("a file in the cache is shorter than it was")
        done += copied


def _copy_piece(
    source: int, source_offset: int, target: int, target_offset: int, count: int
) -> int:
    piece = os.pread(source, min(count, 1 << 20), source_offset)
    write_fully(target, memoryview(piece), target_offset)
    return len(piece)


def write_fully(descriptor: int, buffer: memoryview, offset: int) -> None:
    """Write all of `buffer` at `offset`."""
    done = 0
    while done < len(buffer):
        done += os.pwrite(descriptor, buffer[done:], offset + done)
