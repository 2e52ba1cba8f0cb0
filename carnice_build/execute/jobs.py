"""How pending actions become jobs: what shares a source tensor runs together.

A job holds source tensors and the actions that read them, so that each source byte is read once
however many variants want it; parts of one tensor for which all of it is read are in one job.
Actions that need each other's outputs in both directions across source tensors (a scale shared by
several weights, say) fall into one job, so jobs form a DAG.
An action of a `ProcessOp` is a job by itself: it works for long, and reads its inputs' files when
it needs them, a source's a second time.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import prod

from carnice_build.checkpoint.together import together, whole
from carnice_build.dtypes import TensorSpec
from carnice_build.formats.layout import PackLayout
from carnice_build.graph import Action, ActionOutput, ArrayOp, ProcessOp, TensorRef
from carnice_build.planning.scratch import depths
from carnice_build.planning.status import BuildStatus
from carnice_build.store.packs import Location
from carnice_build.tensors import SourceTensor

STREAM_BYTES = 16 << 20
"""Memory of a job that streams: one block in, its outputs, and what numpy needs meanwhile."""


BLOCK_BYTES = 2 << 20
"""Source bytes in one block: of those measured, the one that costs least (docs/benchmarks.md)."""


PIECE_BYTES = 1 << 20
"""Bytes that are in memory of a source while it is copied into a file."""


@dataclass(frozen=True, slots=True)
class Sink:
    """A place in a pack that wants a tensor's bytes."""

    layout: str
    offset: int


@dataclass
class Job:
    """Work that is done in one go by one worker.

    `sinks` maps the identity of a ref to the places that want its bytes; `blobs` holds the
    identities of outputs that another job reads and no pack keeps.
    One without sources and actions may be there to have the files of action `ahead` here.
    """

    sources: list[SourceTensor]
    actions: list[Action]
    sinks: Mapping[str, Sequence[Sink]]
    blobs: frozenset[str]
    needs: set[int] = field(default_factory=set)
    ahead: Action | None = None

    @cached_property
    def rows(self) -> int | None:
        """How many rows all sources are cut into, to flow through; None when they cannot.

        They can when every action is row-wise on sources of the job alone.
        An action may see more rows than another of the same bytes; the coarsest decide.
        """
        if not self.sources:
            return None
        names = {source.identity for source in self.sources}
        counts = {_flowing_rows(action, names) for action in self.actions}
        read = {ref.identity for action in self.actions for ref in action.inputs}
        counts |= {plain_rows(item.spec) for item in self.sources if item.identity not in read}
        known = [count for count in counts if count is not None]
        rows = min(known, default=0)
        whole = len(known) == len(counts) and all(count % max(1, rows) == 0 for count in known)
        return rows if whole else None

    @property
    def members(self) -> frozenset[str]:
        """Identities of its actions and sources."""
        actions = {action.identity for action in self.actions}
        return frozenset(actions | {source.identity for source in self.sources})

    @property
    def sink_bytes(self) -> int:
        """Bytes that go from it into packs."""
        made = {source.identity: source.spec.nbytes for source in self.sources}
        for action in self.actions:
            made |= {f"{action.identity}|{i}": spec.nbytes for i, spec in enumerate(action.outputs)}
        return sum(count * len(self.sinks.get(name, ())) for name, count in made.items())

    @property
    def streams(self) -> bool:
        """True when rows can flow through."""
        return self.rows is not None

    @property
    def block_rows(self) -> int:
        """Rows of a job that streams that are in memory at a time."""
        assert self.rows is not None
        return block_rows(self.rows, self.source_bytes)

    def sinks_of(self, action: Action, index: int) -> Sequence[Sink]:
        """The places that want output `index` of `action`."""
        return self.sinks.get(f"{action.identity}|{index}", ())

    def keeps(self, action: Action, index: int) -> bool:
        """True when another job reads the output and no pack holds it."""
        return f"{action.identity}|{index}" in self.blobs

    @property
    def process(self) -> ProcessOp | None:
        """The op, when the job is one action that runs in a process of its own."""
        op = self.actions[0].op if len(self.actions) == 1 else None
        return op if isinstance(op, ProcessOp) else None

    @property
    def wants_gpu(self) -> bool:
        """True when it is to have a GPU to itself."""
        return self.process is not None and self.actions[0].wants_gpu

    @property
    def steps(self) -> int:
        """Steps of long work, of which a process tells one by one."""
        return sum(_steps(action) for action in self.actions)

    @property
    def source_bytes(self) -> int:
        """Bytes of all sources, as actions see them."""
        return sum(source.spec.nbytes for source in self.sources)

    @property
    def read_bytes(self) -> int:
        """Bytes that are read for them, as they are stored."""
        return sum(source.stored_bytes for source in self.sources)

    @property
    def peak_bytes(self) -> int:
        """Most memory that the job takes, beyond the process's own."""
        if self.ahead is not None:
            return PIECE_BYTES + _held_bytes(self.ahead)
        if self.process is not None:
            action = self.actions[0]
            specs = [ref.spec for ref in action.inputs]
            return max(_held_bytes(action), self.process.memory(action.params, specs))
        if self.rows is not None:
            return self._streaming_bytes(max(1, self.rows))
        made = [
            ref.spec.nbytes
            for action in self.actions
            for ref in action.inputs
            if isinstance(ref.origin, ActionOutput)
        ]
        outputs = sum(spec.nbytes for action in self.actions for spec in action.outputs)
        groups = together(self.sources)
        held = max((sum(item.held_bytes for item in group) for group in groups), default=0)
        return self.source_bytes + sum(made) + outputs + held + self._workspace

    @property
    def _workspace(self) -> int:
        """What the action that needs most takes beside its inputs and outputs."""
        return max((_workspace(action) for action in self.actions), default=0)

    def _streaming_bytes(self, rows: int) -> int:
        """Beyond what all need: outputs that are held until the end, and rows that are blocks."""
        held = [item for item in self.actions if _is_transposed(item)]
        taken = STREAM_BYTES + sum(spec.nbytes for item in held for spec in item.outputs)
        taken += self._workspace + sum(source.held_bytes for source in self.sources)
        row_bytes = self.source_bytes // rows
        if row_bytes > BLOCK_BYTES:
            flowing = (item for item in self.actions if not _is_transposed(item))
            made = sum(spec.nbytes for item in flowing for spec in item.outputs) // rows
            # An op may need as much as it is given, to cast it, say.
            taken += 2 * row_bytes + made
        return taken

    @property
    def identity(self) -> str:
        """Names the work, also to other builds: jobs on the same first source are alike."""
        return self.sources[0].identity if self.sources else self.actions[0].identity

    @property
    def title(self) -> str:
        """What a trace calls the job."""
        if self.ahead is not None:
            return f"files for {self.ahead.op.name}"
        if self.sources:
            return self.sources[0].name
        return self.actions[0].op.name if self.actions else "nothing"


