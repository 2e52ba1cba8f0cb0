"""The output folder: assembled beside its place, then moved there whole."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath

from carnice_build.checkpoint.checkpoint import INDEX_NAME, is_plain_path
from carnice_build.checkpoint.containers import has_index
from carnice_build.errors import StoreError
from carnice_build.formats.card import CARD_NAME
from carnice_build.formats.folder import BUILD_NAME, read_build
from carnice_build.formats.variant import Shard
from carnice_build.store.files import (
    copied_time,
    link_or_copy,
    set_mode,
    sync_folder,
    write_atomically,
)
from carnice_build.store.locks import locked


def check_place(folder: Path, sources: Iterable[Path]) -> None:
    """Raise StoreError unless a build may be put at `folder`: a free place or an earlier build."""
    for place in (folder.parent, folder):
        try:
            place.lstat()
            if not place.is_dir():
                raise StoreError("is not a folder", where=str(place))
        except FileNotFoundError:
            pass
        except OSError as error:
            raise _refusal(error, folder) from None
    if any(source.resolve() == folder.resolve() for source in sources):
        raise StoreError("is a source of this build", where=str(folder), expected="another --out")
    if folder.exists() and not read_build(folder) and any(folder.iterdir()):
        raise StoreError(
            "holds files that are not a build", where=str(folder), expected="a free place, or --out"
        )


def check_writable(folder: Path) -> None:
    """Raise StoreError when a build cannot be written at `folder`, before there is one to write."""
    above = next(place for place in folder.parents if place.exists())
    if not os.access(above, os.W_OK | os.X_OK):
        read_only = os.statvfs(above).f_flag & os.ST_RDONLY
        code = errno.EROFS if read_only else errno.EACCES
        raise _refusal(OSError(code, os.strerror(code)), folder)


def _refusal(error: OSError, folder: Path) -> StoreError:
    return StoreError(f"cannot hold a build: {error.strerror}", where=str(folder))


def is_current(folder: Path, key: str, shards: Sequence[Shard]) -> bool:
    """True when `folder` is complete and was packaged under this key from these packs."""
    record = read_build(folder)
    sizes = _recorded_sizes(record.get("files"))
    if record.get("key") != key or not _required(shards) <= set(sizes):
        return False
    try:
        whole = all(_size(folder, name) == size for name, size in sizes.items())
        return whole and all(_is_same(folder / shard.name, shard.path) for shard in shards)
    except OSError:
        return False


def _required(shards: Sequence[Shard]) -> set[str]:
    names = {item.name for item in shards}
    index = {INDEX_NAME} if has_index(names) else set()
    return {"config.json", CARD_NAME, *index, *names}


def _recorded_sizes(files: object) -> dict[str, int]:
    """Sizes by name as build.json states them, {} when it states anything else."""
    if not isinstance(files, dict):
        return {}
    sizes: dict[str, int] = {}
    for name, item in files.items():
        size = item.get("size") if isinstance(item, dict) else None
        if not is_plain_path(name) or type(size) is not int:
            return {}
        sizes[name] = size
    return sizes


def _size(folder: Path, name: str) -> int | None:
    """Bytes of a published file, None when a link stands for it or for a folder on the way."""
    if any((folder / part).is_symlink() for part in (*_folders([name]), name)):
        return None
    return (folder / name).stat().st_size


def _is_same(published: Path, pack: Path) -> bool:
    """The same file, or, where the file system could not link, a copy not touched since."""
    first, second = published.stat(), pack.stat()
    if (first.st_dev, first.st_ino) == (second.st_dev, second.st_ino):
        return True
    return first.st_size == second.st_size and first.st_mtime_ns == copied_time(pack)


LOCK_NAME = ".carnice.lock"
"""Beside output folders: builds put them together one at a time."""


def assemble(folder: Path, shards: Sequence[Shard], files: Mapping[str, bytes]) -> None:
    """Make `folder` hold exactly these shards and files.

    Everything is put together in a temporary neighbour first, so a reader of `folder` sees the
    old content or the new.  `files` are named by their paths in the folder; StoreError when one
    leads out of it.  The caller has asked `check_place`.
    """
    for name in files:
        if not is_plain_path(name):
            raise StoreError(f"cannot hold a file {name!r}", where=str(folder))
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder.parent / LOCK_NAME):
        _remove_leftovers(folder)
        _assemble(folder, shards, files)


def _assemble(folder: Path, shards: Sequence[Shard], files: Mapping[str, bytes]) -> None:
    fresh = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.new-"))
    try:
        set_mode(fresh, 0o755)
        for shard in shards:
            link_or_copy(shard.path, fresh / shard.name)
        inner = _folders(files)
        for name in inner:
            (fresh / name).mkdir()
            set_mode(fresh / name, 0o755)
        for name, content in files.items():
            write_atomically(fresh / name, content)
        make_executable(fresh, files)
        for name in reversed(inner):
            sync_folder(fresh / name)
        sync_folder(fresh)
        _swap(fresh, folder)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise


def replace_card(folder: Path, key: str, card: bytes, record: bytes) -> bool:
    """Put another card and build.json in the folder that has this `key`; False if it has not.

    Each of the two is the old or the new one at any time.
    Where only the first was replaced, the next build finds that they do not fit.
    """
    with locked(folder.parent / LOCK_NAME):
        if read_build(folder).get("key") != key:
            return False
        write_atomically(folder / CARD_NAME, card)
        write_atomically(folder / BUILD_NAME, record)
        sync_folder(folder)
    return True


def make_executable(folder: Path, names: Iterable[str]) -> None:
    """Let the scripts among these files of `folder` be run, where the file system has such modes.

    None of the files may be a link.
    """
    for name in names:
        path = folder / name
        if name.endswith(".sh") and not path.stat().st_mode & 0o111:
            with suppress(OSError):
                path.chmod(0o755)


def _folders(names: Iterable[str]) -> list[str]:
    """The folders that files of these paths lie in, outer before inner."""
    parents = {str(parent) for name in names for parent in PurePosixPath(name).parents}
    return sorted(parents - {"."})


def _swap(fresh: Path, folder: Path) -> None:
    old = folder.parent / f".{folder.name}.old-{os.getpid()}"
    if os.path.lexists(folder):
        folder.rename(old)
    fresh.rename(folder)
    sync_folder(folder.parent)
    _remove(old)


def _remove_leftovers(folder: Path) -> None:
    """What a build that was killed while it assembled this folder left beside it."""
    for kind in ("new", "old"):
        for path in folder.parent.glob(f".{folder.name}.{kind}-*"):
            _remove(path)


def _remove(path: Path) -> None:
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)
