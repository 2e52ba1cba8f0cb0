"""What operating systems do in different ways, each thing with its other way where it is missing.

Linux is what this is run on; macOS and the BSDs lack some of its calls, and file systems of any of
them lack more.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import resource
import sys
from pathlib import Path

UNSUPPORTED = frozenset({errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL})
"""How a system or a file system says that it has no such call."""

_MOST = 1 << 30
"""Bytes of one read or write: macOS refuses 2 GB and more, Linux cuts them short."""


def read_at(descriptor: int, buffer: memoryview, offset: int) -> int:
    """Fill `buffer` with the bytes from `offset` on; returns how many there were.

    Raises OSError.
    """
    done = 0
    while done < len(buffer):
        count = _read_some(descriptor, buffer[done : done + _MOST], offset + done)
        if not count:
            break
        done += count
    return done


def _read_some(descriptor: int, buffer: memoryview, offset: int) -> int:
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, [buffer], offset)
    piece = os.pread(descriptor, len(buffer), offset)
    buffer[: len(piece)] = piece
    return len(piece)


def write_at(descriptor: int, buffer: memoryview, offset: int) -> None:
    """Write all of `buffer` at `offset`; raises OSError."""
    done = 0
    while done < len(buffer):
        done += os.pwrite(descriptor, buffer[done : done + _MOST], offset + done)


def will_read(path: Path, offset: int, count: int) -> None:
    """Tell the system that a range of a file is to be read soon, where it can be told."""
    if hasattr(os, "posix_fadvise"):
        with contextlib.suppress(OSError), path.open("rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), offset, count, os.POSIX_FADV_WILLNEED)


def make_durable(descriptor: int) -> None:
    """Bring a file to disk, so that it survives a loss of power; raises OSError.

    On macOS `fsync` leaves it in the drive's own memory, and F_FULLFSYNC does not.
    """
    if hasattr(fcntl, "F_FULLFSYNC"):
        with contextlib.suppress(OSError):  # not on a network's file system
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
            return
    os.fsync(descriptor)


def make_folder_durable(descriptor: int) -> None:
    """Bring what a folder names to disk, where its file system can do that to a folder."""
    try:
        make_durable(descriptor)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise


def forget_pages(descriptor: int) -> None:
    """Let the system use the memory that holds pages of a file for something else.

    Only of those that are on disk; a system that cannot keeps them, or a file system.
    """
    if hasattr(os, "posix_fadvise"):
        with contextlib.suppress(OSError):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def physical_memory() -> int:
    """Bytes of memory that the machine has."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def peak_memory(who: int = resource.RUSAGE_SELF) -> int:
    """The most bytes that this process had in memory, or any of its children that ended."""
    return peak_bytes(resource.getrusage(who))


def peak_bytes(usage: resource.struct_rusage) -> int:
    """The peak of memory in what the system tells of a process: macOS counts it in bytes."""
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def wait_briefly() -> None:
    """Let threads of OpenMP wait awake for some microseconds and then asleep; before it is loaded.

    Small models wait for a thread ten thousand times a second.  On a quiet machine they take twice
    as long if each time it must be woken, and on a busy one ten times as long if it does not sleep.
    Whoever set either of libgomp's variables knows better.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
