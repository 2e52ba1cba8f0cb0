"""What the cache remembers, as JSON in diskcache: never the bytes themselves.

    source:<identity>   content digest of a source tensor, once read
    sample:<sample>     content digest of the last source tensor that had this sample
    action:<key>        content digests of an action's outputs
    figure:<digest>     the numbers in a small tensor that people want to see
    place:<digest>      where a tensor's bytes are: layout and offset, or "blob"
    layout:<layout>     the pack that a layout became
    pack:<pack>         size, mtime, layout and the tensors' digests, in the order of the pack

Entries are hints to be checked, never proofs: whoever reads one checks its form here and the
file it speaks of in `store`, because anyone who can write to the cache can write nonsense.
"""

from __future__ import annotations

import errno
import sqlite3
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diskcache

from carnice_build.errors import BuildError, CarniceError, StoreError
from carnice_build.store.digests import digest_texts, is_digest


class _InlineJsonDisk(diskcache.JSONDisk):  # type: ignore[misc]
    """Values and keys are compressed JSON inside the database row, whatever the row says.

    A row could name a pickle or a file to be opened or deleted; such rows are not ours, and read
    as nothing.
    """

    def get(self, key: Any, raw: bool) -> Any:
        """A key, None when it is not one of ours."""
        try:
            return super().get(key, True) if raw else None
        except _DAMAGED:
            return None

    def fetch(self, mode: int, filename: str | None, value: Any, read: bool) -> Any:
        """A value; ValueError for a row that is not ours."""
        if mode != diskcache.core.MODE_RAW or filename is not None or read:
            raise ValueError("not a value of this cache")
        return super().fetch(mode, None, value, False)

    def remove(self, file_path: str) -> None:
        """Values never have files, so none is to be removed."""


_DAMAGED = (ValueError, TypeError, zlib.error, RecursionError)
"""What reading a damaged row can raise; the row is as good as none."""


@dataclass(frozen=True, slots=True)
class PackRecord:
    """What is known of a finished pack.

    Each digest is over as many of the header's tensors, end to end, as `counts` says.
    `header` is how many bytes come before them, 0 where only the file says it.
    """

    size: int
    mtime_ns: int
    layout: str
    digests: tuple[str, ...]
    counts: tuple[int, ...]
    header: int = 0


