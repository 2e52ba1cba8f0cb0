"""W4A16 by AWQ: what a change costs, where a killed build goes on, and what is refused."""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable

import pytest
from calibrating import QUICK, build, make_project
from conftest import REPOSITORY, Finished, Project, TinyCheckpoint
from test_bad_input import check_refused_at_once
from test_calibration import blob_sizes, start
from tiny import contents

from carnice_build.calibration.tokens import LongestFirst
from carnice_build.commands.options import Options
from carnice_build.commands.plan import plan_variants
from carnice_build.formats.compressed_tensors.awq import Smooth
from carnice_build.graph import ActionOutput
from carnice_build.models.base import Role
from carnice_build.serving.render import serve_all
from carnice_build.store.records import Records

pytest_plugins = ["calibrating"]

Carnice = Callable[..., Finished]
Ran = Callable[..., Counter[str]]

MSE, MINMAX = "w4a16-awq", "w4a16-awq-minmax"
SMOOTH, QUANTIZE = "awq.smooth", "compressed.quantize"
QUANTIZED = 3 * 3 + 7
"""Linears of three linear layers, whose MLP alone is quantized, and of a full one."""


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project of four layers where `w4a16-awq` is built; not to be changed."""
    project = make_project(tmp_path_factory.mktemp("awq") / "project")
    build(project, MSE, jobs=1)
    return project


# --- what a change costs -------------------------------------------------------------------------


def test_the_observer_costs_no_forward_pass(calibrated: Project, ran: Ran) -> None:
    """Switching from mse to minmax packs the quantized weights again and does nothing else."""
    assert Counter({QUANTIZE: QUANTIZED}) == ran(calibrated, MINMAX)
    assert Counter() == ran(calibrated, MSE)


def test_another_order_of_equal_samples_searches_again(calibrated: Project, ran: Ran) -> None:
    """As the dataset has them, samples give other scales; reordered rows are sorted to the same."""
    path = calibrated.root / "rows.txt"
    rows = ["Which functions do you have? " * count for count in (1, 2, 3)]
    changes = ("dataset=rows.txt", "samples=3", "length=64")
    changes = tuple(f"calibration.{change}" for change in changes)
    made = []
    for order in ((0, 1, 2), (2, 0, 1), (1, 2, 0)):
        path.write_text("".join(f"{rows[index]}\n" for index in order))
        made.append(ran(calibrated, MSE, changes=changes))
    given = ran(calibrated, MSE, changes=(*changes, "calibration.order=given"))

    assert 4 == made[0][SMOOTH]
    assert [Counter({"calibration.tokens": 1, "calibration.longest": 1})] * 2 == made[1:]
    assert 4 == given[SMOOTH]
    assert 0 == given["calibration.tokens"]


@pytest.mark.parametrize(
    ("variant", "change", "sorts"),
    [
        (MSE, (), True),
        (MSE, ("calibration.order=given",), False),
        (MSE, ("calibration.order=longest",), True),
        ("nvfp4-text-mtp", (), False),
        ("nvfp4-text-mtp", ("calibration.order=longest",), True),
        ("int4-autoround", (), False),
    ],
)
def test_the_format_says_in_which_order_samples_are_seen(
    small: Project, variant: str, change: tuple[str, ...], sorts: bool
) -> None:
    """AWQ takes the longest first, as its library does; others, and whoever says so, as given."""
    graph = plan_variants([variant], small.options(overrides=(*QUICK, *change))).graph

    assert sorts == any(isinstance(item.op, LongestFirst) for item in graph)


def test_a_killed_search_goes_on_in_its_layer(
    calibrated: Project, shared: Project, ran: Ran
) -> None:
    """kill -9 in layer k: what was on record stays done, and the folder is the same."""
    shutil.rmtree(calibrated.cache)
    process = start(calibrated, MSE)
    while _searched(calibrated) < 2:
        assert process.poll() is None, process.communicate()
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    records = Records(calibrated.cache / "records")
    finished = len(records.names("action"))
    records.close()
    made = ran(calibrated, MSE)
    options = calibrated.options(overrides=QUICK)

    # Tokens, embedding and the first layer at least; the second may just have been written.
    assert 3 <= finished
    assert len(plan_variants([MSE], options).graph) - finished == made.total()
    assert 1 <= made[SMOOTH] <= 3
    assert contents(shared.out / MSE) == contents(calibrated.out / MSE)


def _searched(project: Project) -> int:
    """Layers whose scales are in the cache: F64 for each of the 512 channels of `up_proj`."""
    return blob_sizes(project).count(8 * 512)


# --- norms ---------------------------------------------------------------------------------------


def test_exact_norms_that_nothing_smooths_are_the_sources(small: Project) -> None:
    """`norms: exact` publishes them as they are, where the library makes all of them anew."""
    exact, library = (_made_norms(small, norms) for norms in ("exact", "library"))
    every = {
        f"model.language_model.{name}.weight"
        for name in (
            "layers.0.input_layernorm",
            "layers.0.post_attention_layernorm",
            "layers.1.input_layernorm",
            "layers.1.post_attention_layernorm",
            "layers.1.self_attn.q_norm",
            "layers.1.self_attn.k_norm",
            "norm",
        )
    }

    assert every == library
    # Layer 0 is of linear attention, which is not quantized, so nothing is smoothed into it.
    assert {
        "model.language_model.layers.0.post_attention_layernorm.weight",
        "model.language_model.layers.1.input_layernorm.weight",
        "model.language_model.layers.1.post_attention_layernorm.weight",
    } == exact


def _made_norms(project: Project, norms: str) -> set[str]:
    """The norms that are not published with the bytes of their source."""
    options = project.options(overrides=(*QUICK, f"quantize.awq.norms={norms}"))
    (variant,) = plan_variants([MSE], options).variants
    return {
        tensor.name
        for tensor in variant.conversion.tensors
        if tensor.fact.role is Role.NORM and isinstance(tensor.ref.origin, ActionOutput)
    }


# --- the 40B -------------------------------------------------------------------------------------

DECKARD = """
extends: w4a16-awq.yaml
variant: deckard
description: W4A16 of the 40B of the published card, which has an MTP head of its own
sources:
  body: {model: DavidAU/Deckard-40B}
