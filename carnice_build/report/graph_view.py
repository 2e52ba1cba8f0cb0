"""The action graph folded until a person can read it, and that as Mermaid.

Source tensors of one kind of module are one node, and so are actions of one op with the same
parameters; shards that hold the same part of the model are one node too.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from carnice_build.architectures.base import Part, Role
from carnice_build.checkpoint.checkpoint import SourceTensor
from carnice_build.commands.plan import Plan
from carnice_build.graph import Action, ActionOutput, TensorRef
from carnice_build.planning.layout import PackLayout
from carnice_build.planning.planner import VariantPlan
from carnice_build.planning.status import BuildStatus, Status
from carnice_build.units import format_size


class Kind(StrEnum):
    """What a node stands for."""

    SOURCE = "source"
    OP = "op"
    SHARD = "shard"


class Work(StrEnum):
    """What a build still has to do for a node."""

    DONE = "cached"
    PART = "partly cached"
    TODO = "to do"


@dataclass
class Node:
    """Things of one sort, folded: `members` identifies each, `open` those with work left."""

    kind: Kind
    title: str
    column: int = 0
    size: int = 0
    members: set[str] = field(default_factory=set)
    open: set[str] = field(default_factory=set)

    @property
    def work(self) -> Work:
        """The state of the members together."""
        if not self.open:
            return Work.DONE
        return Work.TODO if self.open == self.members else Work.PART

    @property
    def label(self) -> str:
        """Number, unit and size, the second line of a node."""
        unit = {Kind.SOURCE: "tensor", Kind.OP: "action", Kind.SHARD: "shard"}[self.kind]
        count = len(self.members)
        text = f"{count:,} {unit}{'s' if count != 1 else ''}"
        if self.size:
            text += f", {format_size(self.size)}"
        if self.work is Work.PART:
            text += f", {len(self.open):,} to do"
        return text


@dataclass
class Edge:
    """Tensors that go from one node to another."""

    count: int = 0
    size: int = 0

    @property
    def label(self) -> str:
        """All bytes and the number of tensors."""
        return f"{format_size(self.size)} in {self.count:,}"


@dataclass
class FoldedGraph:
    """Nodes by name, and edges by the names of their ends, both in the order of the model."""

    nodes: dict[str, Node] = field(default_factory=dict)
    edges: dict[tuple[str, str], Edge] = field(default_factory=dict)


def fold(plan: Plan, status: BuildStatus) -> FoldedGraph:
    """The graph of all variants of `plan`, with what `status` says is left to do."""
    folder = _Folder(plan, status)
    for variant in plan.variants:
        folder.add_variant(variant)
    return folder.finish()


class _Folder:
    """Walks from each variant's tensors back to the source, once for each action."""

    def __init__(self, plan: Plan, status: BuildStatus) -> None:
        self._status = status
        self._graph = FoldedGraph()
        self._kinds = _source_kinds(plan.variants)
        self._users = _pack_users(plan.variants)
        self._visited: set[str] = set()

    def add_variant(self, variant: VariantPlan) -> None:
        """Fold the shards that no variant before it had, and what is behind them."""
        for layout in variant.packs:
            if layout.identity in self._visited:
                continue
            self._visited.add(layout.identity)
            users = self._users[layout.identity]
            shard = self._node(Kind.SHARD, f"{_content(layout)} of {', '.join(users)}")
            done = layout.identity in self._status.finished
            self._add_member(shard, layout.identity, layout.size, done)
            for slot in layout.slots:
                ref = slot.tensor.ref
                self._connect(self._origin(ref), shard, ref)

    def finish(self) -> FoldedGraph:
        """The graph, with shards in the last column."""
        last = 1 + max((node.column for node in self._graph.nodes.values()), default=0)
        for node in self._graph.nodes.values():
            if node.kind is Kind.SHARD:
                node.column = last
        return self._graph

    def _origin(self, ref: TensorRef) -> str:
        """The node that `ref` comes from, with all that is behind it."""
        if isinstance(ref.origin, ActionOutput):
            return self._action(ref.origin.action)
        return self._source(ref.origin)

    def _action(self, action: Action) -> str:
        name = self._node(Kind.OP, describe_op(action.op.name, action.params))
        if action.identity in self._visited:
            return name
        self._visited.add(action.identity)
        done = self._status.actions.get(action.identity, Status.CACHED) is Status.CACHED
        self._add_member(name, action.identity, 0, done)
        for ref in action.inputs:
            before = self._origin(ref)
            self._connect(before, name, ref)
            node = self._graph.nodes[name]
            node.column = max(node.column, self._graph.nodes[before].column + 1)
        return name

    def _source(self, tensor: SourceTensor) -> str:
        title = f"{self._kinds.get(tensor.identity, tensor.name)} {tensor.spec.dtype}"
        name = self._node(Kind.SOURCE, title)
        if tensor.identity not in self._visited:
            self._visited.add(tensor.identity)
            done = tensor.identity not in self._status.sources
            self._add_member(name, tensor.identity, tensor.spec.nbytes, done)
        return name

    def _node(self, kind: Kind, title: str) -> str:
        name = f"{kind}: {title}"
        self._graph.nodes.setdefault(name, Node(kind, title))
        return name

    def _add_member(self, name: str, identity: str, size: int, done: bool) -> None:
        node = self._graph.nodes[name]
        node.members.add(identity)
        node.size += size
        if not done:
            node.open.add(identity)

    def _connect(self, before: str, after: str, ref: TensorRef) -> None:
        edge = self._graph.edges.setdefault((before, after), Edge())
        edge.count += 1
        edge.size += ref.spec.nbytes


