"""Where a checkpoint's bytes come from: a file read by range."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from carnice_build.errors import CheckpointError
from carnice_build.system import read_at
from carnice_build.tensors import Readable, Reader

_POINTER = b"version https://git-lfs.github.com/spec/"
_MOST_OF_A_POINTER = 1024
"""Bytes; by https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md a pointer has fewer."""


class LocalFile:
    """A file on a local or mounted file system, opened on first read."""

    local = True
    in_files = True
    random_access = True

    def __init__(self, path: Path) -> None:
        self._fd: int | None = None
        try:
            stat = path.stat()
        except OSError as error:
            raise CheckpointError(
                f"cannot read the file: {error.strerror}", where=str(path)
            ) from None
        self._path = path
        self._lock = threading.Lock()
        self.name = str(path)
        self.size = stat.st_size
        # A name may be no UTF-8, which an identity, being digested, has to be.
        place = str(path.resolve()).encode(errors="backslashreplace").decode()
        # The inode tells a replaced file from an edited one with a restored mtime.
        self.identity = f"{place}|{stat.st_ino}|{stat.st_size}|{stat.st_mtime_ns}"

    def __getstate__(self) -> tuple[Path, str, int, str]:
        return (self._path, self.name, self.size, self.identity)

    def __setstate__(self, state: tuple[Path, str, int, str]) -> None:
        self._path, self.name, self.size, self.identity = state
        self._fd = None
        self._lock = threading.Lock()

    def path(self) -> Path:
        """Where the file is."""
        return self._path

    def _descriptor(self) -> int:
        with self._lock:
            if self._fd is None:
                try:
                    self._fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
                except OSError as error:
                    raise CheckpointError(
                        f"cannot open the file: {error.strerror}", where=self.name
                    ) from None
            return self._fd

    def __del__(self) -> None:
        if self._fd is not None:
            os.close(self._fd)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset` on; a short read or an I/O error is a CheckpointError."""
        try:
            count = read_at(self._descriptor(), buffer, offset)
        except OSError as error:
            raise CheckpointError(
                f"cannot read {len(buffer)} bytes at {offset}: {error.strerror}", where=self.name
            ) from None
        if count < len(buffer):
            raise CheckpointError(
                f"ends at byte {offset + count}, inside a tensor", where=self.name
            )

    @contextmanager
    def open_range(self, offset: int, count: int) -> Iterator[Reader]:
        """See `ByteSource.open_range`."""

        def read(buffer: memoryview) -> None:
            nonlocal offset
            self.read_into(offset, buffer)
            offset += len(buffer)

        yield read


class LostFile:
    """A link to nothing in the place of a file: an error as soon as anything of it is asked for."""

    local = True
    in_files = True
    random_access = True

    def __init__(self, path: Path) -> None:
        self.name = str(path)

    def _error(self) -> CheckpointError:
        return CheckpointError(
            "is a link to nothing", where=self.name, expected="the file that it should lead to"
        )

    @property
    def size(self) -> int:
        """Raises CheckpointError, as everything here does."""
        raise self._error()

    @property
    def identity(self) -> str:
        """Raises CheckpointError."""
        raise self._error()

    def path(self) -> Path:
        """Raises CheckpointError."""
        raise self._error()

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Raises CheckpointError."""
        raise self._error()

    def open_range(self, offset: int, count: int) -> AbstractContextManager[Reader]:
        """Raises CheckpointError."""
        raise self._error()


def local_files(folder: Path, suffix: str = "") -> dict[str, LocalFile | LostFile]:
    """The files in `folder` whose names end so, sorted by name; OSError when it cannot be listed.

    Folders, pipes and devices are left out: the latter two could be read without end.
    """
    found: dict[str, LocalFile | LostFile] = {}
    for path in sorted(folder.iterdir()):
        if path.name.endswith(suffix) and path.is_file():
            found[path.name] = LocalFile(path)
        elif path.name.endswith(suffix) and path.is_symlink() and not path.exists():
            found[path.name] = LostFile(path)
    return found


def read_all(source: Readable) -> bytes:
    """The whole content of a small file; CheckpointError when it is a pointer to another."""
    refuse_pointer(source)
    return _read(source, source.size)


def refuse_pointer(source: Readable) -> None:
    """Raise CheckpointError for what Git leaves in a file's place when Git LFS did not run."""
    small = len(_POINTER) <= source.size < _MOST_OF_A_POINTER
    if small and _read(source, len(_POINTER)) == _POINTER:
        raise CheckpointError(
            "is a Git LFS pointer, not the file itself",
            where=source.name,
            expected="the file, as `git lfs pull` fetches it",
        )


def _read(source: Readable, count: int) -> bytes:
    buffer = bytearray(count)
    source.read_into(0, memoryview(buffer))
    return bytes(buffer)
