"""What of a plan is there already, and what must run; the only part of planning to ask the store.

Three answers for an action: *cached* (its outputs are in the store), *run* (its key is known and
nothing has it) and *read* (an input was never read, so its key is not known yet).
Where a remote is asked too, there is a fourth: *remote* (its outputs are there, to be fetched).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from carnice_build.formats.layout import PackLayout
from carnice_build.graph import Action, ActionOutput, TensorRef
from carnice_build.planning.planner import VariantPlan
from carnice_build.planning.scratch import scratch_bytes
from carnice_build.remote.index import Index, RemotePlace
from carnice_build.store.packs import Location
from carnice_build.store.store import Store
from carnice_build.tensors import SourceTensor


@dataclass
class Learnt:
    """What a remote's records said: `outputs` by action key, `sources` by identity."""

    outputs: dict[str, tuple[str, ...]] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)


class Status(StrEnum):
    """Whether an action's work is still to do."""

    CACHED = "cached"
    RUN = "run"
    READ = "read"
    REMOTE = "remote"


@dataclass
class BuildStatus:
    """The state of every pack and action that some variants need.

    `digests` holds the content digest of each tensor that is known, by the ref's identity;
    `finished` the packs that exist, by layout; `pending` the layouts still to write.
    `remote` says where a remote has what the store lacks, by the ref's identity; `learnt` is what
    was believed of it on the way.
    """

    digests: dict[str, str] = field(default_factory=dict)
    finished: dict[str, str] = field(default_factory=dict)
    pending: dict[str, PackLayout] = field(default_factory=dict)
    actions: dict[str, Status] = field(default_factory=dict)
    sources: dict[str, SourceTensor] = field(default_factory=dict)
    locations: dict[str, Location] = field(default_factory=dict)
    remote: dict[str, RemotePlace] = field(default_factory=dict)
    learnt: Learnt = field(default_factory=Learnt)

    def to_run(self, identity: str) -> bool:
        """True for an action whose work a worker is still to do."""
        return self.actions.get(identity) in (Status.RUN, Status.READ)

    def count(self, status: Status) -> int:
        """How many actions are in this state."""
        return sum(1 for found in self.actions.values() if found is status)

    @property
    def bytes_to_read(self) -> int:
        """Bytes of checkpoints that must be read, as they are stored there."""
        return sum(tensor.stored_bytes for tensor in self.sources.values())

    @property
    def bytes_to_fetch(self) -> int:
        """Bytes that a remote has of what the store lacks."""
        wanted = {self.digests[identity]: place for identity, place in self.remote.items()}
        return sum(place.count for place in wanted.values())

    def scratch_bytes(self, actions: Iterable[Action], width: int) -> int:
        """Most disk in use for a while, when those of `actions` run that must, `width` at once."""
        pending = (item for item in actions if self.to_run(item.identity))
        return scratch_bytes(pending, width)

    @property
    def bytes_to_write(self) -> int:
        """Bytes of the packs that must be written."""
        return sum(layout.size for layout in self.pending.values())


def survey(
    variants: Sequence[VariantPlan], store: Store, index: Index | None = None
) -> BuildStatus:
    """Ask the store about everything that `variants` need, and where it knows nothing the index of
    a remote; reads no weight.
    """
    status = BuildStatus()
    surveyor = _Surveyor(store, status, index)
    layouts = {pack.identity: pack for variant in variants for pack in variant.packs}
    for identity, layout in layouts.items():
        pack = store.finished_pack(identity, layout.header)
        if pack:
            status.finished[identity] = pack
            surveyor.note_finished(layout)
        else:
            status.pending[identity] = layout
    for layout in status.pending.values():
        for slot in layout.slots:
            surveyor.need(slot.tensor.ref)
    return status


