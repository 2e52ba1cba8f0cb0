"""What every step must do, whichever it is; `samples.STEPS` says how recipes ask for each."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from typing import Any

import pytest
import yaml
from conftest import REPOSITORY, TinyCheckpoint
from pydantic import ValidationError
from quantizing import quantize
from samples import STEPS as SAMPLES

from carnice_build.commands.options import Options
from carnice_build.commands.plan import plan_variants
from carnice_build.graph import View
from carnice_build.planning.vocabulary import vocabulary
from carnice_build.recipe.schema import json_schema
from carnice_build.steps.base import PlanContext
from carnice_build.steps.registry import STEPS
from carnice_build.tensors import SourceTensor

Files = Mapping[str, bytes]


def test_every_step_has_a_sample() -> None:
    """What the tests below say of all steps, they try on each of them."""
    lacking = set(STEPS) - set(SAMPLES)

    assert not lacking, (
        f"add to STEPS in tests/samples.py the `steps` of a recipe with {', '.join(lacking)}"
    )


def recipe(kind: str) -> Mapping[str, Any]:
    """A recipe with the sample of a step."""
    return {
        "variant": kind,
        "description": f"A model after the step {kind}",
        "sources": {name: {"model": f"owner/{name}"} for name in _sources(kind)},
        "steps": SAMPLES[kind],
        "quantize": {"format": "autoround", "method": "nearest", "group_size": 64},
    }


def _sources(kind: str) -> tuple[str, ...]:
    """The checkpoints that the recipe of a step is made from."""
    return ("quantized",) if STEPS[kind].decodes else ("body", "base")


@pytest.fixture(scope="module")
def options(tiny_checkpoint: TinyCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Options:
    """Where there is a recipe for each step, of tiny checkpoints."""
    root = tmp_path_factory.mktemp("steps")
    for name, mtp in (("body", False), ("base", True), ("quantized", True)):
        folder = tiny_checkpoint(root / name, mtp=mtp)
        shutil.copy(REPOSITORY / "demo" / "chat_template.jinja", folder)
    (root / "recipes").mkdir()
    quantize(root / "quantized", "fp8", lambda module: module.endswith(".down_proj"))
    profiles = {"demo": {f"owner/{name}": name for name in ("body", "base", "quantized")}}
    (root / "recipes" / "_profiles.yaml").write_text(yaml.safe_dump(profiles))
    for kind in SAMPLES:
        (root / "recipes" / f"{kind}.yaml").write_text(yaml.safe_dump(recipe(kind)))
    return Options(recipes=root / "recipes", cache=root / "cache", out=root / "build")


@pytest.mark.parametrize("kind", SAMPLES)
def test_a_step_moves_no_byte(kind: str, options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a step the graph has no action that was not there, and all tensors are sources'; what
    changes are names, or the files beside the weights."""
    model = STEPS[kind]
    apply, edit = model.apply, model.edit
    graphs, origins, changed = [], [], []

    def applied(step: Any, view: View, context: PlanContext) -> View:
        before = list(context.graph)
        after = apply(step, view, context)
        graphs.append((before, list(context.graph)))
        origins.extend(ref.origin for ref in after.values())
        changed.append(list(view) != list(after))
        return after

    def edited(step: Any, files: Files, context: PlanContext) -> Files:
        after = edit(step, files, context)
        changed.append(dict(files) != dict(after))
        return after

    monkeypatch.setattr(model, "apply", applied)
    monkeypatch.setattr(model, "edit", edited)
    plan_variants([kind], options)

    assert all(before == after for before, after in graphs)
    assert all(isinstance(origin, SourceTensor) for origin in origins)
    assert any(changed)


@pytest.mark.parametrize("kind", SAMPLES)
def test_a_step_refuses_what_it_does_not_know(kind: str) -> None:
    """A key with a slip in it is an error, and never a step that does something else."""
    for step in SAMPLES[kind]:
        for name, params in step.items():
            with pytest.raises(ValidationError, match="Extra inputs"):
                STEPS[name].model_validate({**params, "nonsense": 1})


@pytest.mark.parametrize("kind", SAMPLES)
def test_an_editor_accepts_what_a_recipe_says(kind: str) -> None:
    """The JSON Schema fits the sample as it is written, and with every default written out."""
    validator = pytest.importorskip("jsonschema").Draft202012Validator(json_schema(vocabulary()))
    whole = [
        {name: STEPS[name].model_validate(params).model_dump(mode="json", by_alias=True)}
        for step in SAMPLES[kind]
        for name, params in step.items()
    ]

    for steps in (SAMPLES[kind], whole):
        errors = validator.iter_errors({**recipe(kind), "steps": steps})
        assert [] == [error.message for error in errors]
    for step in whole:
        for name, params in step.items():
            again = STEPS[name].model_validate(params).model_dump(mode="json", by_alias=True)
            assert params == again
