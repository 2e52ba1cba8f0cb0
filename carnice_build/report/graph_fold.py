"""The action graph folded until a person can read it.

Actions of one op are one node if what they do is said in the same words, and so are all actions
that follow one on the other layer by layer: a chain, of whatever ops and parameters.
Source tensors that go to the same nodes are one node, and so are shards that hold the same part
of the model for the same variants.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from carnice_build.commands.plan import Plan
from carnice_build.formats.layout import PackLayout
from carnice_build.graph import Action, ActionOutput, TensorRef
from carnice_build.models.base import Part, Role
from carnice_build.planning.planner import VariantPlan
from carnice_build.planning.status import BuildStatus, Status
from carnice_build.report.graph_labels import (
    Telling,
    describe_actions,
    describe_op,
    differences,
    telling_parameters,
)
from carnice_build.report.graph_view import FoldedGraph, Kind, Node
from carnice_build.tensors import SourceTensor

_SUFFIXES = {
    Part.EMBED: "embedding",
    Part.HEAD: "head",
    Part.MTP: "MTP head",
    Part.TOWER: "vision tower",
}


def fold(plan: Plan, status: BuildStatus) -> FoldedGraph:
    """The graph of all variants of `plan`, with what `status` says is left to do."""
    folder = _Folder(plan, status)
    folder.add_actions()
    folder.add_shards()
    folder.add_sources()
    return folder.graph


class _Folder:
    """Puts things into nodes, those first to which edges lead from others."""

    def __init__(self, plan: Plan, status: BuildStatus) -> None:
        self.graph = FoldedGraph()
        self._variants = plan.variants
        self._status = status
        needed = {item.identity for each in plan.variants for item in each.actions.values()}
        self._actions = [action for action in plan.graph if action.identity in needed]
        self._telling = telling_parameters(self._actions)
        self._groups = _groups(self._actions, self._telling)
        self._readers: dict[str, dict[str, int]] = {}
        self._sources: dict[str, SourceTensor] = {}

    def add_actions(self) -> None:
        """Add a node for each group, and what goes from one to another."""
        members: dict[str, list[Action]] = {}
        for action in self._actions:
            members.setdefault(self._groups[action.identity], []).append(action)
        for name, actions in members.items():
            node = Node(Kind.OP, describe_actions(actions, self._telling))
            node.chain = _longest_chain(actions)
            node.details += differences(actions, self._telling)
            self.graph.nodes[name] = node
            for action in actions:
                state = self._status.actions.get(action.identity, Status.CACHED)
                node.add(action.identity, 0, done=state is Status.CACHED)
                for ref in action.inputs:
                    self._lead(ref, name)

    def add_shards(self) -> None:
        """Add the shards of all variants, each once."""
        users = _pack_users(self._variants)
        layouts = {layout.identity: layout for each in self._variants for layout in each.packs}
        for identity, layout in layouts.items():
            content = _content(layout)
            name = f"{Kind.SHARD}: {content} of {', '.join(users[identity])}"
            title = content + self._of(users[identity])
            node = self.graph.nodes.setdefault(name, Node(Kind.SHARD, title))
            node.add(identity, layout.size, done=identity in self._status.finished)
            for slot in layout.slots:
                self._lead(slot.tensor.ref, name)

    def _of(self, users: Sequence[str]) -> str:
        if len(self._variants) == 1:
            return ""
        return " of all" if len(users) == len(self._variants) else f" of {', '.join(users)}"

    def add_sources(self) -> None:
        """Add the source tensors, by where they go; nothing may be added after them."""
        kinds = _source_kinds(self._variants)
        members: dict[frozenset[str], list[SourceTensor]] = {}
        for identity, readers in self._readers.items():
            members.setdefault(frozenset(readers), []).append(self._sources[identity])
        for index, tensors in enumerate(members.values()):
            name = f"{Kind.SOURCE}: {index}"
            found = [kinds.get(tensor.identity) or self._unknown(tensor) for tensor in tensors]
            node = Node(Kind.SOURCE, _source_title(found), details=_source_details(tensors, found))
            self.graph.nodes[name] = node
            for tensor in tensors:
                done = tensor.identity not in self._status.sources
                node.add(tensor.identity, tensor.spec.nbytes, done=done)
                for reader, count in self._readers[tensor.identity].items():
                    self.graph.connect(name, reader, tensor.spec.nbytes, count)

    def _unknown(self, tensor: SourceTensor) -> tuple[str, Part | None]:
        """A tensor that no view has: another tool's code, say, or a dataset."""
        return self._variants[0].architecture.module_kind(tensor.name.rpartition("/")[2]), None

    def _lead(self, ref: TensorRef, reader: str) -> None:
        origin = ref.origin
        if isinstance(origin, ActionOutput):
            self.graph.connect(self._groups[origin.action.identity], reader, ref.spec.nbytes)
        else:
            self._sources[origin.identity] = origin
            readers = self._readers.setdefault(origin.identity, {})
            readers[reader] = readers.get(reader, 0) + 1


