"""GPTQ builds, held against llm-compressor's own `oneshot`, and what a change of them costs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from calibrating import QUICK, build, make_project
from conftest import REPOSITORY, Finished, Project
from driving import Checkpoint
from family_builds import build_checked, write_family, write_texts
from oneshot import IGNORE, canonical, run_gptq, tokenizer, write_rows, written
from test_awq_families import is_tower, keep_masks, keep_shared, respelled, same
from test_bad_input import check_refused_at_once
from test_calibration import blob_sizes
from tiny import read_all_tensors, read_json

from carnice_build.calibration.driver import Arithmetic, decoder_layers
from carnice_build.commands.build import build_variants
from carnice_build.commands.options import Options
from carnice_build.commands.plan import plan_and_survey, plan_variants
from carnice_build.units import format_size

pytest_plugins = ["calibrating"]

Carnice = Callable[..., Finished]
Ran = Callable[..., Counter[str]]

GPTQ = "w4a16-gptq"
HESSIANS, QUANTIZE, ADVANCE = "gptq.hessians", "gptq.quantize", "gptq.advance"
LAYERS, QUANTIZED = 4, 3 * 3 + 7
"""Linears of three linear layers, whose MLP alone is quantized, and of a full one."""

RECIPE = """
extends: preset:w4a16-gptq
variant: w4a16
description: GPTQ of the whole Qwen stand-in
sources:
  body: {model: Qwen/Qwen3.6-27B}
calibration: {dataset: rows.jsonl, samples: 3, threads: 1}
"""


# --- as oneshot ----------------------------------------------------------------------------------


def _project(root: Path, *overrides: str) -> tuple[Options, list[torch.Tensor]]:
    """A recipe for the demo's base, and the tokens of its samples."""
    recipes = root / "recipes"
    recipes.mkdir()
    (recipes / "w4a16.yaml").write_text(RECIPE)
    (recipes / "_profiles.yaml").write_text("demo:\n  Qwen/Qwen3.6-27B: demo\n")
    (root / "demo").symlink_to(REPOSITORY / "demo" / "qwen3.6-27b")
    tokens = write_rows(root / "rows.jsonl")
    return Options(
        recipes=recipes, out=root / "ours", cache=root / "cache", overrides=overrides
    ), tokens


@dataclass(frozen=True)
class Oneshot:
    """Our folder and the library's, and the options that ours was built with."""

    project: Project
    folders: tuple[Path, Path]
    options: Options


@pytest.fixture(scope="module")
def oneshot(tmp_path_factory: pytest.TempPathFactory) -> Oneshot:
    """The demo's base, by us and by the library; not to be changed."""
    root = tmp_path_factory.mktemp("gptq")
    options, tokens = _project(root)
    build_variants(["w4a16"], options)
    run_gptq({"observer": "mse"}, root / "theirs", tokens)
    return Oneshot(Project(root), (root / "ours" / "w4a16", root / "theirs"), options)


@pytest.fixture
def folders(oneshot: Oneshot) -> tuple[Path, Path]:
    """Ours and the library's."""
    return oneshot.folders


def test_every_tensor_that_oneshot_writes_is_ours_bit_for_bit(folders: tuple[Path, Path]) -> None:
    """Packed weights, scales, zero points, norms and what stays plain; the MTP head is copied."""
    ours, theirs = read_all_tensors(folders[0]), written(folders[1])

    assert [] == [key for key, tensor in theirs.items() if ours.get(key) != tensor]
    assert {key for key in ours if not key.startswith(("mtp.", "model.visual."))} <= set(theirs)
    assert len(theirs) >= 205


def test_the_config_is_the_librarys(folders: tuple[Path, Path]) -> None:
    """`actorder` is there; vision and MTP head are ignored besides."""
    ours, theirs = (read_json(item / "config.json")["quantization_config"] for item in folders)
    ignored, library = ours.pop("ignore"), theirs.pop("ignore")

    assert theirs == ours
    assert "static" == ours["config_groups"]["group_0"]["weights"]["actorder"]
    text = {entry for entry in ignored if not entry.startswith("model.visual.")}
    assert {canonical(entry) for entry in library} | {"re:^mtp.*"} == text


class _Recipe(yaml.SafeLoader):
    """Reads the tag that the library writes for an enumeration, which its own reader must allow."""


_Recipe.add_multi_constructor(
    "tag:yaml.org,2002:python/object/apply:",
    lambda loader, _, node: loader.construct_sequence(node)[0],
)


def test_the_recipe_beside_the_weights_is_the_librarys_but_for_its_tag(
    folders: tuple[Path, Path],
) -> None:
    """recipe.yaml names the modifier and its arguments; any YAML reader takes ours."""
    ours, theirs = (item / "recipe.yaml" for item in folders)

    assert yaml.load(theirs.read_text(), _Recipe) == yaml.safe_load(ours.read_text())


