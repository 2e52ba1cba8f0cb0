"""A folded graph as SVG: nodes in columns from source to shards, edges as curves."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from itertools import pairwise
from typing import Literal

from carnice_build.report.graph_layout import (
    COLUMN_GAP,
    LETTER,
    LINE,
    PADDING,
    Box,
    Layout,
    lay_out,
)
from carnice_build.report.graph_view import COLOURS, FoldedGraph, Kind, Node, Work
from carnice_build.units import format_size

_MARGIN = 20
_TITLE = 50
_LEGEND_STEP = 110
_THICKEST = 4

_STYLE = (
    "text{font-family:'DejaVu Sans',Helvetica,Arial,sans-serif;font-size:11px;fill:#111}"
    ".small{font-size:10px;fill:#333}"
    ".edge{font-size:9px;fill:#333}"
    "path{fill:none;stroke:#8a8f98;stroke-opacity:.75}"
    "rect{stroke:#555}"
)


def svg(graph: FoldedGraph, title: str) -> str:
    """The whole drawing as one SVG document."""
    layout = lay_out(graph)
    legend = _MARGIN + LETTER * len(title) + 30
    width = _MARGIN + max(layout.width, legend + _LEGEND_STEP * len(Work)) + _MARGIN
    height = _TITLE + layout.height + _MARGIN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" '
        f'width="{width:.0f}" height="{height:.0f}">',
        f"<style>{_STYLE}</style>",
        '<rect width="100%" height="100%" fill="#fff" style="stroke:none"/>',
        f'<text x="{_MARGIN}" y="{_MARGIN}" font-weight="bold">{escape(title)}</text>',
        *_legend(legend),
        f'<g transform="translate({_MARGIN} {_TITLE})">',
        *_edges(graph, layout),
        *(part for name, node in graph.nodes.items() for part in _node(node, layout.boxes[name])),
        "</g></svg>",
    ]
    return "\n".join(parts) + "\n"


def _edges(graph: FoldedGraph, layout: Layout) -> Iterator[str]:
    """All curves first, then all labels, so that no curve crosses out a label."""
    # A chain passes on more than it takes and gives; that shall not make all else thin.
    sizes = [edge.size for (start, end), edge in graph.edges.items() if start != end]
    largest = max(sizes, default=1)
    leaving = _ports(layout, 0)
    arriving = _ports(layout, 1)
    labels: list[str] = []
    for (start, end), edge in graph.edges.items():
        tip = f"<title>{escape(edge.label)}</title>"
        if start == end:
            yield f'<path d="{_loop(layout.boxes[start])}">{tip}</path>'
            continue
        thickness = 1 + (_THICKEST - 1) * (edge.size / largest) ** 0.5
        route = layout.routes[start, end]
        y0, y1 = leaving[start][end], arriving[end][start]
        yield f'<path d="{_curve(route, y0, y1)}" stroke-width="{thickness:.1f}">{tip}</path>'
        # At the end with fewer edges, labels have more room.
        at_start = len(leaving[start]) <= len(arriving[end])
        x, y, anchor = (
            (route[0].right + 4, y0, "start") if at_start else (route[-1].x - 4, y1, "end")
        )
        labels.append(
            f'<text class="edge" x="{x:.0f}" y="{y - thickness / 2 - 2:.1f}" '
            f'text-anchor="{anchor}">{format_size(edge.size)}</text>'
        )
    yield from labels


def _curve(route: list[Box], y0: float, y1: float) -> str:
    """A path from the first box to the last, straight through the gaps between them."""
    path = f"M{route[0].right:.0f},{y0:.1f}"
    y = y0
    for before, after in pairwise(route):
        below = y1 if after is route[-1] else after.middle
        bend = COLUMN_GAP / 2
        path += (
            f" C{before.right + bend:.0f},{y:.1f} {after.x - bend:.0f},{below:.1f} "
            f"{after.x:.0f},{below:.1f}"
        )
        y = below
        if after is not route[-1]:
            path += f" h{after.width:.0f}"
    return path


def _loop(box: Box) -> str:
    """A small arc over the upper right corner: the node follows on itself."""
    x = box.right
    return f"M{x - 18:.0f},{box.y:.1f} c0,-14 26,-14 26,0 s-8,12 -8,12"


def _ports(layout: Layout, side: Literal[0, 1]) -> dict[str, dict[str, float]]:
    """For each node, the height at which its edge to each other node leaves or arrives.

    `side` is 0 for the starts of edges, 1 for their ends.
    """
    others: dict[str, dict[str, float]] = {}
    for edge, route in layout.routes.items():
        next_to = route[1] if side == 0 else route[-2]
        others.setdefault(edge[side], {})[edge[1 - side]] = next_to.middle
    ports: dict[str, dict[str, float]] = {}
    for name, heights in others.items():
        box = layout.boxes[name]
        ends = sorted(heights, key=heights.__getitem__)
        step = min(LINE, (box.height - 8) / len(ends))
        top = box.middle - step * (len(ends) - 1) / 2
        ports[name] = {end: top + index * step for index, end in enumerate(ends)}
    return ports


_CORNERS = {Kind.SOURCE: 14, Kind.OP: 3, Kind.SHARD: 0}


def _node(node: Node, box: Box) -> Iterator[str]:
    yield (
        f'<rect x="{box.x:.0f}" y="{box.y:.0f}" width="{box.width:.0f}" height="{box.height:.0f}" '
        f'rx="{_CORNERS[node.kind]}" fill="{COLOURS[node.work]}">'
        f"<title>{escape(chr(10).join([node.title, *node.details]))}</title></rect>"
    )
    *titles, label = box.lines
    for index, (style, line) in enumerate([*(("", line) for line in titles), ("small", label)]):
        y = box.y + PADDING / 2 + LINE * (index + 1) - 3
        yield f'<text class="{style}" x="{box.x + PADDING:.0f}" y="{y:.0f}">{escape(line)}</text>'


def _legend(x: float) -> Iterator[str]:
    for index, work in enumerate(Work):
        left = x + index * _LEGEND_STEP
        yield (
            f'<rect x="{left:.0f}" y="{_MARGIN - 11}" width="14" height="14" '
            f'fill="{COLOURS[work]}"/>'
        )
        yield f'<text class="small" x="{left + 20:.0f}" y="{_MARGIN}">{work}</text>'
