"""Estimates: what a plan takes on machines that are not here."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from conftest import REPOSITORY, Finished, Project

from carnice_build.calibration.work import (
    compensation_work,
    hessian_work,
    pass_work,
    search_work,
    tuning_work,
)
from carnice_build.commands.plan import plan_variants
from carnice_build.dtypes import TensorSpec
from carnice_build.planning.estimate import Load, Resource
from carnice_build.rates import Kind, Rates, Work
from carnice_build.units import parse_bandwidth

Carnice = Callable[..., Finished]

ONE = ("--nodes", 1, "--bandwidth", "10Gbit/s")
GPU = ("--set", "calibration.device=cuda")


@pytest.fixture
def estimated(carnice: Carnice) -> Callable[..., dict[str, Any]]:
    """The estimate for some variants, as `--json` has it."""

    def call(*arguments: object) -> dict[str, Any]:
        finished = carnice("plan", *arguments, "--json")
        assert finished.code == 0, finished.err
        found: dict[str, Any] = json.loads(finished.out)["estimate"]
        return found

    return call


Estimated = Callable[..., dict[str, Any]]


@pytest.fixture
def full_size(project: Project) -> Project:
    """A project whose profile `shapes` is that of the repository."""
    profiles = (REPOSITORY / "recipes" / "_profiles.yaml").read_text(encoding="utf-8")
    (project.recipes / "_profiles.yaml").write_text(profiles, encoding="utf-8")
    (project.root / "benchmarks").symlink_to(REPOSITORY / "benchmarks")
    (project.root / "demo" / "calibration.jsonl").symlink_to(
        REPOSITORY / "demo" / "calibration.jsonl"
    )
    return project


# --- bytes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("variants", [["mlx-4bit"], ["mlx-6bit", "mlx-mixed_3_6"]])
def test_bytes_are_those_of_a_build(
    project: Project, carnice: Carnice, estimated: Estimated, variants: list[str]
) -> None:
    """Read and written, to the byte; nothing is sent where the source is a folder."""
    del project
    found = estimated(*variants, *ONE)["bytes"]
    built = json.loads(carnice("build", *variants, "--json").out)

    assert built["read_bytes"] == found["read"]
    assert built["written_bytes"] == found["packs"]
    assert [0, 0, 0, 0] == [found[name] for name in ("from_hub", "fetched", "pushed", "transient")]


def test_what_is_built_costs_nothing(
    project: Project, carnice: Carnice, estimated: Estimated
) -> None:
    """On one machine and on several; what another variant shares is not read again."""
    del project
    price = ("--price", 2)
    before = estimated("mlx-mixed_3_6", *ONE, *price)
    carnice("build", "mlx-4bit", "mlx-6bit")
    alone = estimated("mlx-4bit", *ONE, *price)
    several = estimated("mlx-4bit", "--nodes", 3, "--bandwidth", "1GB/s", *price)
    shared = estimated("mlx-mixed_3_6", *ONE, *price)

    shown = carnice("plan", "mlx-4bit", *ONE).out

    assert shown.endswith("none: nothing is to do\n")
    assert "all nodes" not in shown and "the node" not in shown
    for finished in (alone, several):
        assert {0} == set(finished["bytes"].values())
        assert (0, None, 0) == (finished["seconds"], finished["bottleneck"], finished["cost"])
    assert 0 < shared["bytes"]["read"] < before["bytes"]["read"]
    # Of its shards only those that equal one of another variant are there.
    assert 0 < shared["bytes"]["packs"] <= before["bytes"]["packs"]


def test_hidden_states_and_layers_of_a_calibration(
    full_size: Project, carnice: Carnice, estimated: Estimated
) -> None:
    """All that goes from layer to layer is written, and layers, which come once more for that.

    20 samples of 8192 tokens of 5120 numbers, before the first layer and behind each of 64.
    """
    del full_size
    found = estimated("nvfp4-text-mtp", "--profile", "shapes", *ONE)["bytes"]
    finished = json.loads(carnice("plan", "nvfp4-text-mtp", "--profile", "shapes", "--json").out)
    hidden = 65 * 20 * 8192 * 5120 * 2
    once = finished["bytes_to_read"]
    files = found["read"] - found["from_hub"]

    # Passes are given the embedding and the layers, which the head is not among.
    assert found["transient"] - hidden == found["read"] - once
    assert 0.9 * once < found["transient"] - hidden < once
    # Rows of the dataset, and no tokenizer, for a shape file has none.
    assert files == (REPOSITORY / "demo" / "calibration.jsonl").stat().st_size


def test_a_decoded_layer_is_written_for_a_pass(full_size: Project, estimated: Estimated) -> None:
    """In BF16, twice as much as comes over the wire in FP8, which comes twice, too."""
    full_size.recipe("deepseek", DEEPSEEK)
    found = estimated("deepseek", "--profile", "shapes", *ONE)["bytes"]
    hidden = 62 * 20 * 8192 * 7168 * 2

    assert found["from_hub"] == pytest.approx(found["transient"] - hidden, rel=0.02)


DEEPSEEK = """\
extends: preset:nvfp4
variant: deepseek
sources: {body: {model: deepseek-ai/DeepSeek-V3}}
steps:
  - {drop: {match: model.layers.61.*}}
  - {decode: {}}
