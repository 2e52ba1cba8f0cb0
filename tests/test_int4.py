"""What the format `autoround` takes into its keys, how it goes on, and what it refuses."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from calibrating import DEMO, cut_demo
from conftest import REPOSITORY, Finished, Project
from test_bad_input import check_refused, check_refused_at_once
from tiny import (
    Tensor,
    bf16,
    contents,
    misprefixed,
    read_json,
    read_safetensors,
    write_json,
    write_safetensors,
)

from carnice_build.chat.hermes import to_hermes
from carnice_build.commands.build import build_variants
from carnice_build.commands.plan import plan_variants
from carnice_build.execute import session
from carnice_build.formats.autoround.ops import Merge
from carnice_build.formats.autoround.tune import Tune
from carnice_build.graph import Action
from carnice_build.store.records import Records

Carnice = Callable[..., Finished]
Change = Callable[[dict[str, Tensor]], None]

RTN, MERGE, TUNE = "int4-rtn", "int4-bf16-mtp", "int4-autoround"
GRID = "qwen3.6-27b-int4-autoround"
LAYERS = (0, 2, 7)
"""Linear and left alone by the fine-tune, linear, full."""

QUICK = (
    "quantize.tune.iters=2",
    "quantize.tune.batch_size=2",
    "calibration.samples=2",
    "calibration.length=24",
    "calibration.threads=1",
)
LAYER = "model.language_model.layers.{}.".format
UP = LAYER(1) + "mlp.up_proj"


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Three layers of the fine-tune, the base and the base's grid; nothing was built."""
    project = Project(tmp_path_factory.mktemp("int4") / "project")
    shutil.copytree(REPOSITORY / "recipes", project.recipes)
    for name in ("carnice-v2-27b", "qwen3.6-27b", GRID):
        cut_demo(name, project.root / "demo" / name, LAYERS)
    shutil.copyfile(DEMO / "calibration.jsonl", project.root / "demo" / "calibration.jsonl")
    return project


@pytest.fixture
def project(template: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A copy, which is the current folder and may be changed."""
    shutil.copytree(template.root, tmp_path / "project")
    monkeypatch.chdir(tmp_path / "project")
    return Project(tmp_path / "project")


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Counter[str]]:
    """`ran(project, variant, *changes)` builds, and counts the actions by their op."""
    made: list[str] = []
    execute = session.execute

    def watched(*arguments: Any) -> session.Outcome:
        outcome = execute(*arguments)
        made.extend(action.op.name for action in outcome.made)
        return outcome

    monkeypatch.setattr(session, "execute", watched)

    def call(project: Project, variant: str, *changes: str) -> Counter[str]:
        made.clear()
        build_variants([variant], project.options(overrides=changes))
        return Counter(made)

    return call


def planned(project: Project, variant: str, *changes: str) -> list[Action]:
    return list(plan_variants([variant], project.options(overrides=changes)).graph)


def keys(project: Project, *changes: str) -> list[str]:
    """What each layer's tuning is known by, in the order of layers."""
    actions = planned(project, TUNE, *QUICK, *changes)
    return [action.identity for action in actions if isinstance(action.op, Tune)]


def rewrite(checkpoint: Path, change: Change) -> None:
    path = checkpoint / "model.safetensors"
    tensors = read_safetensors(path)
    change(tensors)
    write_safetensors(path, tensors)


def poke(checkpoint: Path, name: str, value: bytes) -> None:
    """Put other bytes at the beginning of a tensor."""

    def change(tensors: dict[str, Tensor]) -> None:
        old = tensors[name]
        tensors[name] = Tensor(old.dtype, old.shape, value + old.data[len(value) :])

    rewrite(checkpoint, change)


# --- keys ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        "quantize.tune.iters=3",
        "quantize.tune.lr=0.01",
        "quantize.tune.minmax_lr=0.01",
        "quantize.tune.enable_minmax_tuning=false",
        "quantize.tune.batch_size=1",
        "quantize.tune.gradient_accumulate_steps=2",
        "quantize.tune.not_use_best_mse=true",
        "quantize.tune.seed=43",
        "quantize.group_size=64",
        "calibration.samples=3",
        "calibration.length=25",
        "calibration.joined=false",
        "calibration.threads=2",
        "calibration.dtype=float32",
    ],
)
def test_a_knob_changes_the_key_of_every_layer(project: Project, change: str) -> None:
    """Nothing that was tuned with other settings or on other samples is taken over."""
    before, after = keys(project), keys(project, change)

    assert len(LAYERS) == len(before) == len(after)
    assert not set(before) & set(after)


