"""Taking over what a remote has, before anything is computed.

Fetched bytes go into the places of the packs that want them, or become blobs, as if a build had
been killed after it made them; a pack that becomes whole is finished.
Whatever does not arrive, or is not what it should be, is simply not there: the build makes it.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path

from carnice_build.errors import PlanError
from carnice_build.execute.events import Listener, Moved, Moving, Notice
from carnice_build.execute.streaming import read_digest, sample_digest
from carnice_build.formats.layout import PackLayout
from carnice_build.graph import ActionOutput
from carnice_build.planning.planner import VariantPlan
from carnice_build.planning.status import BuildStatus, survey
from carnice_build.remote.calls import GivenUp
from carnice_build.remote.download import Ended, download
from carnice_build.remote.index import Index, RemotePlace
from carnice_build.remote.remote import Remote
from carnice_build.store.files import io_errors_named
from carnice_build.store.packs import PartialPack
from carnice_build.store.store import Store
from carnice_build.tensors import SourceTensor
from carnice_build.units import format_size, plural

_REMEMBERED = 256
"""Tensors whose places are written down in one transaction."""


@dataclass
class Fetched:
    """What came: tensors, and their bytes; `status` is what is then still to do, without a remote.

    `failures` says why something did not come, as clauses, with the digests of what that was.
    """

    status: BuildStatus
    tensors: int = 0
    bytes: int = 0
    read_bytes: int = 0
    failures: dict[str, list[str]] = field(default_factory=dict)


def fetch(
    variants: Sequence[VariantPlan], store: Store, remote: Remote, jobs: int, listen: Listener
) -> Fetched:
    """Take over all that `variants` need and the remote has; tells what failed as notices.

    Raises PlanError when the disk is too small for it, BuildError when it fills up.
    """
    with io_errors_named(store.root):
        status = survey(variants, store, remote.index)
        read_bytes = _recognize(variants, status, store, remote.index, jobs, listen)
        if read_bytes:
            status = survey(variants, store, remote.index)
        result = Fetched(status, read_bytes=read_bytes)
        _take(variants, remote, store, result, listen)
        result.status = survey(variants, store)
    return result


def fetch_inputs(
    variants: Sequence[VariantPlan],
    mine: Container[str],
    store: Store,
    remote: Remote,
    listen: Listener,
) -> Fetched:
    """Take over what actions of `mine` are given and the remote has; no pack is filled.

    The status then counts as done what the remote has, but for what did not come; tells what
    failed as notices.
    """
    with io_errors_named(store.root):
        status = survey(variants, store, remote.index)
        given = {
            ref.identity
            for variant in variants
            for action in variant.actions.values()
            if action.identity in mine and status.to_run(action.identity)
            for ref in action.inputs
        }
        wanted = {name: place for name, place in status.remote.items() if name in given}
        result = Fetched(replace(status, pending={}, remote=wanted))
        _take(variants, remote, store, result, listen)
        failed = {digest for digests in result.failures.values() for digest in digests}
        result.status = survey(variants, store, remote.index.without(failed))
    return result


def _take(
    variants: Sequence[VariantPlan],
    remote: Remote,
    store: Store,
    result: Fetched,
    listen: Listener,
) -> None:
    """Fetch what `result.status` wants of the remote, and believe what was learnt on the way."""
    status = result.status
    if status.remote:
        _check_disk(status, store)
        with closing(_Fetching(store, listen)) as fetching:
            fetching.run(remote, result)
    _believe(status, store, remote.index)
    for reason, digests in result.failures.items():
        count, failed = plural(len(digests), "tensor"), set(digests)
        # Any of them tells where to look; there may be thousands.
        place, name = next(
            (status.remote[identity].name, name)
            for identity, name in _names(variants)
            if identity in status.remote and status.digests[identity] in failed
        )
        first = "" if len(digests) == 1 else "the first "
        text = f"{count} not fetched: {first}{name!r} of {place}"
        listen(Notice(f"{remote.name}: {reason} ({text})"))


def _names(variants: Sequence[VariantPlan]) -> Iterator[tuple[str, str]]:
    """Identities of all that variants are made of, with what to call it.

    What is published has a name; of the rest, it says more of which tensor it is made than how.
    """
    for variant in variants:
        for pack in variant.packs:
            yield from ((slot.tensor.ref.identity, slot.tensor.name) for slot in pack.slots)
    for variant in variants:
        for action in variant.actions.values():
            made_of = (ref.origin for ref in action.inputs)
            names = (item.name for item in made_of if isinstance(item, SourceTensor))
            of = next((f" of {name}" for name in names), "")
            for index in range(len(action.outputs)):
                yield f"{action.identity}|{index}", f"output {index} of {action.op.name}{of}"
            yield from (
                (ref.identity, ref.origin.name)
                for ref in action.inputs
                if isinstance(ref.origin, SourceTensor)
            )


# --- sources of this machine that nobody has read yet ---------------------------------------------


def _recognize(
    variants: Sequence[VariantPlan],
    status: BuildStatus,
    store: Store,
    index: Index,
    jobs: int,
    listen: Listener,
) -> int:
    """Read the sources for which the remote has results, if they are what samples of them say.

    The digest of a file on the hub travels; a file of this machine has to be read to be known.
    Returns how many bytes were read.
    """
    foretold = {}
    for identity, source in status.sources.items():
        if identity not in status.digests and source.file is not None and source.file.local:
            sample = sample_digest(source)
            digest = store.records.sampled_digest(sample) or index.sampled_digest(sample)
            if digest is not None:
                foretold[identity] = digest
    if not foretold:
        return 0
    supposed = survey(variants, store, index.supposing(foretold))
    behind = _sources_behind(variants, supposed.remote)
    wanted = [status.sources[identity] for identity in foretold if identity in behind]
    if wanted:
        _read(wanted, store, jobs, listen)
    return sum(source.stored_bytes for source in wanted)


def _sources_behind(variants: Sequence[VariantPlan], wanted: Container[str]) -> set[str]:
    """Identities of all sources from which the tensors with the `wanted` identities are made."""
    refs = {name: ref for item in variants for name, ref in item.refs.items()}
    waiting = [ref for name, ref in refs.items() if name in wanted]
    found: set[str] = set()
    seen: set[str] = set()
    while waiting:
        ref = waiting.pop()
        if ref.identity in seen:
            continue
        seen.add(ref.identity)
        if isinstance(ref.origin, ActionOutput):
            waiting += ref.origin.action.inputs
        else:
            found.add(ref.identity)
    return found


def _read(sources: Sequence[SourceTensor], store: Store, jobs: int, listen: Listener) -> None:
    listen(Moving("recognizing the source", sum(source.stored_bytes for source in sources)))

    def read(source: SourceTensor) -> tuple[SourceTensor, str]:
        digest = read_digest(source)
        listen(Moved(source.stored_bytes))
        return source, digest

    with ThreadPoolExecutor(jobs, thread_name_prefix="carnice-read") as pool:
        found = list(pool.map(read, sources))
    with store.records.together():
        for source, digest in found:
            store.records.set_source_digest(source.identity, digest)
            store.records.set_sampled_digest(sample_digest(source), digest)


# --- records --------------------------------------------------------------------------------------


def _believe(status: BuildStatus, store: Store, index: Index) -> None:
    """Take over the records that trusted keys signed and that these variants need."""
    records = store.records
    with records.together():
        for identity, digest in status.learnt.sources.items():
            records.set_source_digest(identity, digest)
        for key, digests in status.learnt.outputs.items():
            records.set_outputs(key, digests)
            for digest in digests:
                figure = index.figure(digest)
                if figure is not None:
                    records.set_figure(digest, figure)


# --- bytes ----------------------------------------------------------------------------------------


def _check_disk(status: BuildStatus, store: Store) -> None:
    needed, free = status.bytes_to_fetch, store.free_bytes()
    if needed > free:
        raise PlanError(
            f"what is fetched takes {format_size(needed)} of disk, {format_size(free)} are free",
            where=str(store.root),
        )


@dataclass(frozen=True, slots=True)
class _Target:
    """A place that wants a tensor: in the pack of a layout, or a file that is to be a blob."""

    layout: str
    offset: int


class _Fetching:
    """The packs that are being filled, locked by this build as in `session`."""

    def __init__(self, store: Store, listen: Listener) -> None:
        self._store = store
        self._listen = listen
        self._packs: dict[str, PartialPack] = {}
        self._layouts: dict[str, PackLayout] = {}
        self._places: dict[str, RemotePlace] = {}
        self._targets: dict[str, list[_Target]] = {}
        self._filled: dict[str, dict[int, str]] = {}
        self._unwritten: list[tuple[str, _Target]] = []
        self._ended: set[str] = set()

    def _plan(self, status: BuildStatus) -> None:
        wanted = {
            identity: layout
            for identity, layout in status.pending.items()
            if any(slot.tensor.ref.identity in status.remote for slot in layout.slots)
        }
        slots: set[str] = set()
        for identity, layout in sorted(wanted.items()):
            pack = self._store.partial(identity, layout.header, layout.size)
            slots.update(slot.tensor.ref.identity for slot in layout.slots)
            if not pack.acquire(waiting=self._note_waiting):
                continue  # another build has just finished it
            self._packs[identity], self._layouts[identity] = pack, layout
            self._filled[identity] = {}
            pack.prepare()
            for slot in layout.slots:
                ref = slot.tensor.ref
                if ref.identity in status.remote:
                    self._want(status, ref.identity, _Target(identity, slot.offset))
        for identity in status.remote:
            if identity not in slots:
                self._want(status, identity, _Target("", 0))

    def _want(self, status: BuildStatus, identity: str, target: _Target) -> None:
        digest = status.digests[identity]
        self._places[digest] = status.remote[identity]
        targets = self._targets.setdefault(digest, [])
        if target not in targets:
            targets.append(target)

    def _note_waiting(self) -> None:
        self._listen(Notice("waiting for another build that makes the same files"))

    def close(self) -> None:
        """Leave the packs to whoever comes next, with what is in them."""
        self._write_down()
        for pack in self._packs.values():
            pack.close()

    def run(self, remote: Remote, result: Fetched) -> None:
        """Fetch what `result.status` wants; what fails is counted, and a slow remote is left."""
        self._plan(result.status)
        total = sum(place.count for place in self._places.values())
        self._listen(Moving(f"fetching from {remote.name}", total))
        with self._store.workspace() as scratch:
            try:
                self._receive(remote, scratch, result)
            except GivenUp as failure:
                missing = [digest for digest in self._places if digest not in self._ended]
                if missing:
                    result.failures[f"it {failure}"] = missing
        self._write_down()

    def _receive(self, remote: Remote, scratch: Path, result: Fetched) -> None:
        for event in download(remote.objects, self._places):
            if not isinstance(event, Ended):
                self._write(event.digest, event.offset, event.content, scratch)
                result.bytes += len(event.content)
                self._listen(Moved(len(event.content)))
                continue
            self._ended.add(event.digest)
            if event.failure is not None:
                result.failures.setdefault(str(event.failure), []).append(event.digest)
            else:
                self._accept(event.digest, scratch)
                result.tensors += 1

    def _write(self, digest: str, offset: int, content: memoryview, scratch: Path) -> None:
        for target in self._targets[digest]:
            if target.layout:
                self._packs[target.layout].write(target.offset + offset, content)
            else:
                with (scratch / digest).open("ab" if offset else "wb") as file:
                    file.write(content)

    def _accept(self, digest: str, scratch: Path) -> None:
        """Count a tensor, whose bytes are right and in their places, as there."""
        for target in self._targets[digest]:
            if not target.layout:
                self._store.adopt_blob(scratch / digest, digest, durable=True)
                continue
            self._unwritten.append((digest, target))
            filled = self._filled[target.layout]
            filled[target.offset] = digest
            layout = self._layouts[target.layout]
            if len(filled) == len(layout.slots):
                self._write_down()
                digests = [filled[slot.offset] for slot in layout.slots]
                self._store.finish(self._packs.pop(target.layout), digests, layout.counts)
        if len(self._unwritten) >= _REMEMBERED:
            self._write_down()

    def _write_down(self) -> None:
        with self._store.records.together():
            for digest, target in self._unwritten:
                self._store.records.set_place(digest, target.layout, target.offset)
        self._unwritten.clear()