"""


# --- machines ------------------------------------------------------------------------------------


def test_nodes_divide_what_needs_no_data(full_size: Project, estimated: Estimated) -> None:
    """The wire is there for a fourth as long, and at the end all goes over it once more."""
    del full_size
    one = estimated("mlx-4bit", "--profile", "shapes", *ONE)
    four = estimated("mlx-4bit", "--profile", "shapes", "--nodes", 4, "--bandwidth", "10Gbit/s")
    wires = [node["seconds"]["wire"] for node in four["of_nodes"]]

    assert one["of_nodes"][0]["seconds"]["wire"] / 4 == pytest.approx(max(wires), rel=0.1)
    assert sum(wires) == pytest.approx(one["of_nodes"][0]["seconds"]["wire"])
    assert one["bytes"]["read"] == four["bytes"]["read"]
    assert four["bytes"]["pushed"] == four["together"]["fetched"] == one["bytes"]["packs"]
    assert 0 == four["together"]["read"]


def test_bandwidth_shortens_the_wire(full_size: Project, estimated: Estimated) -> None:
    """Ten times the rate, a tenth of the time, until something else is slower."""
    del full_size
    slow, fast = (
        estimated("mlx-4bit", "--profile", "shapes", "--jobs", 4, "--bandwidth", rate)
        for rate in ("1Gbit/s", "10Gbit/s")
    )
    seconds = [found["of_nodes"][0]["seconds"]["wire"] for found in (slow, fast)]

    assert seconds[0] == pytest.approx(10 * seconds[1])
    assert "wire" == slow["bottleneck"]
    assert slow["seconds"] == seconds[0] == slow["bytes"]["from_hub"] / 125e6


def test_a_chain_stays_on_one_node(full_size: Project, estimated: Estimated) -> None:
    """Without parts one node does all passes; with them each does its own, and reads all layers."""
    del full_size
    several = ("--profile", "shapes", *GPU, "--nodes", 4, "--bandwidth", "10Gbit/s")
    whole = estimated("nvfp4-text-mtp", *several)
    parts = estimated("nvfp4-text-mtp", *several, "--set", "calibration.parts=4")
    operations = [[node["operations"] for node in found["of_nodes"]] for found in (whole, parts)]

    assert [0, 0, 0] == sorted(operations[0])[:3]
    assert operations[1] == pytest.approx([sum(operations[0]) / 4] * 4)
    assert parts["bytes"]["from_hub"] > 2 * whole["bytes"]["from_hub"]
    busy = [max(node["seconds"]["passes"] for node in f["of_nodes"]) for f in (whole, parts)]
    assert busy[1] < busy[0] / 3


def test_chains_side_by_side_on_cores(full_size: Project, estimated: Estimated) -> None:
    """As many as there are cores for; a GPU has them one after another."""
    del full_size
    found = {}
    for cores in (1, 4):
        for device in ("cpu", "cuda"):
            settings = (
                "calibration.parts=4",
                "calibration.threads=1",
                f"calibration.device={device}",
            )
            arguments = [item for setting in settings for item in ("--set", setting)]
            (node,) = estimated(
                "nvfp4-text-mtp", "--profile", "shapes", *ONE, "--jobs", cores, *arguments
            )["of_nodes"]
            found[device, cores] = node["seconds"]["passes"]

    assert found["cpu", 1] == pytest.approx(4 * found["cpu", 4])
    assert found["cuda", 1] == found["cuda", 4] < found["cpu", 4]


def test_cost_is_that_of_all_until_the_last_is_done(
    full_size: Project, estimated: Estimated
) -> None:
    """And then of one, which puts the parts together."""
    del full_size
    found = estimated(
        "mlx-4bit", "--profile", "shapes", "--nodes", 4, "--bandwidth", "1GB/s", "--price", 2.5
    )
    slowest = max(node["seconds"]["all"] for node in found["of_nodes"])
    hours = (4 * slowest + found["together"]["seconds"]["all"]) / 3600

    assert hours == pytest.approx(found["node_hours"])
    assert 2.5 * hours == pytest.approx(found["cost"])
    assert slowest + found["together"]["seconds"]["all"] == pytest.approx(found["seconds"])


# --- rates ---------------------------------------------------------------------------------------


def layer(kind: str) -> tuple[dict[str, Any], list[TensorSpec]]:
    """A layer of Qwen3.6-27B over 8 samples of 2048 tokens, as docs/benchmarks.md measures it."""
    full = kind == "full"
    widths = {
        "mlp.gate_proj": (17408, 5120),
        "mlp.up_proj": (17408, 5120),
        "mlp.down_proj": (5120, 17408),
        **(
            {
                "self_attn.q_proj": (12288, 5120),
                "self_attn.k_proj": (1024, 5120),
                "self_attn.v_proj": (1024, 5120),
                "self_attn.o_proj": (5120, 6144),
            }
            if full
            else {
                "linear_attn.in_proj_qkv": (10240, 5120),
                "linear_attn.in_proj_z": (6144, 5120),
                "linear_attn.out_proj": (5120, 6144),
            }
        ),
    }
    config = {"layer_types": [f"{kind}_attention"], "num_attention_heads": 24, "head_dim": 256}
    mappings = [
        ["post_attention_layernorm", ["mlp.gate_proj", "mlp.up_proj"]],
        ["mlp.up_proj", ["mlp.down_proj"]],
    ]
    if full:
        qkv = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
        mappings.append(["input_layernorm", qkv])
    params = {
        "names": [f"{name}.weight" for name in widths],
        "layer": 0,
        "config": config,
        "mappings": mappings,
        "n_grid": 20,
        "settings": {"iters": 20, "batch_size": 8, "gradient_accumulate_steps": 1},
    }
    weights = [TensorSpec("BF16", shape) for shape in widths.values()]
    return params, [TensorSpec("I32", (8, 2048)), TensorSpec("BF16", (8, 2048, 5120)), *weights]


MEASURED: Mapping[str, tuple[Callable[..., Work], float, float]] = {
    "a pass": (pass_work, 8 * 0.031, 8 * 0.014),
    "AWQ's search": (search_work, 1.4, 1.5),
    "AutoRound": (lambda p, i: tuning_work(p, [i[0], *i[1:2] * 2, *i[2:]]), 7.3, 5.3),
}


@pytest.mark.parametrize("what", MEASURED)
def test_rates_give_what_was_measured(what: str) -> None:
    """Seconds of docs/benchmarks.md, of four layers, three of which have linear attention."""
    work, linear, full = MEASURED[what]
    found = []
    for kind in ("linear", "full"):
        done = work(*layer(kind))
        found.append(done.amount / Rates().gpu(done.kind))

    assert 3 * found[0] + found[1] == pytest.approx(3 * linear + full, rel=0.05)


def test_an_expert_works_for_the_tokens_that_it_is_sent() -> None:
    """Of 8 experts 2 a token; in AWQ's search all, for it sends every token to each of them."""
    shape = (8, 64, 128)
    config = {"num_experts_per_tok": 2}
    params = {"names": ["mlp.experts.*.up_proj.weight"], "layer": 0, "config": config}
    inputs = [TensorSpec("I32", (3, 10)), TensorSpec("BF16", (3, 10, 128))]
    inputs.append(TensorSpec("BF16", shape))
    once = 2 * 30 * 64 * 128

    assert Work(Kind.FORWARD, 2 * once) == pass_work(params, inputs)
    search = search_work({**params, "mappings": [], "n_grid": 20}, inputs)
    assert Work(Kind.AWQ, 2 * 8 * once) == search


