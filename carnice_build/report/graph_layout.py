"""Where the nodes of a folded graph are drawn, and which way its edges go.

Nodes stand in columns: shards in the last one, all others just before what reads them first.
An edge that passes columns has a gap of its own in each, so that it runs under no node.
Nodes and gaps are moved towards what they are joined to, back and forth, until few edges cross.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from carnice_build.report.graph_view import FoldedGraph, Node

LINE = 14
"""Height of a line of text."""

LETTER = 6.7
"""Width of a letter at 11 pixels, on average, in the widest of the fonts."""

PADDING = 8
COLUMN_GAP = 84
_GAP = 16
_PASSAGE = 6
_LONGEST_LINE = 20
_SWEEPS = 8


@dataclass
class Box:
    """What takes room in a column: a node, or the gap (without `lines`) for an edge that passes."""

    column: int
    lines: Sequence[str] = ()
    x: float = 0.0
    y: float = 0.0
    width: float = 0.0
    before: list[Box] = field(default_factory=list)
    after: list[Box] = field(default_factory=list)

    @property
    def height(self) -> float:
        """From top to bottom."""
        return LINE * len(self.lines) + PADDING if self.lines else _PASSAGE

    @property
    def middle(self) -> float:
        """Half way down."""
        return self.y + self.height / 2

    @property
    def right(self) -> float:
        """The right edge."""
        return self.x + self.width


@dataclass(frozen=True)
class Layout:
    """Boxes of nodes by name; for each edge the boxes it runs through, from end to end."""

    boxes: dict[str, Box]
    routes: dict[tuple[str, str], list[Box]]
    width: float
    height: float


def lay_out(graph: FoldedGraph) -> Layout:
    """Places with the upper left corner at 0, 0."""
    columns = _columns(graph)
    boxes = {name: Box(columns[name], _lines(node)) for name, node in graph.nodes.items()}
    routes = {
        (start, end): _route(boxes[start], boxes[end]) for start, end in graph.edges if start != end
    }
    everything = {id(box): box for route in routes.values() for box in route}
    everything |= {id(box): box for box in boxes.values()}
    table: dict[int, list[Box]] = {}
    for box in everything.values():
        table.setdefault(box.column, []).append(box)
    ordered = [table[column] for column in sorted(table)]
    width = _set_widths(ordered)
    height = max((_stacked(column) for column in ordered), default=0.0)
    for sweep in range(_SWEEPS):
        backwards = sweep % 2 == 1
        for column in reversed(ordered) if backwards else ordered:
            _settle(column, height, backwards=backwards)
    return Layout(boxes, routes, width, height)


def _columns(graph: FoldedGraph) -> dict[str, int]:
    """The column of each node, from 0."""
    import networkx

    network = networkx.DiGraph(edge for edge in graph.edges if edge[0] != edge[1])
    before_last: dict[str, int] = {}
    for name in networkx.topological_sort(network.reverse(copy=False)):
        ahead = (before_last[after] for after in network.successors(name))
        before_last[name] = 1 + max(ahead, default=-1)
    last = max(before_last.values(), default=0)
    return {name: last - before_last.get(name, 0) for name in graph.nodes}


def _lines(node: Node) -> list[str]:
    title = textwrap.wrap(node.title, _LONGEST_LINE, break_long_words=False, break_on_hyphens=False)
    return [*title, node.label]


def _route(start: Box, end: Box) -> list[Box]:
    """The way from a node to one in a later column, joined up."""
    passages = (Box(column) for column in range(start.column + 1, end.column))
    route = [start, *passages, end]
    for before, after in pairwise(route):
        before.after.append(after)
        after.before.append(before)
    return route


def _set_widths(columns: Iterable[Sequence[Box]]) -> float:
    """Give boxes of a column their place from left to right; returns the width of all columns."""
    x = right = 0.0
    for column in columns:
        letters = max((len(line) for box in column for line in box.lines), default=0)
        width = LETTER * letters + 2 * PADDING
        for box in column:
            box.x, box.width = x, width
        right = x + width
        x = right + COLUMN_GAP
    return right


def _stacked(column: Sequence[Box]) -> float:
    """Put boxes one below the other; returns the height of them all."""
    y = 0.0
    for box in column:
        box.y = y
        y += box.height + _GAP
    return y - _GAP


def _settle(column: list[Box], height: float, *, backwards: bool) -> None:
    """Move each box towards what it is joined to on one side, none over another."""
    wanted = {id(box): _mean(box.after if backwards else box.before, box) for box in column}
    column.sort(key=lambda box: wanted[id(box)])
    lowest = 0.0
    for box, below in zip(column, _room_below(column), strict=True):
        box.y = max(lowest, min(wanted[id(box)] - box.height / 2, height - below))
        lowest = box.y + box.height + _GAP


def _mean(others: Sequence[Box], box: Box) -> float:
    return sum(other.middle for other in others) / len(others) if others else box.middle


def _room_below(column: Sequence[Box]) -> Iterator[float]:
    """The height that each box and those below it need."""
    needed = sum(box.height + _GAP for box in column) - _GAP
    for box in column:
        yield needed
        needed -= box.height + _GAP