@pytest.mark.gpu
def test_a_gpu_finds_what_oneshot_finds_there(tmp_path: Path) -> None:
    """Every tensor is equal where the library, too, takes matrices one by one."""
    options, tokens = _project(tmp_path, "calibration.device=cuda")
    build_variants(["w4a16"], options)
    run_gptq({"observer": "mse"}, tmp_path / "theirs", tokens, batched_quantization=None)
    ours, theirs = read_all_tensors(tmp_path / "ours" / "w4a16"), written(tmp_path / "theirs")

    assert [] == [key for key, tensor in theirs.items() if ours.get(key) != tensor]


# --- experts -------------------------------------------------------------------------------------

EXPERTS = """
calibration: {{dataset: rows.jsonl, samples: 3, threads: 1, attention: eager}}
quantize:
  format: compressed-tensors
  algorithm: gptq
  targets: [Linear]
  config_groups:
    group_0:
      targets: [Linear]
      weights: {{num_bits: 4, symmetric: false, strategy: group, group_size: 128}}
  ignore: {ignore}
  gptq: {{propagate_error: {propagate}}}
"""


@dataclass(frozen=True)
class Experts:
    """A family, whether errors are handed on, and patterns for what neither side quantizes."""

    family: str
    propagate: bool = False
    plain: tuple[str, ...] = ()
    changes: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.family


CASES = [
    Experts("glm4_moe"),
    Experts("mixtral"),
    Experts("llama"),
    Experts("qwen3_5_moe", propagate=True),
    Experts("gemma4_moe", propagate=True, plain=("re:.*router.proj",)),
    Experts(
        "gemma4",
        propagate=True,
        plain=("re:.*per_layer_model_projection",),
        changes={"hidden_size_per_layer_input": 128},
    ),
]