def test_gptq_works_on_hessians_and_columns() -> None:
    """All experts work for all tokens; what is in float32 counts 3.5 times."""
    params = {"names": ["mlp.up_proj.weight"], "layer": 0, "config": {}}
    weight = TensorSpec("BF16", (64, 128))
    inputs = [TensorSpec("I32", (3, 10)), TensorSpec("BF16", (3, 10, 128)), weight]
    found = hessian_work(params, inputs, [TensorSpec("F32", (128, 128))])
    experts = TensorSpec("BF16", (8, 64, 128))

    assert Work(Kind.FORWARD, 2 * 30 * (64 * 128 + 3.5 * 128 * 128)) == found
    assert 8 * compensation_work(weight, 128).amount == compensation_work(experts, 128).amount


def test_kernels_of_stacks_work_on_all_experts(full_size: Project) -> None:
    """Bytes that go in, whether weights are many or one."""
    plan = plan_variants(
        ["qwen3.6-35b-a3b-mlx-4bit"], full_size.options(profile="shapes", cache=full_size.cache)
    )
    for action in plan.graph:
        work = action.op.work(action.params, [ref.spec for ref in action.inputs])
        assert Work(Kind.KERNEL, sum(ref.spec.nbytes for ref in action.inputs)) == work


def test_the_observer_that_searches_takes_longer(full_size: Project, estimated: Estimated) -> None:
    """Kernels have rates of their own where they were seen to differ much."""
    del full_size
    observer = "quantize.config_groups.group_0.weights.observer"
    found = [
        estimated("w4a16-rtn", "--profile", "shapes", *ONE, "--set", f"{observer}={way}")
        for way in ("mse", "memoryless_minmax")
    ]

    seconds = [item["of_nodes"][0]["seconds"]["kernels"] for item in found]

    assert seconds[0] > 5 * seconds[1]