class Records:
    """Typed access to the cache's small facts; safe for several threads and processes."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        try:
            # Nothing may be evicted behind our back: `cache gc` decides what goes.
            self._cache = diskcache.Cache(
                str(folder),
                disk=_InlineJsonDisk,
                disk_min_file_size=2**30,
                disk_compress_level=1,
                eviction_policy="none",
                cull_limit=0,
                size_limit=2**62,
                timeout=60,
            )
        except (sqlite3.Error, diskcache.Timeout, OSError, ValueError) as error:
            raise self._failure(error) from None

    def close(self) -> None:
        """Release the database."""
        self._cache.close()

    @contextmanager
    def together(self) -> Iterator[None]:
        """Make all changes inside the block one transaction."""
        with self._translated(), self._cache.transact(retry=True):
            yield

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, diskcache.Timeout, OSError) as error:
            raise self._failure(error) from None

    def _failure(self, error: Exception) -> CarniceError:
        if "disk is full" in str(error) or getattr(error, "errno", None) == errno.ENOSPC:
            return BuildError("the disk is full", where=str(self._folder))
        if "disk I/O error" in str(error):
            return BuildError(str(error), where=str(self._folder))
        return StoreError(f"cannot use the action cache: {error}", where=str(self._folder))

    def _get(self, kind: str, name: str) -> Any:
        with self._translated():
            try:
                return self._cache.get(f"{kind}:{name}", retry=True)
            except _DAMAGED:
                return None

    def _set(self, kind: str, name: str, value: Any) -> None:
        with self._translated():
            self._cache.set(f"{kind}:{name}", value, retry=True)

    def source_digest(self, identity: str) -> str | None:
        """Content digest of the source bytes with this identity, if they were ever read."""
        value = self._get("source", digest_texts([identity]))
        return value if is_digest(value) else None

    def set_source_digest(self, identity: str, digest: str) -> None:
        """Remember the content of source bytes."""
        self._set("source", digest_texts([identity]), digest)

    def sampled_digest(self, sample: str) -> str | None:
        """Content digest of a tensor that had this sample: what another such tensor may hold."""
        value = self._get("sample", sample)
        return value if is_digest(value) else None

    def set_sampled_digest(self, sample: str, digest: str) -> None:
        """Remember the content behind a sample."""
        self._set("sample", sample, digest)

    def outputs(self, key: str, count: int) -> tuple[str, ...] | None:
        """Digests of the `count` outputs of the action with this key, if it ever ran."""
        return _digests(self._get("action", key), count)

    def set_outputs(self, key: str, digests: Sequence[str]) -> None:
        """Remember an action's outputs."""
        self._set("action", key, list(digests))

    def figure(self, digest: str) -> list[float] | None:
        """The numbers in a small tensor of this content, if an action made it a figure."""
        value = self._get("figure", digest)
        if isinstance(value, list) and all(type(item) in (int, float) for item in value):
            return value
        return None

    def set_figure(self, digest: str, values: Sequence[float]) -> None:
        """Remember the numbers in a small tensor."""
        self._set("figure", digest, list(values))

    def place(self, digest: str) -> tuple[str, int] | None:
        """Layout and offset at which a tensor's bytes were last written; layout "" is a blob."""
        value = self._get("place", digest)
        if (
            isinstance(value, list)
            and len(value) == 2
            and (value[0] == "" or is_digest(value[0]))
            and type(value[1]) is int
            and value[1] >= 0
        ):
            return value[0], value[1]
        return None

    def set_place(self, digest: str, layout: str, offset: int) -> None:
        """Remember where a tensor's bytes are."""
        self._set("place", digest, [layout, offset])

    def pack_of_layout(self, layout: str) -> str | None:
        """The pack that was made by this layout, whether or not it still exists."""
        value = self._get("layout", layout)
        return value if is_digest(value) else None

    def set_pack_of_layout(self, layout: str, pack: str) -> None:
        """Remember which pack a layout became."""
        self._set("layout", layout, pack)

    def pack(self, pack: str) -> PackRecord | None:
        """What is known of a pack."""
        match self._get("pack", pack):
            case {
                "size": int(size),
                "mtime_ns": int(mtime),
                "layout": str(layout),
                "digests": [*digests],
                **others,
            } if is_digest(layout):
                checked = _digests(digests, len(digests))
                counts = _counts(others.get("counts", [1] * len(digests)), len(digests))
                header = others.get("header", 0)
                if checked is not None and counts is not None and type(header) is int:
                    return PackRecord(size, mtime, layout, checked, counts, max(0, header))
        return None

    def set_pack(self, pack: str, record: PackRecord) -> None:
        """Remember a finished pack."""
        value = {
            "size": record.size,
            "mtime_ns": record.mtime_ns,
            "layout": record.layout,
            "digests": list(record.digests),
            "counts": list(record.counts),
            "header": record.header,
        }
        self._set("pack", pack, value)

    def names(self, kind: str) -> list[str]:
        """The names of all entries of a kind."""
        prefix = f"{kind}:"
        with self._translated():
            keys = [key for key in self._cache.iterkeys() if isinstance(key, str)]
        return [key.removeprefix(prefix) for key in keys if key.startswith(prefix)]

    def forget(self, kind: str, names: Iterable[str]) -> None:
        """Drop entries."""
        with self.together():
            for name in names:
                self._cache.delete(f"{kind}:{name}", retry=True)


def _digests(value: object, count: int) -> tuple[str, ...] | None:
    if isinstance(value, list) and len(value) == count and all(map(is_digest, value)):
        return tuple(value)
    return None


def _counts(value: object, count: int) -> tuple[int, ...] | None:
    if isinstance(value, list) and len(value) == count and all(type(n) is int for n in value):
        return tuple(value)
    return None