@pytest.mark.parametrize(
    "case",
    [Experts("qwen3_moe"), *(pytest.param(case, marks=pytest.mark.wide) for case in CASES)],
    ids=str,
)
def test_experts_are_those_of_oneshot(
    case: Experts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every expert reads every token, so one Hessian serves all on their way in.

    Layers are calibrated with what those before them made, quantized or unquantized, as the
    library offers both.
    """
    monkeypatch.chdir(tmp_path)
    source = Checkpoint(write_family(tmp_path / "source", case.family, case.changes))
    texts = write_texts(tmp_path / "rows.jsonl")
    plain = [*IGNORE, *case.plain]
    recipe = EXPERTS.format(
        ignore=[*plain, "re:.*(eh_proj|shared_head).*"], propagate=str(case.propagate).lower()
    )
    ours = read_all_tensors(build_checked(tmp_path, source.folder, "gptq", recipe))
    model = source.whole(Arithmetic("bfloat16", "eager", threads=1))
    keep_masks(type(model), monkeypatch)
    if case.family == "gemma4":
        keep_shared(len(texts), monkeypatch)
    run_gptq(
        {"observer": "memoryless_minmax"},
        tmp_path / "theirs",
        [torch.tensor(tokenizer()(text)["input_ids"]) for text in texts],
        model,
        type(decoder_layers(model)[1][0]).__name__,
        plain,
        propagate_error=case.propagate,
    )
    theirs = {
        respelled(name, source.prefix): tensor
        for name, tensor in read_all_tensors(tmp_path / "theirs").items()
    }

    assert len(theirs) > 20
    assert [] == [name for name in theirs if not same(ours.get(name), theirs[name])]
    assert [] == [name for name in set(ours) ^ set(theirs) if not is_tower(name)]


# --- what a change costs -------------------------------------------------------------------------

ALONE = ("quantize.gptq.propagate_error=false", "quantize.gptq.keep_hessians=true")
SCHEME = "quantize.config_groups.group_0.weights"
CHANGES = (
    "quantize.gptq.dampening_frac=0.1",
    "quantize.gptq.block_size=64",
    "quantize.gptq.actorder=null",
    f"{SCHEME}.observer=memoryless_minmax",
    f"{SCHEME}.group_size=64",
)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project of four layers where Hessians were kept; not to be changed."""
    project = make_project(tmp_path_factory.mktemp("gptq") / "project")
    build(project, GPTQ, changes=ALONE, jobs=1)
    return project


def would_run(options: Options, variant: str) -> Counter[str]:
    """The actions of GPTQ that a build would run, by their op."""
    plan = plan_and_survey([variant], options)
    names = (item.op.name for item in plan.plan.graph if plan.status.to_run(item.identity))
    return Counter(name for name in names if name.startswith("gptq."))


@pytest.mark.parametrize("change", CHANGES)
def test_no_knob_of_weights_takes_a_pass_where_errors_stay_behind(
    calibrated: Project, change: str
) -> None:
    """With Hessians that were kept, each linear is quantized again and nothing else happens."""
    overrides = (*QUICK, *ALONE, change)

    assert {QUANTIZE: QUANTIZED} == would_run(calibrated.options(overrides=overrides), GPTQ)


def test_what_is_quantized_again_is_quantized_of_hessians_that_were_kept(
    calibrated: Project, ran: Ran
) -> None:
    """A build does what its plan says, and back again it does nothing."""
    assert Counter({QUANTIZE: QUANTIZED}) == ran(calibrated, GPTQ, changes=(*ALONE, CHANGES[0]))
    assert Counter() == ran(calibrated, GPTQ, changes=ALONE)


def test_another_name_of_the_order_changes_the_config_alone(calibrated: Project, ran: Ran) -> None:
    """`weight` and `static` are one order."""
    made = ran(calibrated, GPTQ, changes=(*ALONE, "quantize.gptq.actorder=weight"))
    config = read_json(calibrated.out / GPTQ / "config.json")["quantization_config"]

    assert Counter() == made
    assert "weight" == config["config_groups"]["group_0"]["weights"]["actorder"]


def test_hessians_go_unless_they_are_to_stay(shared: Project, oneshot: Oneshot) -> None:
    """One of 512 columns takes a megabyte, and lies in the cache only where the recipe says so."""
    megabyte = 4 * 512 * 512

    assert LAYERS == blob_sizes(shared).count(megabyte)
    assert 0 == blob_sizes(oneshot.project).count(megabyte)


def test_errors_that_are_handed_on_redo_the_layers_behind(oneshot: Oneshot) -> None:
    """Every layer depends on those before it, and what is behind the last reads nothing.

    Where the last layer changes, those before it are run through once more, and none of their
    linears is quantized.
    """
    last = 'quantize.ignore+=["re:.*layers.7.mlp.*"]'
    everywhere = "quantize.gptq.dampening_frac=0.1"
    options = oneshot.options

    assert Counter() == would_run(options, "w4a16")
    assert {HESSIANS: 1, QUANTIZE: 4, ADVANCE: 7} == would_run(
        replace(options, overrides=(last,)), "w4a16"
    )
    assert {HESSIANS: 8, QUANTIZE: 32, ADVANCE: 7} == would_run(
        replace(options, overrides=(everywhere,)), "w4a16"
    )


def test_keys_of_hessians_hold_no_knob(small: Project) -> None:
    """All where errors stay behind; where they are handed on, those of the first layer."""

    def identities(*changes: str) -> list[str]:
        graph = plan_variants([GPTQ], small.options(overrides=(*QUICK, *changes))).graph
        return [item.identity for item in graph if item.op.name == HESSIANS]

    alone, handed_on = identities(ALONE[0]), identities()
    for change in CHANGES:
        assert alone == identities(ALONE[0], change)
        assert handed_on[:1] == identities(change)[:1]
        assert handed_on[1:] != identities(change)[1:]


def test_the_plan_tells_what_hessians_take(small: Project) -> None:
    """A notice where they stay, and disk that is used for a while where they do not."""
    usual, kept = (
        plan_and_survey([GPTQ], small.options(overrides=overrides)) for overrides in ((), ALONE)
    )
    size = 4 * (2 * 512**2 + 256**2 + 3 * 128**2)

    assert (f"gptq.keep_hessians: Hessians of {format_size(size)} stay in the cache",) == (
        kept.variants[0].notices
    )
    assert () == usual.variants[0].notices
    assert usual.status.scratch_bytes(usual.plan.graph, 1) >= size


# --- what is counted and refused -----------------------------------------------------------------


def test_build_json_counts_what_was_rounded_to_nearest(shared: Project) -> None:
    """One matrix for each linear, none of which was."""
    figures = read_json(shared.out / GPTQ / "build.json")["figures"]
    found = {name: value for name, value in figures.items() if "rounded to nearest" in name}

    assert QUANTIZED == len(found)
    assert all(value == [1, 0] for value in found.values())


REFUSED = [
    ("quantize.gptq.actorder=group", "has removed actorder group, which needed `weight_g_idx`"),
    ("quantize.gptq.actorder=statik", "did you mean 'static'?"),
    ("quantize.gptq.dampening_frac=-1", "quantize.gptq.dampening_frac: "),
    ("quantize.gptq.block_size=0", "quantize.gptq.block_size: "),
    ("quantize.awq.n_grid=20", "algorithm gptq has no use for `awq`"),
]


@pytest.mark.parametrize(("change", "reason"), REFUSED)
def test_a_knob_that_cannot_be_is_refused(
    small: Project, carnice: Carnice, change: str, reason: str
) -> None:
    """One line with the place, the reason, and what was expected."""
    check_refused_at_once(carnice("plan", GPTQ, "--set", change), small, reason)