steps: []
"""


@pytest.fixture
def deckard(project: Project) -> Options:
    """Options for a plan of variant `deckard` from the shapes of the 40B."""
    project.recipe("deckard", DECKARD)
    shapes = REPOSITORY / "benchmarks" / "shapes" / "qwen3.6-40b-deckard.json"
    dataset = REPOSITORY / "demo" / "calibration.jsonl"
    for target in (shapes, dataset):
        (project.root / target.name).symlink_to(target)
    (project.recipes / "_profiles.yaml").write_text(
        f"shapes:\n  DavidAU/Deckard-40B: {shapes.name}\n  Qwen/Qwen3.6-27B: {shapes.name}\n"
        f"  NousResearch/hermes-function-calling-v1: {dataset.name}\n"
    )
    return project.options(profile="shapes")


def test_the_plan_of_the_40b_leaves_alone_what_the_card_counts(
    deckard: Options, carnice: Carnice
) -> None:
    """471 modules, the card's figure: 72 x 5 + 27 x 4 + 2 + 1; the MTP head is a pattern beside."""
    shown = carnice("plan", "deckard", "--profile", "shapes").out
    (variant,) = json.loads(carnice("plan", "deckard", "--profile", "shapes", "--json").out)[
        "variants"
    ]
    *modules, pattern = variant["left_alone"]

    assert "not quantized  471 modules and re:^mtp.*" in shown
    assert 471 == len(modules)
    assert "re:^mtp.*" == pattern
    assert 72 * 5 == sum(".linear_attn." in name for name in modules)
    assert 27 * 4 + 2 == sum(name.startswith("model.visual.") for name in modules)
    assert "lm_head" in modules


def test_the_page_for_v100_holds_the_card_and_what_was_worked_out(deckard: Options) -> None:
    """Ladder, KV cache by the architecture and by the card, sampling, looping, out of memory."""
    (variant,) = plan_variants(["deckard"], deckard).variants
    assert variant.serving is not None
    files = serve_all(variant.recipe.package.serve, variant.serving)
    page = files["serve/w4a16-v100/README.md"].decode()

    for part in (
        "24 layers of full attention, 4 KV heads of 256",
        "| `ceiling` | 262,144 | fp8_e5m2 | 12.0 GiB (12.9 GB) | 35.6 GiB |",
        "The source model card reports for `ceiling`: about 12.6 GB.",
        "| 200000 | 0.85 | 4 | 9.2 GiB (9.8 GB) | `safe` |",
        "| 240000 | 0.87 | 8 | 11.0 GiB (11.8 GB) | `longer` |",
        "| 262144 | 0.89 | 16 | 12.0 GiB (12.9 GB) | `ceiling` |",
        "| `PYTORCH_CUDA_ALLOC_CONF` (mandatory) | `expandable_segments:True` |",
        "| general | 0.7 | 0.95 | 20 | 1 |",
        "| fiction and dialogue | 0.7 | 0.95 | 20 | 1.05 to 1.1 |",
        "| tool calls | 0.3 to 0.5 |",
        "## When it repeats itself or stalls",
        "## Out of memory while it answers (not while it starts)",
    ):
        assert part in page


# --- what is refused -----------------------------------------------------------------------------

WEIGHTS = "quantize.config_groups.group_0.weights"
REFUSED = [
    (f"{WEIGHTS}.observer=minmax", "(got 'minmax'); did you mean 'memoryless_minmax'?"),
    (f"{WEIGHTS}.group_size=100", f"{WEIGHTS}.group_size: "),
    (f"{WEIGHTS}.num_bits=9", f"{WEIGHTS}.num_bits: "),
    (f"{WEIGHTS}.strategy=channel", "strategy channel has no group_size"),
    ("quantize.ignore+=re:.*k_proj$", "self_attn.v_proj are quantized and some are not; expected"),
    ("quantize.ignore+=re:.*layers.0.mlp.up_proj$", "serving engines fuse them to"),
    ("quantize.awq.norms=exakt", "did you mean 'exact'?"),
    ("quantize.awq.n_grid=0", "quantize.awq.n_grid: "),
]