def test_what_is_kept_changes_its_layer_and_those_behind(project: Project) -> None:
    """A linear that stays as it is changes what the layers behind it are given."""
    before = keys(project)
    keep = ["*.in_proj_a.weight", "*.in_proj_b.weight", "*.layers.1.mlp.down_proj.weight"]
    after = keys(project, f"quantize.keep={keep}")

    assert before[0] == after[0]
    assert not set(before[1:]) & set(after[1:])


@pytest.mark.parametrize("change", ["quantize.plain=float16", "card.title=x", "package.shard=1MB"])
def test_what_is_no_part_of_tuning_changes_no_key(project: Project, change: str) -> None:
    """How the folder is written does not matter to what is in it."""
    assert keys(project) == keys(project, change)


def test_each_rounding_has_its_own_merges(project: Project) -> None:
    """`delta` and `nearest` share no action, and there is one for each module."""
    both = [
        {
            action.identity
            for action in planned(project, MERGE, f"quantize.grid.rounding={rounding}")
            if isinstance(action.op, Merge)
        }
        for rounding in ("delta", "nearest")
    ]

    assert [6 + 6 + 7] * 2 == [len(found) for found in both]
    assert not both[0] & both[1]


def test_nearest_is_the_default_rounding(project: Project) -> None:
    """The better of both by `benchmarks/merge.py`, see docs/int4.md."""
    found = {
        action.params["rounding"]
        for action in planned(project, MERGE)
        if isinstance(action.op, Merge)
    }

    assert {"nearest"} == found


def test_the_full_model_is_planned_on_shapes() -> None:
    """64 layers, of which 48 x 6 + 16 x 7 linears are packed; of 29 MTP tensors 15 are left."""
    options = Project(REPOSITORY).options(profile="shapes")
    plan = plan_variants([MERGE], options)
    (variant,) = plan.variants
    names = [tensor.name for tensor in variant.conversion.tensors]
    grid = variant.sources["grid"].checkpoint.tensors

    assert 400 == len([action for action in plan.graph if isinstance(action.op, Merge)])
    assert 29 == len([name for name in grid if name.startswith("mtp.")])
    assert 15 == len([name for name in names if name.startswith("mtp.")])


# --- going on ------------------------------------------------------------------------------------


