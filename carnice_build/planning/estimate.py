"""What a build takes on machines that are not here: bytes read, written and sent, and seconds.

Pure functions over a plan and what of it is there already, so what is cached costs nothing.
What is on the hub is streamed: it comes once for passes, into files that they are given, and once
for what is made of weights.
What a machine has to do follows from the plan; how long that takes, from rates that were measured
elsewhere (docs/scaling.md).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cached_property

from carnice_build.graph import Action, ActionOutput, ProcessOp, TensorRef, kept_unasked
from carnice_build.planning.scratch import transient_inputs
from carnice_build.planning.status import BuildStatus
from carnice_build.rates import PASSES, Rates, Work
from carnice_build.tensors import SourceTensor


class Resource(StrEnum):
    """What a machine may wait for."""

    WIRE = "wire"
    DISK = "disk"
    KERNELS = "kernels"
    PASSES = "passes"


@dataclass(frozen=True)
class Machines:
    """Machines that are alike, with one GPU each where a calibration wants one.

    `bandwidth` are bytes a second, in and out of each, whatever is at the other end; `price` is
    that of one for an hour.
    """

    count: int
    cores: int
    bandwidth: float
    rates: Rates
    price: float | None = None


@dataclass(frozen=True)
class Load:
    """What one machine does: bytes, and the seconds that each resource is busy.

    `read` are bytes of sources, those that passes read and those that kernels do; `from_hub` are
    those of them that come over the wire; `fetched` and `pushed` come from the remote and go there.
    `packs` are bytes of tensors that are published; `transient` those of hidden states, and of
    layers that passes are given of sources that lie in no file.
    `operations` are those of passes, in which `gpu` says whether a GPU does any.
    `seconds` are without those of `pushed`, which follow when all is done.
    """

    read: int = 0
    from_hub: int = 0
    fetched: int = 0
    pushed: int = 0
    packs: int = 0
    transient: int = 0
    operations: float = 0
    gpu: bool = False
    seconds: Mapping[Resource, float] = field(default_factory=dict)
    pushing: float = 0

    @property
    def slowest(self) -> tuple[Resource, float]:
        """What the others wait for, as all go on beside each other, and for how long."""
        return max(self.seconds.items(), key=lambda item: item[1], default=(Resource.WIRE, 0.0))

    @property
    def total(self) -> float:
        """Seconds until all is pushed."""
        return self.slowest[1] + self.pushing


@dataclass(frozen=True)
class Estimate:
    """What machines do, each its part, and what the last one does to put these together.

    One machine alone has nothing to put together.
    """

    machines: Machines
    nodes: tuple[Load, ...]
    together: Load

    @cached_property
    def busiest(self) -> Load:
        """The node that the others wait for."""
        return max(self.nodes, key=lambda load: load.total)

    @property
    def seconds(self) -> float:
        """From the beginning to the folder."""
        return self.busiest.total + self.together.total

    @property
    def bottleneck(self) -> Resource | None:
        """What most of these seconds go to; None where there is nothing to do."""
        waits = dict.fromkeys(Resource, 0.0)
        for load in (self.busiest, self.together):
            resource, seconds = load.slowest
            waits[resource] += seconds
            waits[Resource.WIRE] += load.pushing
        resource, seconds = max(waits.items(), key=lambda item: item[1])
        return resource if seconds else None

    @property
    def node_hours(self) -> float:
        """Hours that are paid: of all until the last is done, then of one."""
        return (len(self.nodes) * self.busiest.total + self.together.total) / 3600

    @property
    def cost(self) -> float | None:
        """In the currency of the price, where there is one."""
        price = self.machines.price
        return None if price is None else price * self.node_hours


def estimate(
    status: BuildStatus,
    actions: Iterable[Action],
    shares: Sequence[Collection[str]],
    machines: Machines,
) -> Estimate:
    """What each of `machines` takes for its share of what is still to do.

    `actions` are those of the graph, in topological order; `shares` hold identities of actions and
    source tensors.
    What is in no share is done by who puts the parts together, who also reads all that lies in
    folders and was never read here: only then a remote can tell what was made of it.
    One machine does all by itself.
    """
    surveyed = _Surveyed(status, actions, machines)
    if machines.count == 1:
        alone = surveyed.load(surveyed.everything, packs=surveyed.pack_bytes)
        return Estimate(machines, (alone,), Load(seconds=dict.fromkeys(Resource, 0.0)))
    nodes = tuple(surveyed.load(share, pushes=True) for share in shares)
    rest = surveyed.everything.difference(*shares)
    together = surveyed.load(
        rest,
        packs=surveyed.pack_bytes,
        fetched=sum(node.pushed for node in nodes),
        known=surveyed.unread,
    )
    return Estimate(machines, nodes, together)


class _Surveyed:
    """What is still to do, and loads of parts of it."""

    def __init__(self, status: BuildStatus, actions: Iterable[Action], machines: Machines) -> None:
        self._status = status
        self._machines = machines
        self._pending = [action for action in actions if status.to_run(action.identity)]
        self.everything = frozenset({item.identity for item in self._pending} | {*status.sources})
        self.unread = {
            name
            for name, source in status.sources.items()
            if name not in status.digests and not _is_of_hub(source)
        }
        slots = [slot.tensor.ref for pack in status.pending.values() for slot in pack.slots]
        self._packed = {ref.identity: ref for ref in slots}
        self._read = {ref.identity for action in self._pending for ref in action.inputs}
        self._copies = Counter(ref.identity for ref in slots)
        self.pack_bytes = sum(ref.spec.nbytes for ref in slots)

    def load(
        self,
        members: Collection[str],
        *,
        packs: int | None = None,
        fetched: int = 0,
        pushes: bool = False,
        known: Collection[str] = (),
    ) -> Load:
        """What who works on `members` does, writing `packs`, or what it made of them.

        Sources `known` are read whatever they are for.
        """
        members = self.everything.intersection(members)
        actions = [action for action in self._pending if action.identity in members]
        processes = [action for action in actions if isinstance(action.op, ProcessOp)]
        plain = [action for action in actions if not isinstance(action.op, ProcessOp)]
        given = _sources(processes)
        flowing = _sources(plain) | {
            name: source
            for name, source in self._status.sources.items()
            if name in known or (name in members and name in self._packed)
        }
        if packs is None:
            packs = sum(
                ref.spec.nbytes * self._copies[name]
                for name, ref in self._packed.items()
                if _maker(ref) in members
            )
        taken = self._taken(actions) if pushes else self._status.bytes_to_fetch
        load = Load(
            read=_stored(given) + _stored(flowing),
            from_hub=_stored(_of_hub(given)) + _stored(_of_hub(flowing)),
            fetched=(taken if actions or packs else 0) + fetched,
            pushed=self._pushed(actions, members) if pushes else 0,
            packs=packs,
            transient=sum(map(_transient, processes)) + _copied(given),
            operations=sum(_work(action).amount for action in processes if _is_pass(action)),
            gpu=any(_on_gpu(action) for action in processes if _is_pass(action)),
        )
        return self._timed(load, processes, plain, given, flowing)

    def _taken(self, actions: Iterable[Action]) -> int:
        """Bytes that the remote has of what `actions` are given."""
        names = {ref.identity for action in actions for ref in action.inputs}
        return sum(place.count for name, place in self._status.remote.items() if name in names)

    def _pushed(self, actions: Iterable[Action], members: Collection[str]) -> int:
        packed = (ref for ref in self._packed.values() if _maker(ref) in members)
        kept = (
            spec.nbytes
            for action in actions
            for index, spec in enumerate(action.outputs)
            if _lasts(action, index)
            and (name := f"{action.identity}|{index}") not in self._packed
            and (name in self._read or spec.nbytes <= kept_unasked(action))
        )
        return sum(ref.spec.nbytes for ref in packed) + sum(kept)

    def _timed(
        self,
        load: Load,
        processes: Sequence[Action],
        plain: Sequence[Action],
        given: Mapping[str, SourceTensor],
        flowing: Mapping[str, SourceTensor],
    ) -> Load:
        machines, rates = self._machines, self._machines.rates
        passes = [action for action in processes if _is_pass(action)]
        busy = (_work(action) for action in (*plain, *processes) if not _is_pass(action))
        cores = sum(work.amount / rates.core(work.kind) for work in busy)
        cores += load.read / rates.core_read + load.from_hub / rates.core_receive
        cores += _decoded(flowing) / rates.core_decode
        seconds = {
            Resource.WIRE: (load.from_hub + load.fetched) / machines.bandwidth,
            Resource.DISK: (load.read - load.from_hub) / rates.disk_read
            + (load.packs + load.transient) / rates.disk_write,
            Resource.KERNELS: cores / machines.cores,
            Resource.PASSES: _pass_seconds(passes, machines),
        }
        return replace(load, seconds=seconds, pushing=load.pushed / machines.bandwidth)


def _work(action: Action) -> Work:
    return action.op.work(action.params, [ref.spec for ref in action.inputs])


def _is_pass(action: Action) -> bool:
    return _work(action).kind in PASSES


def _on_gpu(action: Action) -> bool:
    return bool(action.params.get("device", "cpu") != "cpu")


def _pass_seconds(passes: Sequence[Action], machines: Machines) -> float:
    """One after another on the GPU; on cores as many chains beside each other as there is room."""
    on_gpu = on_cores = 0.0
    threads = 1
    for action in passes:
        work, rates, layer = _work(action), machines.rates, _sources([action])
        # A layer that is decoded is written to a file by one thread, while the one before is run.
        given = _decoded(layer) / rates.core_decode
        if _on_gpu(action):
            placed = sum(source.spec.nbytes for source in layer.values())
            taken = work.amount / rates.gpu(work.kind) + placed / rates.gpu_load
            on_gpu += max(given, taken)
        else:
            threads = min(action.params.get("threads", 1), machines.cores)
            on_cores += max(given, work.amount / (threads * rates.core(work.kind)))
    beside = max(1, min(_chains(passes), machines.cores // threads))
    return on_gpu + on_cores / beside


def _chains(passes: Sequence[Action]) -> int:
    """How many do not wait for each other."""
    chain: dict[str, int] = {}
    count = 0
    for action in passes:
        makers = (
            ref.origin.action.identity
            for ref in transient_inputs(action)
            if isinstance(ref.origin, ActionOutput)
        )
        found = next((chain[name] for name in makers if name in chain), None)
        if found is None:
            found, count = count, count + 1
        chain[action.identity] = found
    return count


def _sources(actions: Iterable[Action]) -> dict[str, SourceTensor]:
    """What actions read of checkpoints and other files, by identity."""
    return {
        ref.identity: ref.origin
        for action in actions
        for ref in action.inputs
        if isinstance(ref.origin, SourceTensor)
    }


def _of_hub(sources: Mapping[str, SourceTensor]) -> dict[str, SourceTensor]:
    """Those that come over the wire, as do those of a shape file, which lie nowhere."""
    return {name: source for name, source in sources.items() if _is_of_hub(source)}


def _is_of_hub(source: SourceTensor) -> bool:
    return source.file is None or not source.file.local


def _stored(sources: Mapping[str, SourceTensor]) -> int:
    return sum(source.stored_bytes for source in sources.values())


def _copied(sources: Mapping[str, SourceTensor]) -> int:
    """Bytes of files that processes are given of those that lie in none."""
    missing = (item for item in sources.values() if item.stored is not None or _is_of_hub(item))
    return sum(source.spec.nbytes for source in missing)


def _decoded(sources: Mapping[str, SourceTensor]) -> int:
    """Bytes of floats of those that are decoded."""
    return sum(source.spec.nbytes for source in sources.values() if source.stored is not None)


def _maker(ref: TensorRef) -> str:
    """What identifies the action that a tensor comes from, or the source that it is."""
    return ref.origin.action.identity if isinstance(ref.origin, ActionOutput) else ref.identity


def _transient(action: Action) -> int:
    assert isinstance(action.op, ProcessOp)
    return sum(action.outputs[index].nbytes for index in action.op.transient)


def _lasts(action: Action, index: int) -> bool:
    """Whether a part pushes a result that no pack holds, as what a calibration leaves."""
    return isinstance(action.op, ProcessOp) and index not in action.op.transient


def totals(loads: Iterable[Load]) -> Iterator[tuple[str, int]]:
    """Bytes of all loads together, by the names that `Load` has for them."""
    found = list(loads)
    for name in ("read", "from_hub", "fetched", "pushed", "packs", "transient"):
        yield name, sum(getattr(load, name) for load in found)
