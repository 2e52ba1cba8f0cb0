"""Step `graft`: tensors of another source, as many as must be and of the right size."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY, Finished, Project
from test_bad_input import check_refused_at_once
from tiny import (
    Tensor,
    read_all_tensors,
    read_json,
    read_safetensors,
    write_json,
    write_safetensors,
    write_tiny,
)

from carnice_build.commands.build import build_variants
from carnice_build.commands.options import Options
from carnice_build.commands.plan import plan_variants
from carnice_build.planning.planner import VariantPlan

Carnice = Callable[..., Finished]

HEAD = """\
extends: _base/carnice-text.yaml
variant: grafted
description: x
sources:
  base: {model: Qwen/Qwen3.6-27B}
quantize: {format: mlx, bits: 4}
"""
MTP = "  - graft: {from: base, match: 'mtp.*', expect: 15}\n"


@pytest.fixture
def project(project: Project) -> Project:
    """The body's config announces the MTP head that its files lack, as Carnice's does."""
    path = project.checkpoint / "config.json"
    config = read_json(path)
    config["text_config"]["mtp_num_hidden_layers"] = 1
    write_json(path, config)
    return project


def recipe(project: Project, *steps: str) -> None:
    project.recipe("grafted", f"{HEAD}steps+:\n{''.join(steps)}")


def plan(variant: str, **changes: Any) -> VariantPlan:
    options = Options(**{"recipes": REPOSITORY / "recipes", "profile": "shapes", **changes})
    return plan_variants([variant], options).variants[0]


# --- what it does --------------------------------------------------------------------------------


def test_the_real_mtp_head_has_15_tensors_and_the_vision_tower_333() -> None:
    """At full size the recipe's counts hold, and the variant is 851 tensors of the source."""
    planned = plan("nvfp4-text-mtp")
    facts = {tensor.fact.name for tensor in planned.conversion.tensors}
    mtp = sum(name.startswith("mtp.") for name in facts)
    vision = sum(
        name.startswith("model.visual.") for name in planned.sources["base"].checkpoint.tensors
    )

    assert (15, 333) == (mtp, vision)
    assert 1184 - 333 + 15 == len(facts)


@pytest.mark.parametrize(
    ("overrides", "gigabytes"),
    [
        ((), 19.67),
        (("quantize.defaults=modelopt-0.43", "quantize.keep=mtp.*"), 19.64),
    ],
)
def test_sizes_are_those_of_the_cards(overrides: tuple[str, ...], gigabytes: float) -> None:
    """Either list of exceptions gives the size that the published card of its version states."""
    planned = plan("nvfp4-text-mtp", overrides=overrides)

    assert gigabytes == round(planned.weights_bytes / 1e9, 2)


def test_replacing_takes_the_place_of_the_bodys_own(project: Project) -> None:
    """With `replace`, exactly the tensors that match change, to those of the other source."""
    plain = project.options(out=project.root / "plain")
    build_variants(["mlx-4bit"], plain)
    recipe(project, "  - graft: {from: base, match: '*.linear_attn.A_log', replace: true}\n")
    build_variants(["grafted"], project.options())
    before = read_all_tensors(plain.out / "mlx-4bit")
    after = read_all_tensors(project.out / "grafted")
    base = read_all_tensors(project.base)
    changed = [name for name in before if before[name] != after[name]]

    assert 6 == len(changed)
    assert [
        base[name.replace("language_model.model.", "model.language_model.")] for name in changed
    ] == [after[name] for name in changed]


def test_the_order_of_steps_counts(project: Project, carnice: Carnice) -> None:
    """A drop behind a graft sees what was grafted; one before it does not."""
    drop = "  - drop: {match: 'mtp.*'}\n"
    recipe(project, MTP, drop)
    assert carnice("plan", "grafted").code == 0

    recipe(project, drop, MTP)
    check_refused_at_once(carnice("build", "grafted"), project, "mtp.* matches no tensor")


def test_a_count_by_profile_is_derived_for_another_checkpoint(
    project: Project, carnice: Carnice, tmp_path: Path
) -> None:
    """A count for another profile does not hold here; the config's own count does."""
    recipe(project, MTP.replace("15", "{full: 99}"))
    assert carnice("plan", "grafted").code == 0

    recipe(project, MTP.replace("15", "{demo: 99}"))
    check_refused_at_once(
        carnice("plan", "grafted"),
        project,
        "mtp.* matches 15 tensors; expected 99 for profile demo",
    )


def test_a_recipe_may_extend_several(project: Project) -> None:
    """The last of a list has precedence, and lists that are appended to keep their order."""
    project.recipe("_one", "description: one\ncard: {license: mit, language: [en]}\n")
    project.recipe("_two", "description: two\ncard: {license: apache-2.0, language+: [zh]}\n")
    project.recipe(
        "several",
        "extends: [_base/carnice-text.yaml, preset:mlx-4bit, _one.yaml, _two.yaml]\n"
        "variant: several\n",
    )
    (planned,) = plan_variants(["several"], project.options()).variants

    assert "two" == planned.recipe.description
    assert "apache-2.0" == planned.recipe.card.license


# --- what it refuses -----------------------------------------------------------------------------


