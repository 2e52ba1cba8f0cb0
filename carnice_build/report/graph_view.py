"""What a person sees of an action graph: few nodes, each for many things, and their edges."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

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


COLOURS = {Work.DONE: "#d7f0d9", Work.PART: "#fdf0c4", Work.TODO: "#fbd9c5"}
"""Fill of a node by what is left to do; light, so that black text can be read on all."""


@dataclass
class Node:
    """Things of one sort, folded: `members` identifies each, `open` those with work left.

    `details` are lines for whoever wants to know what the title leaves out;
    `chain` is how many actions of the node at most follow one on the other.
    """

    kind: Kind
    title: str
    size: int = 0
    members: set[str] = field(default_factory=set)
    open: set[str] = field(default_factory=set)
    details: list[str] = field(default_factory=list)
    chain: int = 1

    @property
    def work(self) -> Work:
        """The state of the members together."""
        if not self.open:
            return Work.DONE
        return Work.TODO if self.open == self.members else Work.PART

    @property
    def label(self) -> str:
        """Number, unit and size, the last line of a node."""
        unit = {Kind.SOURCE: "tensor", Kind.OP: "action", Kind.SHARD: "shard"}[self.kind]
        count = len(self.members)
        text = f"{count:,} {unit}{'s' if count != 1 else ''}"
        if self.chain == count > 1:
            text += " in a chain"
        elif self.chain > 1:
            text += f" in chains of {self.chain:,}"
        if self.size:
            text += f", {format_size(self.size)}"
        if self.work is Work.PART:
            text += f", {len(self.open):,} to do"
        return text

    def add(self, identity: str, size: int, *, done: bool) -> None:
        """Let the node stand for one more thing."""
        self.members.add(identity)
        self.size += size
        if not done:
            self.open.add(identity)


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
    """Nodes by name, and edges by the names of their ends.

    The one kind of circle is an edge from a chain to itself.
    """

    nodes: dict[str, Node] = field(default_factory=dict)
    edges: dict[tuple[str, str], Edge] = field(default_factory=dict)

    def connect(self, before: str, after: str, size: int, count: int = 1) -> None:
        """Lead `count` more tensors, of `size` bytes each, from a node to another."""
        edge = self.edges.setdefault((before, after), Edge())
        edge.count += count
        edge.size += count * size
