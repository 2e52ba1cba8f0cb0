"""A folded graph as SVG: nodes in columns from source to shards, edges as curves.

Nodes keep the order of the model in the first column; in the others each stands at the mean
height of what goes into it, so that few edges cross.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from typing import Literal

from carnice_build.report.graph_view import COLOURS, FoldedGraph, Kind, Node, Work

_LINE = 15
_NODE_HEIGHT = 2 * _LINE + 12
_GAP = 14
_STUB = 84
"""Straight ends of an edge, long enough for its label."""

_COLUMN_GAP = 2 * _STUB + 130
_MARGIN = 24
_TITLE = 40
_LETTER = 7.0
"""Width of a letter at 12 pixels, on average; names are set in a font close to that."""

_STYLE = (
    "text{font-family:'DejaVu Sans',Helvetica,Arial,sans-serif;font-size:12px;fill:#111}"
    ".small{font-size:11px;fill:#333}"
    ".edge{font-size:10px;fill:#333}"
    "path{fill:none;stroke:#8a8f98;stroke-opacity:.75}"
    "rect{stroke:#555}"
)


@dataclass(frozen=True)
class _Box:
    """Where a node is drawn."""

    x: float
    y: float
    width: float

    @property
    def middle(self) -> float:
        return self.y + _NODE_HEIGHT / 2

    @property
    def right(self) -> float:
        return self.x + self.width


def svg(graph: FoldedGraph, title: str) -> str:
    """The whole drawing as one SVG document."""
    boxes = _place(graph)
    width = max((box.right for box in boxes.values()), default=0) + _MARGIN
    height = max((box.y + _NODE_HEIGHT for box in boxes.values()), default=0) + _MARGIN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" '
        f'width="{width:.0f}" height="{height:.0f}">',
        f"<style>{_STYLE}</style>",
        '<rect width="100%" height="100%" fill="#fff" style="stroke:none"/>',
        f'<text x="{_MARGIN}" y="{_MARGIN}" font-weight="bold">{escape(title)}</text>',
        *_legend(_MARGIN + _text_width(title) + 30),
        *_edges(graph, boxes),
        *(part for name, node in graph.nodes.items() for part in _node(node, boxes[name])),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _text_width(text: str) -> float:
    return _LETTER * len(text) + 20


def _place(graph: FoldedGraph) -> dict[str, _Box]:
    columns: dict[int, list[str]] = {}
    for name, node in graph.nodes.items():
        columns.setdefault(node.column, []).append(name)
    tallest = max((len(names) for names in columns.values()), default=0)
    height = tallest * (_NODE_HEIGHT + _GAP) - _GAP
    boxes: dict[str, _Box] = {}
    x = float(_MARGIN)
    for column in sorted(columns):
        names = columns[column]
        width = max(
            _text_width(text)
            for name in names
            for text in (graph.nodes[name].title, graph.nodes[name].label)
        )
        for name, y in _heights(graph, names, boxes, height).items():
            boxes[name] = _Box(x, _TITLE + y, width)
        x += width + _COLUMN_GAP
    return boxes


def _heights(
    graph: FoldedGraph, names: list[str], placed: dict[str, _Box], height: float
) -> dict[str, float]:
    """The top of each node of a column: near what goes into it, none over another."""
    step = _NODE_HEIGHT + _GAP
    wanted = {name: _mean_height(graph, name, placed) for name in names}
    if any(value is None for value in wanted.values()):
        return {name: index * step for index, name in enumerate(names)}
    ordered = sorted(names, key=lambda name: wanted[name] or 0.0)
    tops: dict[str, float] = {}
    lowest = 0.0
    for index, name in enumerate(ordered):
        # Leaves room below for the nodes that are still to come.
        room = height - (len(ordered) - index) * step + _GAP
        top = max(lowest, min((wanted[name] or 0.0) - _TITLE - _NODE_HEIGHT / 2, room))
        tops[name] = top
        lowest = top + step
    return tops


def _mean_height(graph: FoldedGraph, name: str, placed: dict[str, _Box]) -> float | None:
    """The mean height of the nodes before it, each by the bytes that come from it."""
    before = [
        (placed[start].middle, edge.size)
        for (start, end), edge in graph.edges.items()
        if end == name and start in placed
    ]
    weight = sum(size for _, size in before)
    return sum(middle * size for middle, size in before) / weight if weight else None


def _edges(graph: FoldedGraph, boxes: dict[str, _Box]) -> Iterator[str]:
    """All curves first, then all labels, so that no curve crosses out a label."""
    largest = max((edge.size for edge in graph.edges.values()), default=1)
    leaving = _ports(graph, boxes, 0)
    arriving = _ports(graph, boxes, 1)
    labels: list[str] = []
    for (start, end), edge in graph.edges.items():
        x0, y0 = boxes[start].right, leaving[start][end]
        x1, y1 = boxes[end].x, arriving[end][start]
        bend = (x1 - x0 - 2 * _STUB) / 2
        width = 1 + 4 * (edge.size / largest) ** 0.5
        yield (
            f'<path d="M{x0:.0f},{y0:.1f} h{_STUB} C{x0 + _STUB + bend:.0f},{y0:.1f} '
            f'{x1 - _STUB - bend:.0f},{y1:.1f} {x1 - _STUB:.0f},{y1:.1f} h{_STUB}" '
            f'stroke-width="{width:.1f}"/>'
        )
        # At the end with fewer edges, labels have more room.
        at_start = len(leaving[start]) <= len(arriving[end])
        x, y = (x0, y0) if at_start else (x1 - _STUB, y1)
        labels.append(
            f'<text class="edge" x="{x + 4:.0f}" y="{y - width / 2 - 2:.1f}">'
            f"{escape(edge.label)}</text>"
        )
    yield from labels


def _ports(
    graph: FoldedGraph, boxes: dict[str, _Box], side: Literal[0, 1]
) -> dict[str, dict[str, float]]:
    """For each node, the height at which its edge to each other node leaves or arrives.

    `side` is 0 for the starts of edges, 1 for their ends.
    """
    others: dict[str, list[str]] = {}
    for edge in graph.edges:
        others.setdefault(edge[side], []).append(edge[1 - side])
    ports: dict[str, dict[str, float]] = {}
    for name, ends in others.items():
        ends.sort(key=lambda end: boxes[end].y)
        step = min(_LINE, (_NODE_HEIGHT - 6) / len(ends))
        top = boxes[name].middle - step * (len(ends) - 1) / 2
        ports[name] = {end: top + index * step for index, end in enumerate(ends)}
    return ports


_CORNERS = {Kind.SOURCE: 14, Kind.OP: 3, Kind.SHARD: 0}


def _node(node: Node, box: _Box) -> Iterator[str]:
    yield (
        f'<rect x="{box.x:.0f}" y="{box.y:.0f}" width="{box.width:.0f}" height="{_NODE_HEIGHT}" '
        f'rx="{_CORNERS[node.kind]}" fill="{COLOURS[node.work]}"/>'
    )
    yield f'<text x="{box.x + 10:.0f}" y="{box.y + 18:.0f}">{escape(node.title)}</text>'
    yield (
        f'<text class="small" x="{box.x + 10:.0f}" y="{box.y + 18 + _LINE:.0f}">'
        f"{escape(node.label)}</text>"
    )


def _legend(x: float) -> Iterator[str]:
    for work in Work:
        yield (
            f'<rect x="{x:.0f}" y="{_MARGIN - 11}" width="14" height="14" fill="{COLOURS[work]}"/>'
        )
        yield f'<text class="small" x="{x + 20:.0f}" y="{_MARGIN}">{work}</text>'
        x += _text_width(work) + 20
