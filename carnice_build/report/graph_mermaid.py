"""A folded graph as Mermaid."""

from __future__ import annotations

from carnice_build.report.graph_view import COLOURS, FoldedGraph, Kind

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