def _groups(actions: Sequence[Action], telling: Telling) -> dict[str, str]:
    """The name of the node of each action, by its identity."""
    import networkx

    chained = {
        action.op.name
        for action in actions
        for before in _before(action)
        if before.op.name == action.op.name
    }
    names = {
        action.identity: action.op.name
        if action.op.name in chained
        else describe_op(action.op.name, action.params, telling[action.op.name])
        for action in actions
    }
    # Where ops take turns, layer by layer, they go in a circle once they are folded.
    circles = networkx.DiGraph(
        (names[before.identity], names[action.identity])
        for action in actions
        for before in _before(action)
    )
    joined = {
        name: " + ".join(sorted(circle))
        for circle in networkx.strongly_connected_components(circles)
        for name in circle
    }
    return {identity: f"{Kind.OP}: {joined.get(name, name)}" for identity, name in names.items()}


def _before(action: Action) -> Iterator[Action]:
    for ref in action.inputs:
        if isinstance(ref.origin, ActionOutput):
            yield ref.origin.action


def _longest_chain(actions: Sequence[Action]) -> int:
    """How many of `actions`, which are in topological order, follow one on the other at most."""
    depths: dict[str, int] = {}
    for action in actions:
        behind = (depths.get(before.identity, 0) for before in _before(action))
        depths[action.identity] = 1 + max(behind, default=0)
    return max(depths.values())


def _source_kinds(variants: Iterable[VariantPlan]) -> dict[str, tuple[str, Part | None]]:
    """The kind of module and the part of the model of each tensor of a view, by its identity."""
    kinds: dict[str, tuple[str, Part | None]] = {}
    for variant in variants:
        for name, ref in variant.view.items():
            fact = variant.architecture.tensors[name]
            kinds.setdefault(ref.identity, (variant.architecture.module_kind(name), fact.part))
    return kinds


def _source_title(found: Sequence[tuple[str, Part | None]]) -> str:
    kinds = list(dict.fromkeys(kind for kind, _ in found))
    if len(kinds) <= 2:
        return ", ".join(kinds)
    (part, *others) = {part for _, part in found}
    if not others and part in _SUFFIXES:
        return _SUFFIXES[part]
    return f"{kinds[0]} and {len(kinds) - 1} more kinds"


def _source_details(
    tensors: Sequence[SourceTensor], found: Sequence[tuple[str, Part | None]]
) -> list[str]:
    counts: dict[str, int] = {}
    for tensor, (kind, _) in zip(tensors, found, strict=True):
        sort = f"{kind} {tensor.spec.dtype}"
        counts[sort] = counts.get(sort, 0) + 1
    return [f"{count:,} x {sort}" for sort, count in counts.items()]


def _pack_users(variants: Iterable[VariantPlan]) -> Mapping[str, Sequence[str]]:
    """The variants that each pack is part of."""
    users: dict[str, list[str]] = {}
    for variant in variants:
        for layout in variant.packs:
            users.setdefault(layout.identity, []).append(variant.name)
    return users


def _content(layout: PackLayout) -> str:
    """What a shard holds, as the layout divides models."""
    fact = layout.slots[0].tensor.fact
    if fact.part in _SUFFIXES:
        return _SUFFIXES[fact.part]
    return "layers" if fact.role is Role.LINEAR else "small tensors"
