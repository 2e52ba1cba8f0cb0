"""`carnice graph` folds the action graph until it can be read."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from conftest import REPOSITORY, Finished, Project

from carnice_build.commands.build import build_variants
from carnice_build.commands.options import Options
from carnice_build.commands.plan import plan_and_survey
from carnice_build.report.graph_fold import fold
from carnice_build.report.graph_labels import describe_op
from carnice_build.report.graph_layout import lay_out
from carnice_build.report.graph_view import FoldedGraph, Kind, Node, Work

CALIBRATED = {
    "nvfp4-text-mtp": ["calibration.forward"],
    "w4a16-awq": ["awq.smooth"],
    "int4-autoround": ["autoround.tune", "autoround.advance"],
}
"""Variants with forward passes, and the ops that take turns in the chain of layers."""


def folded(names: list[str], options: Options) -> FoldedGraph:
    """The folded graph of these variants."""
    result = plan_and_survey(names, options)
    return fold(result.plan, result.status)


def members(graph: FoldedGraph, kind: Kind) -> int:
    """All things that the nodes of one kind stand for."""
    return sum(len(node.members) for node in graph.nodes.values() if node.kind is kind)


def titled(graph: FoldedGraph, title: str) -> Node:
    """The one node of this title."""
    (node,) = (node for node in graph.nodes.values() if node.title == title)
    return node


def at_size(profile: str, cache: Path) -> Options:
    """Options for a plan of the demo, or of the shapes of 64 layers at 27B."""
    return Options(recipes=REPOSITORY / "recipes", profile=profile, cache=cache)


@pytest.fixture
def in_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    """Datasets of recipes are found from where the repository is."""
    monkeypatch.chdir(REPOSITORY)


def test_nothing_is_lost_in_folding(project: Project) -> None:
    """Every action, shard and source tensor of two variants is in one node, once."""
    options = project.options()
    result = plan_and_survey(["mlx-4bit", "mlx-mixed_3_6"], options)
    plan = result.plan
    graph = fold(plan, result.status)

    assert len(plan.graph) == members(graph, Kind.OP)
    packs = {layout.identity for variant in plan.variants for layout in variant.packs}
    assert len(packs) == members(graph, Kind.SHARD)
    assert members(graph, Kind.SOURCE) == 109


@pytest.mark.usefixtures("in_repository")
@pytest.mark.parametrize("profile", ["demo", "shapes"])
@pytest.mark.parametrize("variant", CALIBRATED)
def test_a_calibrated_variant_fits_a_screen(tmp_path: Path, variant: str, profile: str) -> None:
    """With 8 layers and with 64: few nodes, short lines, a page no wider than a screen."""
    result = plan_and_survey([variant], at_size(profile, tmp_path / "none"))
    graph = fold(result.plan, result.status)
    layout = lay_out(graph)

    assert len(result.plan.graph) == members(graph, Kind.OP)
    assert len(graph.nodes) <= 26
    assert layout.width <= 1536
    assert layout.height <= 700
    assert max(len(node.title) for node in graph.nodes.values()) <= 60
    assert max(len(line) for box in layout.boxes.values() for line in box.lines) <= 32


@pytest.mark.usefixtures("in_repository")
@pytest.mark.parametrize("profile", ["demo", "shapes"])
@pytest.mark.parametrize("variant", CALIBRATED)
def test_a_chain_of_layers_is_one_node(tmp_path: Path, variant: str, profile: str) -> None:
    """Layers of all kinds, and ops that take turns, are one node that leads to itself."""
    result = plan_and_survey([variant], at_size(profile, tmp_path / "none"))
    graph = fold(result.plan, result.status)
    ops = CALIBRATED[variant]
    chain = {action.identity for action in result.plan.graph if action.op.name in ops}
    (circle,) = (start for start, end in graph.edges if start == end)

    assert chain == graph.nodes[circle].members
    assert graph.nodes[circle].label.startswith(f"{len(chain)} actions in a chain")
    assert [circle] == [name for name, node in graph.nodes.items() if node.chain > 1]


@pytest.mark.usefixtures("in_repository")
def test_chains_side_by_side_say_how_long_each_is(tmp_path: Path) -> None:
    """Two models that are calibrated alike have their layers in one node, in two chains."""
    options = at_size("demo", tmp_path / "none")
    graph = folded(["nvfp4-text-mtp", "qwen-nvfp4-text-mtp"], options)

    assert "16 actions in chains of 8" == titled(graph, "calibration.forward bfloat16").label


@pytest.mark.usefixtures("in_repository")
def test_modules_of_a_layer_are_in_the_chain_of_layers(tmp_path: Path) -> None:
    """GPTQ's weights lie between a layer's Hessians and the pass to the next layer."""
    graph = folded(["w4a16-gptq"], at_size("demo", tmp_path / "none"))
    (chain,) = (node for node in graph.nodes.values() if node.chain > 1)

    assert chain.title.startswith("gptq.hessians bfloat16 + gptq.quantize g128 + gptq.advance")
    # 8 layers, of which the last is not advanced, with 32 linears; two passes and a linear each.
    assert "47 actions in chains of 23" == chain.label


@pytest.mark.usefixtures("in_repository")
def test_parts_of_the_samples_are_chains_side_by_side(tmp_path: Path) -> None:
    """The layers of all parts are in one node, and so is what puts together what they find."""
    options = replace(at_size("demo", tmp_path / "none"), overrides=("calibration.parts=2",))
    graph = folded(["nvfp4-text-mtp"], options)

    assert "16 actions in chains of 8" == titled(graph, "calibration.forward bfloat16").label
    assert "8 actions" == titled(graph, "calibration.combine").label


@pytest.mark.usefixtures("in_repository")
def test_what_differs_in_a_node_is_said_on_demand(tmp_path: Path) -> None:
    """The details count the tensors of each kind of module; where a layer stands is none."""
    options = at_size("shapes", tmp_path / "none")
    graph = folded(["nvfp4-text-mtp"], options)

    assert titled(graph, "calibration.forward bfloat16").details == []
    assert "16 x self_attn.q_proj BF16" in [
        line for node in graph.nodes.values() for line in node.details
    ]


@pytest.mark.usefixtures("in_repository")
def test_a_source_tensor_has_the_kind_that_it_has_in_the_model(tmp_path: Path) -> None:
    """What goes through forward passes is named by its own module, not by what is behind them."""
    options = at_size("demo", tmp_path / "none")
    graph = folded(["w4a16-awq"], options)
    details = [line for node in graph.nodes.values() for line in node.details]

    assert titled(graph, "mlp.up_proj").details == ["8 x mlp.up_proj BF16"]
    assert "8 x post_attention_layernorm BF16" in details
    assert titled(graph, "tokenizer.json, calibration.jsonl").kind is Kind.SOURCE


@pytest.mark.parametrize("variant", ["mlx-mixed_3_6", "mlx-4bit"])
def test_the_full_size_graph_can_be_read(tmp_path: Path, variant: str) -> None:
    """Hundreds of actions at 27B become a dozen nodes, ops among them by their parameters."""
    graph = folded([variant], at_size("shapes", tmp_path / "none"))

    assert members(graph, Kind.OP) > 600
    assert len(graph.nodes) <= 12
    assert titled(graph, "elementwise BF16 + 1").kind is Kind.OP


def test_edges_carry_what_the_nodes_hold(project: Project) -> None:
    """What goes into an op is what the source nodes before it hold."""
    graph = folded(["mlx-mixed_3_6"], project.options())
    name = "op: mlx.quantize 6 bits g64 BF16"
    before = [
        (graph.nodes[start], edge) for (start, end), edge in graph.edges.items() if end == name
    ]

    assert len(graph.nodes[name].members) == sum(edge.count for _, edge in before)
    for node, edge in before:
        assert (len(node.members), node.size) == (edge.count, edge.size)


def test_sources_that_go_the_same_way_are_one_node(project: Project) -> None:
    """No two nodes of sources lead to the same nodes."""
    graph = folded(["mlx-mixed_3_6", "mlx-4bit"], project.options())
    ways = [
        frozenset(end for start, end in graph.edges if start == name)
        for name, node in graph.nodes.items()
        if node.kind is Kind.SOURCE
    ]

    assert len(set(ways)) == len(ways)


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
    assert {line for box in lay_out(graph).boxes.values() for line in box.lines} <= texts
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
    """The usual ones in words; unusual ones by name where they differ, and never long ones."""
    params = {"bits": 3, "group_size": 64, "dtype": "BF16", "nonfinite": "zero", "note": "x" * 99}

    assert describe_op("q", params, frozenset()) == "q 3 bits g64 BF16"
    assert describe_op("q", params, frozenset(["nonfinite", "note"])) == (
        "q 3 bits g64 BF16 nonfinite=zero"
    )


def test_labels_say_what_differs(project: Project) -> None:
    """A parameter that all actions of an op share is not said; one that differs is."""
    project.recipe(
        "zeroed", "extends: mlx-4bit.yaml\nvariant: zeroed\nquantize: {nonfinite: zero}\n"
    )
    alone = folded(["zeroed"], project.options())
    both = folded(["zeroed", "mlx-4bit"], project.options())

    assert titled(alone, "mlx.quantize 4 bits g64 BF16")
    assert titled(both, "mlx.quantize 4 bits g64 BF16 nonfinite=zero")
    assert titled(both, "mlx.quantize 4 bits g64 BF16 nonfinite=refuse")


@pytest.mark.usefixtures("in_repository")
def test_no_edge_runs_under_a_node(tmp_path: Path) -> None:
    """An edge that passes columns has a gap of its own between the nodes of each."""
    layout = lay_out(folded(["w4a16-awq"], at_size("demo", tmp_path / "none")))
    passages = [box for route in layout.routes.values() for box in route[1:-1]]

    assert passages
    for passage in passages:
        for box in layout.boxes.values():
            apart = passage.y + passage.height <= box.y or box.y + box.height <= passage.y
            assert apart or box.column != passage.column