def test_a_project_has_rates_of_its_own(full_size: Project, estimated: Estimated) -> None:
    """Under `[rates]` of carnice.toml."""
    arguments = ("nvfp4-text-mtp", "--profile", "shapes", *GPU, *ONE)
    before = estimated(*arguments)["of_nodes"][0]["seconds"]
    (full_size.root / "carnice.toml").write_text("[rates]\ndisk_read = 2.4e9\ndisk_write = 3.2e9\n")
    after = estimated(*arguments)["of_nodes"][0]["seconds"]

    assert before["disk"] == pytest.approx(2 * after["disk"])
    assert before["passes"] == after["passes"]


# --- what people see -----------------------------------------------------------------------------


def test_a_plan_without_machines_has_no_estimate(project: Project, carnice: Carnice) -> None:
    """Neither as a table nor as JSON."""
    del project

    assert "Estimate" not in carnice("plan", "mlx-4bit").out
    assert "estimate" not in json.loads(carnice("plan", "mlx-4bit", "--json").out)


def test_the_table_names_the_bottleneck(full_size: Project, carnice: Carnice) -> None:
    """Below bytes and seconds; without a price nothing costs anything."""
    del full_size
    arguments = ("plan", "mlx-4bit", "--profile", "shapes", "--jobs", 2, "--bandwidth", "100GB/s")
    shown = carnice(*arguments).out
    priced = carnice(*arguments, "--price", 2).out

    assert "Estimate: 1 node of 2 cores, 100 GB/s each" in shown
    assert "bottleneck  kernels" in shown
    assert "cost" not in shown
    assert "node-hours" in priced