class Contents:
    """The content digests of tensors, as far as the cache's records know them."""

    def __init__(
        self,
        store: Store,
        digests: dict[str, str] | None = None,
        index: Index | None = None,
    ) -> None:
        """What is found out is kept in `digests`, by the identity of the ref."""
        self._store = store
        self._index = index
        self._digests = {} if digests is None else digests
        self.learnt = Learnt()
        self._asked: set[str] = set()

    def digest(self, ref: TensorRef) -> str | None:
        """Digest of the tensor's bytes; None when they were never read or made."""
        # A chain of layers is deeper than Python's stack.
        waiting = [ref]
        while waiting:
            identity, origin = waiting[-1].identity, waiting[-1].origin
            if identity in self._digests or identity in self._asked:
                waiting.pop()
            elif isinstance(origin, ActionOutput):
                inputs = [item for item in origin.action.inputs if not self._is_settled(item)]
                waiting += inputs
                if not inputs:
                    self._asked.add(identity)
                    self._learn_outputs(origin.action)
            else:
                self._asked.add(identity)
                self._learn(identity, self._source_digest(identity))
        return self._digests.get(ref.identity)

    def _is_settled(self, ref: TensorRef) -> bool:
        return ref.identity in self._digests or ref.identity in self._asked

    def _learn_outputs(self, action: Action) -> None:
        digests = [self._digests.get(ref.identity) for ref in action.inputs]
        known = [digest for digest in digests if digest]
        if len(known) < len(digests):
            return
        for index, digest in enumerate(self._outputs(action, action.key(known))):
            self._learn(f"{action.identity}|{index}", digest)

    def _source_digest(self, identity: str) -> str | None:
        digest = self._store.records.source_digest(identity)
        if digest is None and self._index is not None:
            digest = self._index.source_digest(identity)
            if digest is not None:
                self.learnt.sources[identity] = digest
        return digest

    def _outputs(self, action: Action, key: str) -> Sequence[str]:
        outputs = self._store.lookup(key, action.outputs)
        if outputs is not None:
            return outputs.digests
        found = self._index.outputs(key, len(action.outputs)) if self._index else None
        if found is not None:
            self.learnt.outputs[key] = found
        return found or ()

    def _learn(self, identity: str, digest: str | None) -> None:
        if digest is not None:
            self._digests[identity] = digest


class _Surveyor:
    """Walks from the tensors that must be written back to what must be read."""

    def __init__(self, store: Store, status: BuildStatus, index: Index | None) -> None:
        self._contents = Contents(store, status.digests, index)
        status.learnt = self._contents.learnt
        self._store = store
        self._index = index
        self._status = status

    def note_finished(self, layout: PackLayout) -> None:
        """Count the actions behind a finished pack as cached."""
        for slot in layout.slots:
            self._mark_cached(slot.tensor.ref)

    def _mark_cached(self, ref: TensorRef) -> None:
        waiting = [ref]
        while waiting:
            origin = waiting.pop().origin
            if isinstance(origin, ActionOutput):
                identity = origin.action.identity
                if identity not in self._status.actions:
                    self._status.actions[identity] = Status.CACHED
                    waiting += origin.action.inputs

    def _mark_remote(self, ref: TensorRef) -> None:
        self._mark_cached(ref)
        actions = self._status.actions
        if isinstance(ref.origin, ActionOutput):
            identity = ref.origin.action.identity
            if actions[identity] is Status.CACHED:
                actions[identity] = Status.REMOTE

    def need(self, ref: TensorRef) -> None:
        """Note what must happen so that the bytes of `ref` can be written."""
        waiting = [ref]
        while waiting:
            wanted = waiting.pop()
            digest = self._contents.digest(wanted)
            if digest is not None and self._available(wanted, digest):
                self._mark_cached(wanted)
            elif digest is not None and self._fetchable(wanted, digest):
                self._mark_remote(wanted)
            elif isinstance(wanted.origin, ActionOutput):
                waiting += self._need_action(wanted.origin.action)
            else:
                self._status.sources[wanted.identity] = wanted.origin

    def _need_action(self, action: Action) -> Sequence[TensorRef]:
        """Note that `action` must run; gives what is needed for it."""
        if self._status.to_run(action.identity):
            return ()
        known = all(self._contents.digest(ref) is not None for ref in action.inputs)
        self._status.actions[action.identity] = Status.RUN if known else Status.READ
        return action.inputs

    def _available(self, ref: TensorRef, digest: str) -> bool:
        if ref.identity in self._status.locations:
            return True
        location = self._store.locate(digest, ref.spec.nbytes)
        if location is not None:
            self._status.locations[ref.identity] = location
        return location is not None

    def _fetchable(self, ref: TensorRef, digest: str) -> bool:
        place = self._index.place(digest, ref.spec.nbytes) if self._index else None
        if place is not None:
            self._status.remote[ref.identity] = place
        return place is not None
