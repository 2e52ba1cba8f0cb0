"""Looking after a cache: what it holds, what can go, what is damaged.

A pack is needed while a build folder links to it; the system's link count says so.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from carnice_build.checkpoint.containers import read_entries
from carnice_build.checkpoint.source import LocalFile
from carnice_build.errors import CheckpointError
from carnice_build.store.answers import is_damaged
from carnice_build.store.digests import digest_bytes, digest_texts, is_digest
from carnice_build.store.packs import Extent, digest_range, extents, read_header_bytes
from carnice_build.store.store import Store

_SMALL_BYTES = 1 << 20

_HEADER, _GAPS = "the header", "the places between tensors"
"""What stands for a tensor's name where others of a pack's bytes changed."""


@dataclass(frozen=True)
class Stats:
    """Files and bytes in a cache; `linked` packs are part of a build folder."""

    packs: int
    pack_bytes: int
    linked_packs: int
    linked_bytes: int
    partial_packs: int
    partial_bytes: int
    blobs: int
    blob_bytes: int
    record_bytes: int
    actions: int
    answers: int
    answer_bytes: int
    figures: int
    figure_bytes: int


@dataclass(frozen=True)
class Collected:
    """What a collection removed."""

    files: int
    bytes: int


@dataclass(frozen=True)
class Damage:
    """A file of the cache whose bytes are not what they were.

    `file` is its path in the cache; `tensors` names those that changed of a pack that is readable.
    """

    file: str
    tensors: tuple[str, ...]


def stats(store: Store) -> Stats:
    """Count what is in the cache."""
    packs = _files(store.root / "packs")
    linked = [path for path in packs if path.stat().st_nlink > 1]
    partial = _files(store.root / "partial")
    blobs = _files(store.root / "blobs")
    answers, figures = _answers(store), _files(store.root / "measured")
    return Stats(
        packs=len(packs),
        pack_bytes=_bytes(packs),
        linked_packs=len(linked),
        linked_bytes=_bytes(linked),
        partial_packs=len(partial),
        partial_bytes=_bytes(partial),
        blobs=len(blobs),
        blob_bytes=_bytes(blobs),
        record_bytes=_bytes(_files(store.root / "records")),
        actions=len(store.records.names("action")),
        answers=len(answers),
        answer_bytes=_bytes(answers),
        figures=len(figures),
        figure_bytes=_bytes(figures),
    )


def collect(
    store: Store, *, max_age: float | None = None, max_bytes: int | None = None
) -> Collected:
    """Remove what no build folder needs, oldest first; statistics of calibrations stay.

    So do figures of verifications, but not what a source's model computed on the way to them.
    With `max_age` (seconds since it was written) only what is older goes, figures of verifications
    too, and answers that no plan has asked for since; with `max_bytes` only as much as brings the
    cache down to that size; with neither, all of it but figures and answers, for plans of the
    folders that stay ask for them.
    Raises StoreError while a build is running.
    """
    with store.alone():
        candidates = [
            path
            for folder in ("packs", "partial", "blobs", "measured")
            for path in _files(store.root / folder)
            if path.stat().st_nlink == 1 and not _stays(path, folder, aged=max_age is not None)
        ]
        if max_age is not None:
            oldest = time.time() - max_age
            candidates += _answers(store)
            candidates = [path for path in candidates if path.stat().st_mtime < oldest]
        candidates.sort(key=lambda path: path.stat().st_mtime)
        excess = None if max_bytes is None else _total(store) - max_bytes
        removed = _remove(candidates, excess)
        _forget_lost(store)
        return removed


def _stays(path: Path, folder: str, *, aged: bool) -> bool:
    """What a calibration leaves is kept: it takes kilobytes and cost hours.

    Figures, which take no more and cost minutes, are kept until they have `aged`.
    """
    kept = folder == "blobs" or (folder == "measured" and not aged)
    return kept and path.stat().st_size <= _SMALL_BYTES


def _remove(candidates: list[Path], excess: int | None) -> Collected:
    files = count = 0
    for path in candidates:
        if excess is not None and count >= excess:
            break
        files += 1
        count += path.stat().st_size
        path.unlink()
    return Collected(files, count)


def _forget_lost(store: Store) -> None:
    """Drop records of packs that are gone, and of the places that tensors had in them."""
    records = store.records
    lost = [pack for pack in records.names("pack") if not store.pack_path(pack).exists()]
    records.forget("pack", lost)
    layouts = [name for name in records.names("layout") if not store.finished_pack(name)]
    records.forget("layout", layouts)
    places = [name for name in records.names("place") if not _has_place(store, name)]
    records.forget("place", places)


def _has_place(store: Store, digest: str) -> bool:
    place = store.records.place(digest)
    return place is not None and store.holds(digest, place)


def find_damage(store: Store, progress: Callable[[int], None]) -> list[Damage]:
    """Digest every finished pack again; a damaged one becomes partial, to be made good.

    Answers that are damaged are removed, to be asked for again.
    `progress` is told the bytes that were digested.  Raises StoreError while a build is running.
    """
    with store.alone():
        damaged = []
        for path in _files(store.root / "packs"):
            changed = _changed_tensors(store, path)
            progress(path.stat().st_size)
            if changed is not None:
                damaged.append(Damage(f"packs/{path.name}", changed))
                store.demote(path.stem)
        for path in filter(is_damaged, _answers(store)):
            damaged.append(Damage(f"answers/{path.name}", ()))
            path.unlink()
        return damaged


def _changed_tensors(store: Store, path: Path) -> tuple[str, ...] | None:
    """Names of the tensors whose bytes changed; () for a pack that is not readable at all.

    Or that the header did: a GGUF's holds the tokenizer and all else that is known of a model; or
    what fills up the places between its tensors.
    """
    record = store.records.pack(path.stem) if is_digest(path.stem) else None
    if record is None:
        return ()
    try:
        groups = extents(read_entries(LocalFile(path)), record.counts)
    except (CheckpointError, ValueError):
        return ()
    changed = tuple(
        group.names[0] if len(group.names) == 1 else f"{group.names[0]} to {group.names[-1]}"
        for group, digest in zip(groups, record.digests, strict=True)
        if digest_range(path, group.offset, group.nbytes) != digest
    )
    header = digest_bytes(read_header_bytes(path, record.header))
    if not changed and digest_texts([header, *record.digests]) != path.stem:
        return (_HEADER,)
    if not changed and _strays(path, groups):
        return (_GAPS,)
    return changed or None


def _strays(path: Path, groups: Sequence[Extent]) -> bool:
    """Whether anything but zeros fills up what lies between tensors."""
    starts = [*(group.offset for group in groups[1:]), path.stat().st_size]
    with path.open("rb") as file:
        for group, start in zip(groups, starts, strict=True):
            end = group.offset + group.nbytes
            if start > end:
                file.seek(end)
                if any(file.read(start - end)):
                    return True
    return False


def _answers(store: Store) -> list[Path]:
    return [path for path in _files(store.root / "answers") if is_digest(path.name)]


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def _bytes(paths: list[Path]) -> int:
    return sum(path.stat().st_size for path in paths)


def _total(store: Store) -> int:
    return _bytes(_files(store.root))