def first_axis(spec: TensorSpec) -> int:
    """The length of the first axis; 1 for a scalar."""
    return spec.shape[0] if spec.shape else 1


def plain_rows(spec: TensorSpec) -> int:
    """Rows of a tensor that no action reads, as small as they can be."""
    return prod(spec.shape[:-1]) if len(spec.shape) > 1 else first_axis(spec)


def block_rows(rows: int, nbytes: int) -> int:
    """Rows that come at a time, of `rows` that take `nbytes` together."""
    row_bytes = nbytes // max(1, rows)
    return max(1, min(rows, BLOCK_BYTES // max(1, row_bytes)))


def _flowing_rows(action: Action, sources: Container[str]) -> int | None:
    """Rows of its inputs that an action can be given one by one, None when it needs all at once."""
    op, inputs = action.op, action.inputs
    flows = isinstance(op, ArrayOp) and (op.rowwise or (op.transposed and len(inputs) == 1))
    counts = {first_axis(ref.spec) for ref in inputs}
    if not flows or len(counts) != 1 or any(ref.identity not in sources for ref in inputs):
        return None
    return counts.pop()


def _is_transposed(action: Action) -> bool:
    return isinstance(action.op, ArrayOp) and action.op.transposed


def _workspace(action: Action) -> int:
    if not isinstance(action.op, ArrayOp):
        return 0
    return action.op.workspace(action.params, [ref.spec for ref in action.inputs])


def _held_bytes(action: Action) -> int:
    """Memory for its sources, which are copied one after another before a process begins."""
    read = (ref.origin for ref in action.inputs if isinstance(ref.origin, SourceTensor))
    return max((source.held_bytes for source in read), default=0)


def _steps(action: Action) -> int:
    if not isinstance(action.op, ProcessOp):
        return 0
    return action.op.steps(action.params, [ref.spec for ref in action.inputs])


@dataclass(frozen=True, slots=True)
class Placement:
    """A tensor that is in the store already and wanted in another pack."""

    location: Location
    sink: Sink
    count: int
    digest: str


def plan_placements(status: BuildStatus) -> list[Placement]:
    """What is only to be copied into the packs that are to be written."""
    return [
        Placement(
            status.locations[slot.tensor.ref.identity],
            Sink(layout.identity, slot.offset),
            slot.tensor.ref.spec.nbytes,
            status.digests[slot.tensor.ref.identity],
        )
        for layout in status.pending.values()
        for slot in layout.slots
        if slot.tensor.ref.identity in status.locations
    ]


def plan_jobs(
    status: BuildStatus, actions: Iterable[Action], only: Container[str] | None = None
) -> list[Job]:
    """Jobs for everything in `status` that is not only to be copied, in the order to start them.

    `actions` are those of the graph, in topological order.
    With `only`, jobs on what these identities name; they must need no others.
    """
    pending = [action for action in actions if status.to_run(action.identity)]
    sinks = _sinks(status)
    blobs = _blob_outputs(pending, sinks)
    order = {action.identity: index for index, action in enumerate(pending)}
    places = {name: index for index, name in enumerate(status.sources)}
    jobs = [
        Job(
            sources=[
                status.sources[name]
                for name in sorted(members & places.keys(), key=lambda name: places[name])
            ],
            actions=[
                pending[index] for index in sorted(order[name] for name in members if name in order)
            ],
            sinks=sinks,
            blobs=blobs,
        )
        for members in _clusters(status.sources, pending)
        if only is None or next(iter(members)) in only
    ]
    jobs.sort(key=_Order(status, pending))
    _link(jobs)
    return jobs


def _sinks(status: BuildStatus) -> dict[str, list[Sink]]:
    sinks: dict[str, list[Sink]] = {}
    for layout in status.pending.values():
        for slot in layout.slots:
            identity = slot.tensor.ref.identity
            if identity not in status.locations:
                sinks.setdefault(identity, []).append(Sink(layout.identity, slot.offset))
    return sinks


def _blob_outputs(pending: Sequence[Action], sinks: Mapping[str, Sequence[Sink]]) -> frozenset[str]:
    read = {
        ref.identity
        for action in pending
        for ref in action.inputs
        if isinstance(ref.origin, ActionOutput)
    }
    return frozenset(read - set(sinks))


def _clusters(
    sources: Mapping[str, SourceTensor], pending: Sequence[Action]
) -> list[frozenset[str]]:
    wholes = {name: whole(source).identity for name, source in sources.items()}
    if all(_reads_one_source(action, sources) for action in pending):
        # Actions join no sources, which is the case of every plain quantization.
        members: dict[str, list[str]] = {}
        for name, read in wholes.items():
            members.setdefault(read, []).append(name)
        for action in pending:
            members[wholes[action.inputs[0].identity]].append(action.identity)
        return [frozenset(names) for names in members.values()]
    import networkx

    connected = networkx.Graph()
    connected.add_nodes_from(action.identity for action in pending)
    connected.add_edges_from(wholes.items())
    for action in pending:
        if not isinstance(action.op, ProcessOp):
            connected.add_edges_from(
                (ref.identity, action.identity) for ref in action.inputs if ref.identity in sources
            )
    components = [frozenset(members) for members in networkx.connected_components(connected)]
    home = {name: index for index, members in enumerate(components) for name in members}
    order = networkx.DiGraph()
    order.add_nodes_from(range(len(components)))
    order.add_edges_from(
        (home[producer], home[action.identity])
        for action in pending
        for producer in _producers(action)
        if producer in home
    )
    return [
        frozenset().union(*(components[index] for index in group))
        for group in networkx.strongly_connected_components(order)
    ]


def _reads_one_source(action: Action, sources: Mapping[str, SourceTensor]) -> bool:
    return (
        len(action.inputs) == 1
        and action.inputs[0].identity in sources
        and not isinstance(action.op, ProcessOp)
    )


def _producers(action: Action) -> list[str]:
    return [
        ref.origin.action.identity for ref in action.inputs if isinstance(ref.origin, ActionOutput)
    ]


class _Order:
    """Long work first, then heavy packs, so that neither is left for the end; then as files lie."""

    def __init__(self, status: BuildStatus, pending: Sequence[Action]) -> None:
        self._depth = depths(pending)
        self._rank: dict[str, int] = {}
        layouts = sorted(status.pending.values(), key=_heaviest_slot, reverse=True)
        for rank, layout in enumerate(layouts):
            for slot in layout.slots:
                self._note(slot.tensor.ref, rank)

    def _note(self, ref: TensorRef, rank: int) -> None:
        waiting = [ref]
        while waiting:
            item = waiting.pop()
            if item.identity not in self._rank:
                self._rank[item.identity] = rank
                if isinstance(item.origin, ActionOutput):
                    waiting += item.origin.action.inputs

    def __call__(self, job: Job) -> tuple[int, str, int]:
        if job.process is not None:
            # Chains side by side, or the hidden states of the first would wait for the second.
            return -1, "", self._depth[job.actions[0].identity]
        if not job.sources:
            return len(self._rank), "", 0
        first = min(job.sources, key=lambda source: (self._file(source), source.offset))
        return self._rank.get(first.identity, 0), self._file(first), first.offset

    @staticmethod
    def _file(source: SourceTensor) -> str:
        return source.file.name if source.file else ""


def _heaviest_slot(layout: PackLayout) -> int:
    return max(slot.tensor.ref.spec.nbytes for slot in layout.slots)


def _link(jobs: Sequence[Job]) -> None:
    makers = {action.identity: index for index, job in enumerate(jobs) for action in job.actions}
    for index, job in enumerate(jobs):
        wanted = {producer for action in job.actions for producer in _producers(action)}
        job.needs = {makers[name] for name in wanted if name in makers} - {index}
