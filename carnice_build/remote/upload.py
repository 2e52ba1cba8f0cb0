"""Putting what a build made into a remote: objects first, and last the batch that speaks of them.

A pusher that dies leaves objects that nothing speaks of, which `gc` takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from carnice_build.errors import BuildError
from carnice_build.remote.batches import FORMAT, Body, encode, name_of, split
from carnice_build.remote.calls import RemoteFailure
from carnice_build.remote.objects import Objects
from carnice_build.remote.remote import check_format
from carnice_build.remote.signing import Signer

FOLDERS = ("packs", "blobs")


@dataclass(frozen=True, slots=True)
class LocalBytes:
    """A range of a file of this machine that is to be an object."""

    path: Path
    offset: int
    count: int


@dataclass
class Pushed:
    """What was put: objects and bytes, batches not among them; what was there already is not."""

    objects: int = 0
    bytes: int = 0
    present: int = 0


def push(
    objects: Objects,
    bodies: Mapping[str, Body],
    files: Mapping[str, LocalBytes],
    signer: Signer | None,
    moving: Callable[[int], None],
    moved: Callable[[int], None],
) -> Pushed:
    """Put `files`, by the names of their objects, and a batch for each of `bodies`.

    Without a `signer` there are no batches: another machine has to `publish` these bodies.
    What a listing shows to be there in its right size is not put again.
    `moving` is told how many bytes there are to put, `moved` of those that are through.
    Raises BuildError when the remote refuses, or is full.
    """
    with _failures_worded(objects):
        return _push(objects, bodies, files, signer, moving, moved)


def publish(objects: Objects, bodies: Iterable[Body], signer: Signer) -> None:
    """Put a batch for each of these bodies, whose files somebody has put.

    Raises BuildError when the remote refuses, or is full.
    """
    with _failures_worded(objects):
        _publish(objects, bodies, signer)


@contextmanager
def _failures_worded(objects: Objects) -> Iterator[None]:
    try:
        yield
    except RemoteFailure as failure:
        raise BuildError(
            f"cannot push: the remote {failure}",
            where=objects.name,
            expected="a remote that takes it; what was built is complete here",
        ) from None


def _push(
    objects: Objects,
    bodies: Mapping[str, Body],
    files: Mapping[str, LocalBytes],
    signer: Signer | None,
    moving: Callable[[int], None],
    moved: Callable[[int], None],
) -> Pushed:
    if not check_format(objects):
        objects.put("FORMAT", FORMAT.encode())
    result = Pushed()
    missing = _missing(objects, files)
    result.present = len(files) - len(missing)
    moving(sum(item.count for item in missing.values()))
    _put(objects, missing, moved, result)
    if signer is not None:
        _publish(objects, bodies.values(), signer)
    # A collection that ran meanwhile may have taken what was there; now the batch holds it.
    _put(objects, _missing(objects, files), lambda count: None, result)
    return result


def _publish(objects: Objects, bodies: Iterable[Body], signer: Signer) -> None:
    for body in bodies:
        for part in split(body):
            content = encode(part, signer)
            objects.put(f"records/{name_of(content)}", content)


def _missing(objects: Objects, files: Mapping[str, LocalBytes]) -> dict[str, LocalBytes]:
    there = {
        f"{folder}/{name}": item.size
        for folder in FOLDERS
        if any(name.startswith(f"{folder}/") for name in files)
        for name, item in objects.listing(folder).items()
    }
    return {name: item for name, item in files.items() if there.get(name) != item.count}


def _put(
    objects: Objects,
    files: Mapping[str, LocalBytes],
    moved: Callable[[int], None],
    result: Pushed,
) -> None:
    def put(item: tuple[str, LocalBytes]) -> None:
        name, source = item
        objects.put_range(name, source.path, source.offset, source.count)

    for _, source in objects.do_all(files.items(), lambda item: item[1].count, put):
        moved(source.count)
        result.objects += 1
        result.bytes += source.count
