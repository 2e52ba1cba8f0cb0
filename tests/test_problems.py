"""An error points: at all that is wrong, and at what helps."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Finished, Project
from test_bad_input import check_refused_at_once
from tiny import Tensor, read_json, read_safetensors, write_json, write_safetensors

from carnice_build.commands.plan import plan_variants
from carnice_build.errors import MOST_LISTED, CarniceError, PlanError, RecipeError, together

Carnice = Callable[..., Finished]

VARIANT = "qwen"
RECIPE = """\
extends: [_base/carnice-text.yaml, preset:mlx-4bit]
variant: qwen
description: The base, which is one file under its proper names.
sources: {body: {model: Qwen/Qwen3.6-27B}}
quantize: {bits: 4}
"""
BODY = "model.language_model."
LAYER = BODY + "layers.{}.{}"


@pytest.fixture
def one(project: Project) -> Project:
    """A project with a recipe for the checkpoint that is one file."""
    project.recipe(VARIANT, RECIPE)
    return project


def change(project: Project, edit: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors of the base."""
    path = project.base / "model.safetensors"
    tensors = read_safetensors(path)
    edit(tensors)
    write_safetensors(path, tensors)


def add(*names: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update(dict.fromkeys(names, Tensor("F32", (2,), bytes(8))))


# --- the model type ------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["gptx", "qwen3_6", "qwen4", ""])
def test_another_family_is_not_to_be_relabelled(
    one: Project, carnice: Carnice, model_type: str
) -> None:
    """The error says how to see those that are known and how to add one, and suggests no name."""
    config = read_json(one.base / "config.json")
    write_json(one.base / "config.json", {**config, "model_type": model_type})
    finished = carnice("plan", VARIANT)

    check_refused_at_once(
        finished,
        one,
        f"unknown model_type '{model_type}'",
        "one of a family that has a table here",
        "(`carnice family --list` shows all)",
        "docs/adding-a-family.md",
    )
    assert "did you mean" not in finished.err


def test_a_config_without_a_type_is_told(one: Project, carnice: Carnice) -> None:
    """It is no model type called None."""
    config = read_json(one.base / "config.json")
    del config["model_type"]
    write_json(one.base / "config.json", config)

    check_refused_at_once(carnice("plan", VARIANT), one, "has no model_type; expected one of a")


# --- tensors that the model has not --------------------------------------------------------------

EXTRAS: dict[str, tuple[str, ...]] = {
    "rotary frequencies": (
        LAYER.format(3, "self_attn.rotary_emb.inv_freq"),
        LAYER.format(7, "self_attn.rotary_emb.inv_freq"),
        BODY + "rotary_emb.inv_freq",
    ),
    "one of them": (LAYER.format(3, "self_attn.rotary_emb.inv_freq"),),
    "one without a prefix": ("inv_freq", "rotary_emb.inv_freq"),
    "Transformer Engine's": (
        LAYER.format(0, "_extra_state"),
        LAYER.format(1, "mlp.up_proj._extra_state"),
        "_extra_state",
    ),
    "caches": (LAYER.format(3, "self_attn.rotary_emb.cos_cached"),),
    "several kinds": (
        LAYER.format(3, "self_attn.rotary_emb.cos_cached"),
        LAYER.format(3, "self_attn.rotary_emb.sin_cached"),
        LAYER.format(3, "self_attn.rotary_emb.inv_freq"),
        LAYER.format(2, "linear_attn._extra_state"),
        "model.embeddings.position_ids",
    ),
}


@pytest.mark.parametrize("what", EXTRAS)
def test_the_step_that_leaves_buffers_out_is_named(
    one: Project, carnice: Carnice, what: str
) -> None:
    """Put into the recipe as they are, the steps leave out all that was too much, and no more."""
    expected = list(plan_variants([VARIANT], one.options()).variants[0].view)
    change(one, add(*EXTRAS[what]))
    finished = carnice("plan", VARIANT)
    steps = re.findall(r"`(- drop: .*?)`", finished.err)

    assert 2 == finished.code
    assert len({name.rpartition(".")[2] for name in EXTRAS[what]}) == len(steps)
    one.recipe(VARIANT, RECIPE + "steps+:\n" + "".join(f"  {step}\n" for step in steps))
    assert expected == list(plan_variants([VARIANT], one.options()).variants[0].view)


def test_tensors_of_a_kind_are_one_line(one: Project, carnice: Carnice) -> None:
    """Buffers of every layer do not hide the tensor that is misspelt."""
    buffers = [LAYER.format(layer, "self_attn.rotary_emb.inv_freq") for layer in range(8)]
    change(one, add(*buffers, "lm_haed.weight"))
    finished = carnice("plan", VARIANT)

    check_refused_at_once(
        finished,
        one,
        "9 tensors are not of qwen3_5",
        "and 7 more like it are not one of qwen3_5",
        "'lm_haed.weight' is not one of qwen3_5; did you mean 'lm_head.weight'?",
    )
    assert 3 == len(finished.err.splitlines())


def test_an_adapter_within_the_weights_is_to_be_merged(one: Project, carnice: Carnice) -> None:
    """Weights that peft saved unmerged are told by what helps, and not layer by layer."""
    parts = ("lora_A.default.weight", "lora_B.default.weight", "base_layer.weight")
    change(one, add(*(LAYER.format(3, f"mlp.up_proj.{part}") for part in parts)))
    finished = carnice("plan", VARIANT)

    check_refused_at_once(finished, one, "and 2 more like it", "merge_and_unload")
    assert 1 == len(finished.err.splitlines())


def test_weights_that_a_model_has_not_are_not_to_be_dropped(one: Project, carnice: Carnice) -> None:
    """A bias may matter: no step is suggested that would silently change the model."""
    change(one, add(LAYER.format(3, "self_attn.q_proj.bias")))
    finished = carnice("plan", VARIANT)

    check_refused_at_once(finished, one, "self_attn.q_proj.bias' is not one of qwen3_5")
    assert "drop" not in finished.err


# --- several problems ----------------------------------------------------------------------------


def lose_layer(tensors: dict[str, Tensor]) -> None:
    for name in [name for name in tensors if ".layers.2." in name]:
        del tensors[name]


def test_all_missing_tensors_are_told(one: Project, carnice: Carnice) -> None:
    """A headline with the count, five names, and how many more."""
    change(one, lose_layer)
    finished = carnice("plan", VARIANT)
    headline, *lines = finished.err.splitlines()

    assert (2, "carnice: demo/qwen3.6-27b: 14 tensors are missing") == (finished.code, headline)
    assert [True] * 5 == ["is missing; did you mean" in line for line in lines[:5]]
    assert ["  and 9 more"] == lines[5:]


def test_all_tensors_of_a_wrong_shape_are_told(one: Project, carnice: Carnice) -> None:
    """Each with its shape and that of its config."""
    config = read_json(one.base / "config.json")
    config["text_config"]["vocab_size"] = 257
    write_json(one.base / "config.json", config)
    finished = carnice("plan", VARIANT)

    check_refused_at_once(
        finished,
        one,
        "2 tensors are of other shapes than its config says",
        "'lm_head.weight' is of shape [256, 128]; expected [257, 128] by its config",
        "embed_tokens.weight' is of shape [256, 128]; expected [257, 128]",
    )


WRONG = """\
extends: [_base/carnice-text.yaml, preset:mlx-4bit]
variant: wrong
description: x
packge: {shard: 5GB}
steps:
  - drpo: {match: x}
  - drop: {mtach: x}
  - rename: {from: '(', to: x}
  - drop: {match: x}
quantize: {bits: 7, grup_size: 64}
"""


def test_all_that_is_wrong_with_a_recipe_is_told(project: Project, carnice: Carnice) -> None:
    """Every line has a file, a line and a column of its own; the headline has the count."""
    project.recipe("wrong", WRONG)
    finished = carnice("plan", "wrong")
    headline, *lines = finished.err.splitlines()

    assert (2, "carnice: recipes/wrong.yaml: 6 things are wrong") == (finished.code, headline)
    assert [
        "recipes/wrong.yaml:4:9: unknown key 'packge'; did you mean 'package'?",
        "recipes/wrong.yaml:6:5: unknown step 'drpo'",
        "recipes/wrong.yaml:7:19: unknown key 'steps.1.drop.mtach'; did you mean 'match'?",
        "recipes/wrong.yaml:8:20: steps.2.rename.from: 're:(' is not a valid pattern",
        "recipes/wrong.yaml:10:32: unknown key 'quantize.grup_size'; did you mean 'group_size'?",
    ] == [line.strip().partition("; expected")[0].partition(": missing )")[0] for line in lines[:5]]
    assert ["  and 1 more"] == lines[5:]


def test_a_misspelt_key_is_told_once(project: Project, carnice: Carnice) -> None:
    """That the key which was meant is missing goes without saying; another one does not."""
    project.recipe("once", "variant: once\ndescription: x\nsource: {}\nquantize: {format: mlx}\n")
    finished = carnice("plan", "once")

    check_refused_at_once(
        finished,
        project,
        "recipes/once.yaml: 2 things are wrong",
        "once.yaml:3:9: unknown key 'source'; did you mean 'sources'?",
        "once.yaml:4:11: quantize.bits is missing",
    )
    assert "sources is missing" not in finished.err


def test_a_value_that_fits_no_branch_is_told_once(project: Project, carnice: Carnice) -> None:
    """The ways in which one value is wrong are one problem."""
    project.recipe("union", RECIPE.replace("qwen\n", "union\n") + "steps+: [{drop: {match: 7}}]\n")
    finished = carnice("plan", "union")

    check_refused_at_once(finished, project, "recipes/union.yaml:6:25: steps.", "(got 7)")
    assert 1 == len(finished.err.splitlines())


def test_a_great_many_problems_are_counted(project: Project, carnice: Carnice) -> None:
    """A recipe that is wrong everywhere takes no longer to refuse."""
    keys = "".join(f"key{number}: x\n" for number in range(5_000))
    project.recipe("many", RECIPE.replace("qwen\n", "many\n") + keys)
    finished = carnice("plan", "many")

    check_refused_at_once(finished, project, "5000 things are wrong", "and 4995 more")
    assert 2 + MOST_LISTED == len(finished.err.splitlines())


def lines_of(error: CarniceError) -> list[str]:
    return str(error).splitlines()


def test_one_problem_stays_one_sentence() -> None:
    """A headline above a single line would only hide it."""
    error = together([7], lambda item: PlanError(f"is {item}", where="a:1"), "counts", "a")

    assert ["a:1: is 7"] == lines_of(error)


def test_a_line_does_not_repeat_the_place() -> None:
    """What the headline says is not said again; another place is."""
    places = ["a", "b", "a"]
    error = together(places, lambda place: PlanError("is wrong", where=place), "fails", "a")

    assert ["a: fails", "  is wrong", "  b: is wrong", "  is wrong"] == lines_of(error)


def test_problems_are_kept_across_processes() -> None:
    """An error that a worker raised says the same here."""
    error = RecipeError("is wrong", where="a", problems=["one", "two"])
    again = pickle.loads(pickle.dumps(error))

    assert (RecipeError, str(error)) == (type(again), str(again))
    assert ["a: is wrong", "  one", "  two"] == lines_of(again)


def test_a_problem_is_one_line_whatever_it_holds(tmp_path: Path) -> None:
    """A file's own words can neither begin a line nor drive the terminal."""
    error = PlanError("is wrong", problems=["a\ncarnice: all is well", "\x1b[2J"])

    assert ["is wrong", r"  a\ncarnice: all is well", r"  \x1b[2J"] == lines_of(error)