def start(project: Project) -> subprocess.Popen[str]:
    settings = [part for item in QUICK for part in ("--set", item)]
    return subprocess.Popen(
        [sys.executable, "-m", "carnice_build", "build", TUNE, *settings],
        cwd=project.root,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def tuned_layers(project: Project) -> int:
    """How many layers are done, by the losses that the cache knows."""
    if not (project.cache / "records" / "cache.db").exists():
        return 0
    records = Records(project.cache / "records")
    found = len(records.names("figure"))
    records.close()
    return found


def test_a_killed_tuning_goes_on_at_the_layer_it_was_in(
    project: Project, ran: Callable[..., Counter[str]]
) -> None:
    """kill -9 in a layer: those before it stay done, and the result is an undisturbed build's."""
    process = start(project)
    while tuned_layers(project) < 1:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    done = tuned_layers(project)
    made = ran(project, TUNE, *QUICK)
    resumed = contents(project.out / TUNE)
    shutil.rmtree(project.cache)
    build_variants([TUNE], project.options(overrides=QUICK))

    assert 1 <= done < len(LAYERS)
    assert len(LAYERS) - done == made["autoround.tune"]
    assert contents(project.out / TUNE) == resumed


def test_a_changed_layer_is_tuned_again_and_those_behind(
    project: Project, ran: Callable[..., Counter[str]]
) -> None:
    """Nothing before the change is tuned; its hidden states, which are gone, are made again."""
    build_variants([TUNE], project.options(overrides=QUICK))
    poke(project.checkpoint, misprefixed(f"{UP}.weight"), bf16(np.array([0.25], np.float32)))
    made = ran(project, TUNE, *QUICK)

    assert {"autoround.tune": len(LAYERS) - 1, "autoround.advance": 1} == made


def test_a_change_of_what_is_not_tuned_tunes_nothing(
    project: Project, ran: Callable[..., Counter[str]]
) -> None:
    """Another type of the plain tensors casts these and leaves what was learned."""
    build_variants([TUNE], project.options(overrides=QUICK))
    made = ran(project, TUNE, *QUICK, "quantize.plain=float16")

    assert {"elementwise"} == set(made)


# --- recipes -------------------------------------------------------------------------------------

OVERRIDES = {
    "a grid that no source is": (
        MERGE,
        "quantize.grid.source=gird",
        ("the recipe has no source 'gird'", "did you mean 'grid'?"),
    ),
    "a base that no source is": (
        MERGE,
        "quantize.grid.base=qwen",
        ("the recipe has no source 'qwen'", "expected body or base or grid"),
    ),
    "a merge onto nothing": (
        RTN,
        "quantize.method=merge",
        ("method merge needs a section `grid`",),
    ),
    "knobs of tuning without tuning": (
        TUNE,
        "quantize.method=nearest",
        ("method nearest has no use for `tune`",),
    ),
    "a grid without a merge": (
        MERGE,
        "quantize.method=nearest",
        ("method nearest has no use for `grid`",),
    ),
    "a method that there is not": (
        RTN,
        "quantize.method=gptq",
        ("quantize.method", "got 'gptq'"),
    ),
    "a keep that matches nothing": (
        RTN,
        "quantize.keep='*.mlp.dwon_proj.weight'",
        ("*.mlp.dwon_proj.weight matches no weight", "did you mean 'mlp.down_proj.weight'?"),
    ),
    "one of two that engines fuse": (
        RTN,
        "quantize.keep+='*.layers.1.mlp.up_proj.weight'",
        ("layers.1.mlp.gate_proj", "are quantized and some are not", "mlp.gate_up_proj"),
    ),
    "too narrow a linear": (
        RTN,
        "quantize.keep='*.mlp.*.weight'",
        (
            "module model.language_model.layers.0.linear_attn.in_proj_",
            "8 does not divide the 4 outputs",
            "among `keep`",
        ),
    ),
    "a count of what is left that is not met": (
        MERGE,
        "quantize.grid.leave.expect=15",
        ("recipes/int4-bf16-mtp.yaml:", "mtp.* matches 29 tensors; expected 15"),
    ),
    "nothing to leave": (
        MERGE,
        "quantize.grid.leave.match='mpt.*'",
        ("mpt.* matches no tensor of the grid's source",),
    ),
    "a group size that is not the grid's": (
        MERGE,
        "quantize.group_size=64",
        (f"demo/{GRID}", "the grid's group_size is 128; expected 64"),
    ),
    "an attention that tuning does not have": (
        TUNE,
        "calibration.attention=eager",
        ("method tune cannot use calibration.attention eager; expected sdpa",),
    ),
    "no iteration": (TUNE, "quantize.tune.iters=0", ("quantize.tune.iters", "got 0")),
}


@pytest.mark.parametrize("what", OVERRIDES)
def test_a_wrong_knob_is_refused(project: Project, carnice: Carnice, what: str) -> None:
    """A plan stops before any work, with one line that says what does not fit."""
    variant, override, words = OVERRIDES[what]

    check_refused_at_once(carnice("build", variant, "--set", override), project, *words)


def test_samples_of_several_lengths_cannot_share_a_batch(
    project: Project, carnice: Carnice
) -> None:
    """Rows that are not joined have lengths of their own; the line names the layer."""
    changes = (*QUICK, "calibration.joined=false", "calibration.length=900")
    settings = [part for item in changes for part in ("--set", item)]

    check_refused(
        carnice("build", TUNE, *settings), project, "samples of 474 to 497 tokens", "batch_size 1"
    )


# --- grids and bases -----------------------------------------------------------------------------


def grid_of(project: Project) -> Path:
    return project.root / "demo" / GRID


def state(key: str, value: Any) -> Callable[[Project], None]:
    """The grid's config says something else."""

    def change(project: Project) -> None:
        path = grid_of(project) / "config.json"
        config = read_json(path)
        config["quantization_config"][key] = value
        write_json(path, config)

    return change


def forget_quantization(project: Project) -> None:
    path = grid_of(project) / "config.json"
    config = read_json(path)
    del config["quantization_config"]
    write_json(path, config)


def reshape_codes(project: Project) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        old = tensors[f"{UP}.qweight"]
        tensors[f"{UP}.qweight"] = Tensor(old.dtype, old.shape[::-1], old.data)

    rewrite(grid_of(project), change)


def lose_scales(project: Project) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        del tensors[f"{UP}.scales"]

    rewrite(grid_of(project), change)


def lose_template(project: Project) -> None:
    (project.checkpoint / "chat_template.jinja").unlink()


def patch_template(project: Project) -> None:
    path = project.checkpoint / "chat_template.jinja"
    path.write_text(to_hermes(path.read_text(encoding="utf-8"), path.name), encoding="utf-8")


def cut_template(project: Project) -> None:
    path = project.checkpoint / "chat_template.jinja"
    path.write_text("{% for m in messages %}{{ m.content }}{% endfor %}", encoding="utf-8")


AT_ONCE: dict[str, tuple[Callable[[Project], None], tuple[str, ...]]] = {
    "a grid of other bits": (state("bits", 8), (GRID, "the grid's bits is 8; expected 4")),
    "a grid that is not symmetric": (
        state("sym", False),
        (GRID, "the grid's sym is False; expected True"),
    ),
    "a grid of other groups": (
        state("group_size", 32),
        (GRID, "the grid's group_size is 32; expected 128"),
    ),
    "a grid that is packed otherwise": (
        state("packing_format", "auto_round:auto_awq"),
        (GRID, "packing_format is 'auto_round:auto_awq'", "expected auto_round:auto_gptq"),
    ),
    "a grid that is none": (forget_quantization, (GRID, "is not quantized")),
    "codes of another shape": (
        reshape_codes,
        (f"module {UP}", "qweight of the grid is I32 [512, 16]", "expected I32 [16, 512]"),
    ),
    "a grid without scales": (lose_scales, (f"source 'grid' has no '{UP}.scales'",)),
    "no template": (lose_template, ("there is no chat template to patch",)),
    "a template that is patched already": (patch_template, ("chat_template.jinja", "already")),
    "a template without tools": (cut_template, ("chat_template.jinja",)),
}


@pytest.mark.parametrize("what", AT_ONCE)
def test_a_wrong_source_is_refused(project: Project, carnice: Carnice, what: str) -> None:
    """What config, headers and template show ends the build before any work."""
    change, words = AT_ONCE[what]
    change(project)

    check_refused_at_once(carnice("build", MERGE), project, *words)


def shuffle_base(project: Project) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        name = f"{UP}.weight"
        values = np.frombuffer(tensors[name].data, np.uint16)
        shuffled = np.random.default_rng(0).permutation(values)
        tensors[name] = Tensor("BF16", tensors[name].shape, shuffled.tobytes())

    rewrite(project.base, change)


def nudge_base(project: Project) -> None:
    """One weight is far from its code."""
    poke(project.base, f"{UP}.weight", bf16(np.array([4.0], np.float32)))


def take_fine_tune_for_base(project: Project) -> None:
    """Every linear of the base is the fine-tune's."""
    tuned = read_safetensors(project.checkpoint / "model.safetensors")

    def change(tensors: dict[str, Tensor]) -> None:
        for name in tensors:
            tensors[name] = tuned.get(misprefixed(name), tensors[name])

    rewrite(project.base, change)


def scale(value: float) -> Callable[[Project], None]:
    def change(project: Project) -> None:
        poke(grid_of(project), f"{UP}.scales", np.float16(value).tobytes())

    return change


def move_zero_points(project: Project) -> None:
    poke(grid_of(project), f"{UP}.qzeros", np.int32(0x77777778).tobytes())


WITH_WORK: dict[str, tuple[Callable[[Project], None], tuple[str, ...]]] = {
    "a base whose weights are shuffled": (
        shuffle_base,
        (f"tensor '{UP}.weight' is not what the grid was made from", "up to 15.00 steps"),
    ),
    "a base with one weight that is another": (
        nudge_base,
        (f"tensor '{UP}.weight' is not what the grid was made from: 1 of its 65536 weights",),
    ),
    "the fine-tune as the base": (
        take_fine_tune_for_base,
        (".weight' is not what the grid was made from", "further than a step"),
    ),
    "a scale of zero": (scale(0), (f"'{UP}.scales' has 1 scales that are zero or not finite",)),
    "a scale that is infinite": (scale(np.inf), (f"{UP}.scales'",)),
    "a scale that is NaN": (scale(np.nan), (f"{UP}.scales'",)),
    "zero points of an asymmetric grid": (
        move_zero_points,
        (f"'{UP}.qzeros' has zero points other than 8; expected a symmetric grid",),
    ),
}


@pytest.mark.parametrize("what", WITH_WORK)
def test_a_grid_or_base_that_does_not_fit_is_refused(
    project: Project, carnice: Carnice, what: str
) -> None:
    """What only the numbers show ends the build with one line that names the tensor."""
    change, words = WITH_WORK[what]
    change(project)

    check_refused(carnice("build", MERGE), project, *words)
    check_refused(carnice("build", MERGE), project, *words)


@pytest.mark.parametrize("variant", [RTN, TUNE])
def test_weights_that_are_not_finite_are_named(
    project: Project, carnice: Carnice, variant: str
) -> None:
    """NaN in a weight is no rounding error."""
    poke(project.checkpoint, misprefixed(f"{UP}.weight"), bf16(np.array([np.nan], np.float32)))
    settings = [part for item in QUICK for part in ("--set", item)] if variant == TUNE else []

    check_refused(carnice("build", variant, *settings), project, "layers.1.")


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (1e24, "holds a number so large that the scale of its group does not fit F16"),
        (-np.inf, "holds NaN or infinity at element 1"),
    ],
)
def test_a_number_too_large_for_its_scale_is_not_called_infinite(
    project: Project, carnice: Carnice, number: float, words: str
) -> None:
    """Rounding to nearest refuses it by what it is, and does not say that zeros would help."""
    poke(project.checkpoint, misprefixed(f"{UP}.weight"), bf16(np.array([1, number], np.float32)))
    finished = carnice("build", RTN)

    check_refused(finished, project, UP, words)
    assert ("nonfinite" in finished.err) == (not np.isfinite(number))


def test_a_number_that_the_plain_type_cannot_hold_is_refused(
    project: Project, carnice: Carnice
) -> None:
    """What BF16 holds and F16 does not never goes out as infinity."""
    norm = LAYER(1) + "input_layernorm.weight"
    poke(project.checkpoint, misprefixed(norm), bf16(np.array([1e30], np.float32)))
    finished = carnice("build", RTN, "--set", "quantize.plain=float16")

    check_refused(finished, project, f"{norm}' holds a number beyond those of F16 at element 0")