def test_what_is_in_no_decoder_layer_stays_as_it_is(small: Project) -> None:
    """Head, vision tower and MTP head, whether the recipe says so or not."""
    said, unsaid = (
        plan_variants(["w4a16-rtn"], small.options(overrides=changes)).variants[0].conversion
        for changes in ((), ['quantize.ignore=["re:.*linear_attn.*"]'])
    )

    assert said.quantized == unsaid.quantized
    assert said.ignored == unsaid.ignored


@pytest.mark.parametrize(("change", "reason"), REFUSED)
def test_a_knob_that_cannot_be_is_refused(
    small: Project, carnice: Carnice, change: str, reason: str
) -> None:
    """One line with the place, the reason, what was expected and the nearest name."""
    check_refused_at_once(carnice("plan", MSE, "--set", change), small, reason)


def test_a_group_that_does_not_divide_is_refused(
    project: Project, tiny_checkpoint: TinyCheckpoint, carnice: Carnice
) -> None:
    """The module and its inputs are named, and the line of the scheme."""
    source = tiny_checkpoint(project.root / "odd", mtp=False, intermediate=192)
    (project.root / "rows.jsonl").write_text("{}\n")
    finished = carnice(
        *("build", MSE, "--source", f"body={source}"),
        *("--set", "calibration.dataset=rows.jsonl", "--set", "calibration.samples=1"),
        *("--set", "steps=[]"),
    )

    check_refused_at_once(
        finished, project, "mlp.down_proj: group_size 128 does not divide the 192 inputs"
    )


# --- serving -------------------------------------------------------------------------------------

E4M3 = "{profile: w4a16-v100, launches: {safe: {flags: {kv-cache-dtype: fp8_e4m3}}}}"


@pytest.mark.parametrize("listed", [True, False])
def test_a_launch_that_cannot_work_stops_the_plan_at_its_line(
    small: Project, carnice: Carnice, listed: bool
) -> None:
    """Exit code 2, the reason, and the line and column of the flag that is to blame."""
    flag = "      launches: {safe: {flags: {kv-cache-dtype: fp8_e4m3}}}\n"
    first = "    - w4a16-vllm\n    - profile: w4a16-v100\n"
    alone = flag.removeprefix("  ")
    section = first + flag if listed else "    profile: w4a16-v100\n" + alone
    path = small.recipe(
        "broken",
        f"extends: {MSE}.yaml\nvariant: broken\ndescription: A V100 in E4M3\n"
        f"package:\n  serve:\n{section}",
    )
    line = path.read_text().split("kv-cache-dtype")[0].count("\n") + 1
    column = (flag if listed else alone).index("fp8_e4m3") + 1
    finished = carnice("build", "broken")

    check_refused_at_once(
        finished,
        small,
        f"recipes/broken.yaml:{line}:{column}: the launch 'safe' cannot work: a V100 cannot do",
        "expected kv-cache-dtype fp8_e5m2",
    )


def test_a_profile_is_served_once(small: Project, carnice: Carnice) -> None:
    """Two sections of one profile would be one folder, and are refused."""
    change = f"package.serve=[{E4M3.replace('e4m3', 'e5m2')}, w4a16-v100]"

    check_refused_at_once(
        carnice("plan", MSE, "--set", change), small, "'w4a16-v100' is listed twice"
    )


def test_a_folder_is_served_by_both_engines(calibrated: Project, ran: Ran) -> None:
    """Stock vLLM and the V100 fork have a folder each below serve/; one profile has serve/."""
    build(calibrated, MSE)
    both = [name for name in calibrated.built(MSE) if name.startswith("serve/")]
    made = ran(calibrated, MSE, changes=("package.serve=w4a16-v100",))
    alone = [name for name in calibrated.built(MSE) if name.startswith("serve/")]

    assert {
        "serve/README.md",
        "serve/w4a16-vllm/hopper.sh",
        "serve/w4a16-vllm/ampere.sh",
        "serve/w4a16-v100/safe.sh",
        "serve/w4a16-v100/longer.sh",
        "serve/w4a16-v100/ceiling.sh",
        *(
            f"serve/{profile}/{name}"
            for profile in ("w4a16-vllm", "w4a16-v100")
            for name in ("README.md", "compose.yaml", "hermes-cli-config.yaml", "request.sh")
        ),
    } == set(both)
    assert "serve/safe.sh" in alone
    assert Counter() == made


# --- keys ----------------------------------------------------------------------------------------


def test_no_key_of_a_search_holds_the_observer(small: Project) -> None:
    """The searches of both recipes are the same actions, and none knows the word."""
    searches = []
    for variant in (MSE, MINMAX):
        graph = plan_variants([variant], small.options(overrides=QUICK)).graph
        searches.append([item for item in graph if isinstance(item.op, Smooth)])
    first, second = searches

    assert 2 == len(first)
    assert [item.identity for item in first] == [item.identity for item in second]
    assert "observer" not in json.dumps([dict(item.params) for item in first])