def rewrite(project: Project, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors of the base."""
    path = project.base / "model.safetensors"
    tensors = read_safetensors(path)
    change(tensors)
    write_safetensors(path, tensors)


@pytest.mark.parametrize(
    ("option", "size", "words"),
    [
        ("hidden", 256, ("hidden_size is 256; expected 128, as the body's",)),
        ("vocabulary", 512, ("vocab_size is 512; expected 256, as the body's",)),
    ],
)
def test_a_source_of_another_size_is_refused(
    project: Project, carnice: Carnice, option: str, size: int, words: tuple[str, ...]
) -> None:
    """A head for another vocabulary may fit by its shapes, and is refused all the same."""
    recipe(project, MTP)
    other = write_tiny(project.root / "other", layers=2, **{option: size})

    check_refused_at_once(
        carnice("build", "grafted", "--source", f"base={other}"), project, str(other), *words
    )


def lose(tensors: dict[str, Tensor]) -> None:
    del tensors["mtp.fc.weight"]


def add(tensors: dict[str, Tensor]) -> None:
    tensors["mtp.fc.bias"] = tensors["mtp.norm.weight"]


def reshape(tensors: dict[str, Tensor]) -> None:
    old = tensors["mtp.fc.weight"]
    tensors["mtp.fc.weight"] = Tensor(old.dtype, old.shape[::-1], old.data)


def other_name(tensors: dict[str, Tensor]) -> None:
    tensors["mtp.fc.bias"] = tensors.pop("mtp.norm.weight")


WRONG_HEADS = {
    "a tensor less": (lose, ", expect: 15", "mtp.* matches 14 tensors; expected 15"),
    "a tensor less, uncounted": (lose, "", "tensor 'mtp.fc.weight' is missing"),
    "a tensor more": (add, ", expect: 15", "mtp.* matches 16 tensors; expected 15"),
    "a tensor more, uncounted": (add, "", "tensor 'mtp.fc.bias' is not one of qwen3_5"),
    "one of another shape": (reshape, ", expect: 15", "'mtp.fc.weight' is of shape [256, 128]"),
    "one of another name": (other_name, ", expect: 15", "tensor 'mtp.fc.bias' is not one of"),
}


@pytest.mark.parametrize("what", WRONG_HEADS)
def test_an_mtp_head_that_is_not_whole_is_refused(
    project: Project, carnice: Carnice, what: str
) -> None:
    """Counted or not, what is grafted must be the head that the body's config calls for."""
    change, expect, words = WRONG_HEADS[what]
    rewrite(project, change)
    recipe(project, MTP.replace(", expect: 15", expect))

    check_refused_at_once(carnice("build", "grafted"), project, words)


WRONG_STEPS = {
    "an unknown source": (
        "{from: bsae, match: 'mtp.*'}",
        (
            "recipes/grafted.yaml:8:",
            "no source 'bsae'",
            "expected body or base",
            "did you mean 'base'?",
        ),
    ),
    "a pattern that matches nothing": (
        "{from: base, match: 'mpt.*'}",
        ("recipes/grafted.yaml:8:", "mpt.* matches no tensor of the source"),
    ),
    "one of two patterns that matches nothing": (
        "{from: base, match: ['mtp.*', 'mtp.cf.weight']}",
        ("mtp.cf.weight matches no tensor", "did you mean 'mtp.fc.weight'?"),
    ),
    "tensors that are there already": (
        "{from: base, match: '*.A_log'}",
        ("recipes/grafted.yaml:8:", "A_log' is there already; expected replace: true"),
    ),
    "no pattern": ("{from: base}", ("recipes/grafted.yaml:8:", "steps.4.graft.match is missing")),
    "no source": ("{match: 'mtp.*'}", ("recipes/grafted.yaml:8:", "graft.from is missing")),
    "an empty list": ("{from: base, match: []}", ("recipes/grafted.yaml:8:", "graft.match")),
    "an unknown key": (
        "{from: base, match: 'mtp.*', replcae: true}",
        ("recipes/grafted.yaml:8:", "unknown key", "did you mean 'replace'?"),
    ),
}


@pytest.mark.parametrize("what", WRONG_STEPS)
def test_a_wrong_step_is_refused(project: Project, carnice: Carnice, what: str) -> None:
    """The line says where in the recipe, what is wrong, and the nearest valid name."""
    step, words = WRONG_STEPS[what]
    recipe(project, f"  - graft: {step}\n")

    check_refused_at_once(carnice("build", "grafted"), project, *words)


def test_a_quantized_source_is_not_grafted_from(project: Project, carnice: Carnice) -> None:
    """Its tensors are codes, and those that say what they mean would be left behind."""

    def pack(tensors: dict[str, Tensor]) -> None:
        tensors["mtp.fc.qweight"] = tensors.pop("mtp.fc.weight")

    rewrite(project, pack)
    config = read_json(project.base / "config.json")
    write_json(
        project.base / "config.json", config | {"quantization_config": {"quant_method": "awq"}}
    )
    recipe(project, MTP)

    check_refused_at_once(
        carnice("build", "grafted"), project, "is quantized, so that its tensors are codes"
    )