WRONG: list[tuple[tuple[object, ...], str]] = [
    (("--nodes", 4), "--nodes: an estimate needs the bandwidth of a node"),
    (("--price", 3), "--price: an estimate needs the bandwidth of a node"),
    (("--bandwidth", "fast"), "--bandwidth: 'fast' is not a rate such as 10Gbit/s or 1.2GB/s"),
    (("--bandwidth", "10GB"), "'10GB' is not a rate"),
    (("--bandwidth", "10Gb/s"), "'10Gb/s' is not a rate such as 10Gbit/s or 1.2GB/s"),
    (("--bandwidth", "10gib/s"), "'10gib/s' is not a rate"),
    (("--bandwidth", "0Gbit/s"), "'0Gbit/s' is not a rate from 1 B/s"),
    (("--bandwidth", "9" * 30 + "GB/s"), "is not a rate from 1 B/s"),
    (("--bandwidth", "9" * 90 + "GB/s"), "is not a rate such as"),
    ((*ONE, "--price", "nan"), "--price: nan is no price"),
    ((*ONE, "--price", "1e308"), "expected 0 to 1e+12"),
    ((*ONE, "--price", "-1"), "--price: -1.0 is no price"),
    (("--nodes", 0, "--bandwidth", "1GB/s"), "--nodes"),
    (("--nodes", 100_000, "--bandwidth", "1GB/s"), "--nodes"),
    (("--nodes", "four", "--bandwidth", "1GB/s"), "--nodes"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG, ids=[str(item[0]) for item in WRONG])
def test_bad_machines_are_refused(
    project: Project, carnice: Carnice, arguments: tuple[object, ...], message: str
) -> None:
    """In one sentence, before anything is planned."""
    del project
    finished = carnice("plan", "mlx-4bit", *arguments)

    assert 2 == finished.code
    assert message in finished.err
    assert "" == finished.out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[rates]\ngpu_forwards = 1e12\n", "unknown key rates.gpu_forwards"),
        ("[rates]\ngpu_forward = 0\n", "rates.gpu_forward is not valid"),
        ("[rates]\ngpu_forward = -1e12\n", "expected a number, 1 or more"),
        ("[rates]\ncore_read = 1e-320\n", "rates.core_read is not valid"),
        ("[rates]\ngpu_forward = inf\n", "rates.gpu_forward is not valid"),
        ("[rates]\ngpu_forward = nan\n", "rates.gpu_forward is not valid"),
        ("[rates]\ngpu_forward = '1e12'\n", "rates.gpu_forward is not valid"),
        ("rates = 3\n", "rates is not valid"),
    ],
)
def test_bad_rates_are_refused(project: Project, carnice: Carnice, text: str, message: str) -> None:
    """With the file that has them."""
    (project.root / "carnice.toml").write_text(text)
    finished = carnice("plan", "mlx-4bit", *ONE)

    assert 2 == finished.code
    assert "carnice.toml" in finished.err
    assert message in " ".join(finished.err.split())


def test_rates_of_a_line() -> None:
    """In bits or bytes, by thousands or by 1024."""
    texts = ("10Gbit/s", "1.2GB/s", "100 MiB/s", "8bit/s", "1kB/s", " 2.5 gbit/s ")

    assert [1.25e9, 1.2e9, 100 * 2**20, 1, 1000, 2.5e9 / 8] == [parse_bandwidth(t) for t in texts]


def test_nothing_to_do_takes_no_time() -> None:
    """As of a share without work."""
    assert (Resource.WIRE, 0.0) == Load().slowest
