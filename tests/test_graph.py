"""`carnice graph` folds the action graph until it can be read."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest
from conftest import REPOSITORY, Finished, Project

from carnice_build.commands.build import build_variants
from carnice_build.commands.options import Options
from carnice_build.commands.plan import report_plan
from carnice_build.report.graph_view import FoldedGraph, Kind, Work, describe_op, fold


def folded(names: list[str], options: Options) -> FoldedGraph:
    """The folded graph of these variants."""
    report = report_plan(names, options)
    return fold(report.plan, report.status)


def members(graph: FoldedGraph, kind: Kind) -> int:
    """All things that the nodes of one kind stand for."""
    return sum(len(node.members) for node in graph.nodes.values() if node.kind is kind)


def test_nothing_is_lost_in_folding(project: Project) -> None:
    """Every action, shard and source tensor of two variants is in one node, once."""
    options = project.options()
    report = report_plan(["mlx-4bit", "mlx-mixed_3_6"], options)
    plan = report.plan
    graph = fold(plan, report.status)

    assert len(plan.graph) == members(graph, Kind.OP)
    packs = {layout.identity for variant in plan.variants for layout in variant.packs}
    assert len(packs) == members(graph, Kind.SHARD)
    assert members(graph, Kind.SOURCE) == 109


@pytest.mark.parametrize("variant", ["mlx-mixed_3_6", "mlx-4bit"])
def test_the_full_size_graph_can_be_read(tmp_path: Path, variant: str) -> None:
    """Hundreds of actions at 27B become some thirty nodes, ops among them by their parameters."""
    options = Options(recipes=REPOSITORY / "recipes", profile="shapes", cache=tmp_path / "none")

    graph = folded([variant], options)

    assert members(graph, Kind.OP) > 600
    assert len(graph.nodes) <= 32
    titles = {node.title for node in graph.nodes.values() if node.kind is Kind.OP}
    assert "elementwise BF16 + 1" in titles


def test_edges_carry_what_the_nodes_hold(project: Project) -> None:
    """What leaves a source node for one op is what the node holds."""
    graph = folded(["mlx-4bit"], project.options())

    edge = graph.edges["source: mlp.up_proj BF16", "op: mlx.quantize 4 bits g64 BF16"]
    node = graph.nodes["source: mlp.up_proj BF16"]
    assert (len(node.members), node.size) == (edge.count, edge.size)


def test_colours_tell_what_is_cached(project: Project) -> None:
    """All is to do before a build, nothing after it, and a part when another variant joins."""
    options = project.options()
    assert {node.work for node in folded(["mlx-4bit"], options).nodes.values()} == {Work.TODO}
    build_variants(["mlx-mixed_3_6"], options)

    alone = folded(["mlx-mixed_3_6"], options)
    both = folded(["mlx-mixed_3_6", "mlx-6bit"], options)

    assert {node.work for node in alone.nodes.values()} == {Work.DONE}
    assert both.nodes["op: mlx.quantize 6 bits g64 BF16"].work is Work.PART
    assert both.nodes["op: mlx.quantize 3 bits g64 BF16"].work is Work.DONE


def test_mermaid_names_every_node_that_edges_use(
    project: Project, carnice: Callable[..., Finished]
) -> None:
    """The flowchart on standard output is whole: each edge joins two nodes that are there."""
    run = carnice("graph", "mlx-mixed_3_6")

    assert run.code == 0
    assert run.out.startswith("flowchart LR\n")
    nodes = set(re.findall(r"^  (n\d+)[(\[]", run.out, re.MULTILINE))
    edges = re.findall(r'^  (n\d+) -- "[^"]+" --> (n\d+)$', run.out, re.MULTILINE)
    assert nodes == {end for edge in edges for end in edge}


def test_svg_draws_every_node_inside_the_page(
    project: Project, carnice: Callable[..., Finished]
) -> None:
    """The drawing is XML, says each title, and no two nodes lie on one another."""
    run = carnice("graph", "mlx-mixed_3_6", "mlx-4bit", "--svg", project.root / "graph.svg")

    assert (run.code, run.out) == (0, "")
    page = ElementTree.parse(project.root / "graph.svg").getroot()
    width, height = float(page.attrib["width"]), float(page.attrib["height"])
    graph = folded(["mlx-mixed_3_6", "mlx-4bit"], project.options())
    texts = {item.text for item in page.iter("{http://www.w3.org/2000/svg}text")}
    assert {node.title for node in graph.nodes.values()} <= texts
    boxes = [
        tuple(float(item.attrib[key]) for key in ("x", "y", "width", "height"))
        for item in page.iter("{http://www.w3.org/2000/svg}rect")
        if "rx" in item.attrib
    ]
    assert len(graph.nodes) == len(boxes)
    for index, (x, y, w, h) in enumerate(boxes):
        assert 0 <= x <= x + w <= width
        assert 0 <= y <= y + h <= height
        for other_x, other_y, _, _ in boxes[:index]:
            assert other_x != x or abs(other_y - y) >= h


def test_parameters_are_said_shortly() -> None:
    """The usual ones in words, unusual ones by name, long ones cut."""
    params = {"bits": 3, "group_size": 64, "dtype": "BF16", "nonfinite": "zero", "note": "x" * 99}

    assert describe_op("q", params) == "q 3 bits g64 BF16 nonfinite=zero note=" + "x" * 21 + "..."
