"""Looking after a remote: what it holds, and what nobody has pushed for long.

Times are the remote's own, and its newest one is now: the clock of this machine says nothing.
A remote that tells no times keeps all it has.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from carnice_build.errors import BuildError, StoreError
from carnice_build.remote.batches import Body, Unbelieved, open_envelope, read_body
from carnice_build.remote.calls import RemoteFailure
from carnice_build.remote.index import blob_name, pack_name
from carnice_build.remote.objects import Listed, Objects, Range
from carnice_build.remote.remote import Remote, check_format

_FOLDERS = ("packs", "blobs", "records")


@dataclass(frozen=True)
class RemoteStats:
    """Objects and bytes of a remote; `believed` batches are those of trusted keys.

    `needed_bytes` are those of the packs and blobs that they speak of and that are there.
    """

    packs: int
    pack_bytes: int
    blobs: int
    blob_bytes: int
    batches: int
    batch_bytes: int
    believed: int
    needed_bytes: int
    actions: int
    variants: list[str]
    notices: list[str]


@dataclass(frozen=True)
class Removed:
    """What a collection took: objects and their bytes, batches among them."""

    files: int
    bytes: int


def stats(remote: Remote) -> RemoteStats:
    """Count what a remote has."""
    packs, blobs, records = (remote.objects.listing(folder) for folder in _FOLDERS)
    bodies = remote.bodies.values()
    needed = _named(bodies)
    there = _objects(packs, blobs)
    return RemoteStats(
        packs=len(packs),
        pack_bytes=_bytes(packs),
        blobs=len(blobs),
        blob_bytes=_bytes(blobs),
        batches=len(records),
        batch_bytes=_bytes(records),
        believed=len(remote.bodies),
        needed_bytes=sum(item.size for name, item in there.items() if name in needed),
        actions=len({key for body in bodies for key in body.actions}),
        variants=sorted({name for body in bodies for name in body.variants}),
        notices=remote.complaints,
    )


def collect(objects: Objects, max_age: float) -> Removed:
    """Remove batches last pushed more than `max_age` seconds ago, and what only they name.

    What is younger stays, for somebody may be about to name it, and so does what any batch that
    stays names, whoever signed it.
    Batches go first, so that none ever speaks of what is gone.
    Raises BuildError when the remote does not let us.
    """
    try:
        if not check_format(objects):
            raise StoreError("there is no remote", where=objects.name)
        return _collect(objects, max_age)
    except RemoteFailure as failure:
        raise BuildError(f"cannot collect: the remote {failure}", where=objects.name) from None


def _collect(objects: Objects, max_age: float) -> Removed:
    packs, blobs, records = (objects.listing(folder) for folder in _FOLDERS)
    others = _objects(packs, blobs)
    batches = {f"records/{name}": item for name, item in records.items()}
    oldest = _newest([*others.values(), *batches.values()]) - max_age
    old = {name: item for name, item in batches.items() if _is_older(item, oldest)}
    needed = _named(_bodies(objects, {n: i for n, i in batches.items() if n not in old}))
    unnamed = {
        name: item
        for name, item in others.items()
        if name not in needed and _is_older(item, oldest)
    }
    for names in (old, unnamed):
        for _ in objects.do_all(names, lambda name: 0, objects.remove):
            pass
    return Removed(len(old) + len(unnamed), _bytes(old) + _bytes(unnamed))


def _newest(items: Iterable[Listed]) -> float:
    return max((item.time for item in items if item.time is not None), default=0.0)


def _is_older(item: Listed, oldest: float) -> bool:
    return item.time is not None and item.time < oldest


def _bodies(objects: Objects, batches: Mapping[str, Listed]) -> list[Body]:
    """All that can be read, by whatever key; RemoteFailure when one does not come."""
    found = []
    ranges = [Range(name, 0, item.size) for name, item in batches.items() if item.size]
    for item, content in objects.read_ranges(ranges):
        if isinstance(content, RemoteFailure):
            raise content
        try:
            envelope = open_envelope(item.name.rpartition("/")[2], content)
            found.append(read_body(envelope, None))
        except Unbelieved:
            continue
    return found


def _objects(packs: Mapping[str, Listed], blobs: Mapping[str, Listed]) -> dict[str, Listed]:
    found = {f"packs/{name}": item for name, item in packs.items()}
    return found | {f"blobs/{name}": item for name, item in blobs.items()}


def _named(bodies: Iterable[Body]) -> set[str]:
    """The objects that batches speak of."""
    names: set[str] = set()
    for body in bodies:
        names.update(map(pack_name, body.packs))
        names.update(map(blob_name, body.blobs))
    return names


def _bytes(listed: Mapping[str, Listed]) -> int:
    return sum(item.size for item in listed.values())
