"""What all jobs of a build share: the store, the packs being written, and what was learnt."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

from carnice_build.dtypes import TensorSpec
from carnice_build.execute.jobs import Job, Sink
from carnice_build.execute.runner import Runner
from carnice_build.graph import Action, TensorRef
from carnice_build.store.packs import Location, PartialPack
from carnice_build.store.store import Store

Found = Sequence[tuple[str, Location | None]]
"""Digest and place of each output of an action that need not run; None where nobody wants it."""


@dataclass
class JobResult:
    """What a job did, in how many `seconds`: places filled by layout, actions run and settled."""

    filled: list[tuple[Sink, str]] = field(default_factory=list)
    made: list[Action] = field(default_factory=list)
    settled: Sequence[Action] = ()
    read_bytes: int = 0
    written_bytes: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Workbench:
    """`digests` holds what is known of refs' content, by identity; jobs add to it.

    `progress` is told of source bytes that were read; `scratch` is a folder of this build alone;
    `awaited` says of a transient tensor, by its identity, whether jobs of it are still to read it.
    `copies` says by the identity of a source that lies in no file where a job put it last, for as
    long as that runs; `failed` is set when a job ended with an error.
    """

    store: Store
    packs: Mapping[str, PartialPack]
    runner: Runner
    scratch: Path
    progress: Callable[[int], None]
    digests: dict[str, str]
    awaited: Callable[[str], bool]
    copies: dict[str, Path] = field(default_factory=dict)
    failed: threading.Event = field(default_factory=threading.Event)
    _locks: dict[str, threading.Lock] = field(default_factory=dict)
    _guard: threading.Lock = field(default_factory=threading.Lock)

    def lock(self, name: str) -> AbstractContextManager[object]:
        """A lock that all jobs of this build share under `name`."""
        with self._guard:
            return self._locks.setdefault(name, threading.Lock())

    def digest_of(self, ref: TensorRef) -> str:
        """Digest of a tensor that was read or made before."""
        return self.digests[ref.identity]

    def find(self, job: Job, action: Action, digests: Sequence[str]) -> Found | None:
        """The outputs of an action on inputs of this content, if the store has all it is to give.

        Of figures that nobody reads no bytes are kept, and none are asked for.
        """
        outputs = self.store.lookup(action.key(digests), action.outputs)
        if outputs is None:
            return None
        found: list[tuple[str, Location | None]] = []
        for index, digest in enumerate(outputs.digests):
            wanted = job.keeps(action, index) or job.sinks_of(action, index)
            location = outputs.locate(index) if wanted else None
            if wanted and location is None:
                return None
            found.append((digest, location))
        return found

    def copy(
        self, location: Location, sink: Sink, count: int, digest: str, result: JobResult
    ) -> None:
        """Fill a place of a pack from a file of the cache."""
        pack = self.packs[sink.layout]
        # A resumed pack may hold these very bytes already.
        if location != Location(pack.path, sink.offset):
            try:
                pack.copy_from(location, sink.offset, count)
            except FileNotFoundError:
                # The pack that it lay in was finished meanwhile, and has another name now.
                moved = self.store.locate(digest, count)
                if moved is None:
                    raise
                pack.copy_from(moved, sink.offset, count)
            result.written_bytes += count
        self.store.records.set_place(digest, sink.layout, sink.offset)
        result.filled.append((sink, digest))

    def take(self, job: Job, action: Action, found: Found, result: JobResult) -> None:
        """Use outputs that the store has."""
        for index, (digest, location) in enumerate(found):
            self.digests[f"{action.identity}|{index}"] = digest
            for sink in job.sinks_of(action, index):
                assert location is not None
                self.copy(location, sink, action.outputs[index].nbytes, digest, result)

    def fill(self, sinks: Sequence[Sink], spec: TensorSpec, digest: str, result: JobResult) -> None:
        """Note that bytes were written to their places."""
        for sink in sinks:
            self.store.records.set_place(digest, sink.layout, sink.offset)
            result.filled.append((sink, digest))
            result.written_bytes += spec.nbytes

    def remember(
        self,
        job: Job,
        action: Action,
        digests: Sequence[str],
        result: JobResult,
        *,
        ran: bool = True,
    ) -> None:
        """Record the outputs of an action that `ran`, or that passed its inputs on."""
        inputs = [self.digest_of(ref) for ref in action.inputs]
        self.store.records.set_outputs(action.key(inputs), digests)
        for index, digest in enumerate(digests):
            self.digests[f"{action.identity}|{index}"] = digest
            self.fill(job.sinks_of(action, index), action.outputs[index], digest, result)
        if ran:
            result.made.append(action)