def _source_kinds(variants: Iterable[VariantPlan]) -> dict[str, str]:
    """The kind of module of each source tensor, by its identity."""
    kinds: dict[str, str] = {}
    for variant in variants:
        for tensor in variant.conversion.tensors:
            kind = variant.architecture.module_kind(tensor.fact.name)
            for source in _sources(tensor.ref):
                kinds.setdefault(source.identity, kind)
    return kinds


def _sources(ref: TensorRef) -> Iterator[SourceTensor]:
    if isinstance(ref.origin, ActionOutput):
        for operand in ref.origin.action.inputs:
            yield from _sources(operand)
    else:
        yield ref.origin


def _pack_users(variants: Iterable[VariantPlan]) -> dict[str, list[str]]:
    """The variants that each pack is part of."""
    users: dict[str, list[str]] = {}
    for variant in variants:
        for layout in variant.packs:
            users.setdefault(layout.identity, []).append(variant.name)
    return users


_CONTENTS = {
    Part.EMBED: "embedding",
    Part.HEAD: "head",
    Part.MTP: "MTP head",
    Part.VISION: "vision tower",
}


def _content(layout: PackLayout) -> str:
    """What a shard holds, as the layout divides models."""
    fact = layout.slots[0].tensor.fact
    if fact.part in _CONTENTS:
        return _CONTENTS[fact.part]
    return "layers" if fact.role is Role.LINEAR else "small tensors"


def describe_op(name: str, params: Mapping[str, Any]) -> str:
    """An op and its parameters as a person would say them: `mlx.quantize 4 bits g64 BF16`."""
    words = {"bits": "{} bits", "group_size": "g{}", "dtype": "{}", "add": "+ {:g}"}
    said = [text.format(params[key]) for key, text in words.items() if params.get(key) is not None]
    rest = {key: value for key, value in params.items() if key not in words}
    # The usual answer to NaN need not be read at every node.
    if rest.get("nonfinite") == "refuse":
        del rest["nonfinite"]
    said += [f"{key}={_short(value)}" for key, value in sorted(rest.items())]
    return " ".join([name, *said])


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    return text if len(text) <= 24 else f"{text[:21]}..."


COLOURS = {Work.DONE: "#d7f0d9", Work.PART: "#fdf0c4", Work.TODO: "#fbd9c5"}
"""Fill of a node by what is left to do; light, so that black text can be read on all."""

_SHAPES = {Kind.SOURCE: ("([", "])"), Kind.OP: ("[", "]"), Kind.SHARD: ("[(", ")]")}


def mermaid(graph: FoldedGraph) -> str:
    """A Mermaid flowchart of the folded graph."""
    ids = {name: f"n{index}" for index, name in enumerate(graph.nodes)}
    lines = ["flowchart LR"]
    for name, node in graph.nodes.items():
        opening, closing = _SHAPES[node.kind]
        text = f'"{_quoted(node.title)}<br/>{node.label}"'
        lines.append(f"  {ids[name]}{opening}{text}{closing}:::{node.work.name.lower()}")
    for (before, after), edge in graph.edges.items():
        lines.append(f'  {ids[before]} -- "{edge.label}" --> {ids[after]}')
    for work, colour in COLOURS.items():
        lines.append(f"  classDef {work.name.lower()} fill:{colour},stroke:#555,color:#111")
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    return text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
