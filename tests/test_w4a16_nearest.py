"""W4A16 rounded to nearest: the library's bits without the library, and which knobs go with it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from calibrating import make_project
from conftest import Finished, Project
from demo_model import ARCHITECTURE, BASE, whole_model
from oneshot import IGNORE, WEIGHTS
from test_bad_input import check_refused_at_once
from tiny import Tensor, read_all_tensors, read_json

from carnice_build.commands.build import build_variants
from carnice_build.commands.options import Options
from carnice_build.commands.plan import plan_variants
from carnice_build.commands.verify import VerifySettings, verify_variants
from carnice_build.formats.compressed_tensors.format import CompressedFormat
from carnice_build.formats.compressed_tensors.ops import SUFFIXES, GroupQuantize
from carnice_build.verification.result import Outcome

pytest_plugins = ["calibrating"]

Carnice = Callable[..., Finished]

AWQ, NEAREST = "w4a16-awq", "w4a16-rtn"

# --- the library ---------------------------------------------------------------------------------

OBSERVERS = {"mse": "memoryless_mse", "memoryless_minmax": "memoryless_minmax"}
"""Each as `oneshot` has it, and by the name under which `model_free_ptq` finds the same."""

RECIPE = """
extends: w4a16-rtn.yaml
variant: {variant}
description: The whole Qwen stand-in, rounded to nearest
sources: {{body: {{model: Qwen/Qwen3.6-27B}}}}
steps: []
quantize: {{config_groups: {{group_0: {{weights: {{observer: {variant}}}}}}}}}
"""


@dataclass(frozen=True)
class Parity:
    """Our folders, `oneshot`'s and `model_free_ptq`'s, by the observer."""

    ours: dict[str, Path]
    oneshot: dict[str, Path]
    model_free: dict[str, Path]


@pytest.fixture(scope="module")
def parity(tmp_path_factory: pytest.TempPathFactory) -> Parity:
    """The demo's base by both observers, three times."""
    project = make_project(tmp_path_factory.mktemp("nearest") / "project")
    for observer in OBSERVERS:
        project.recipe(observer, RECIPE.format(variant=observer))
    (project.recipes / "_profiles.yaml").write_text("demo:\n  Qwen/Qwen3.6-27B: whole\n")
    (project.root / "whole").symlink_to(BASE)
    build_variants(list(OBSERVERS), project.options())
    places = (project.out, project.root / "oneshot", project.root / "model-free")
    found = Parity(*({observer: place / observer for observer in OBSERVERS} for place in places))
    for observer, name in OBSERVERS.items():
        _run_oneshot(observer, found.oneshot[observer])
        _run_model_free(name, found.model_free[observer])
    return found


def _group(observer: str) -> dict[str, object]:
    return {"targets": ["Linear"], "weights": {**WEIGHTS, "observer": observer}}


def _run_oneshot(observer: str, folder: Path) -> None:
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier

    model = whole_model("bfloat16", "eager")
    groups = {"group_0": _group(observer)}
    oneshot(model=model, recipe=[QuantizationModifier(config_groups=groups, ignore=IGNORE)])
    model.save_pretrained(folder, save_compressed=True)


def _run_model_free(observer: str, folder: Path) -> None:
    from compressed_tensors.quantization import QuantizationScheme
    from llmcompressor import model_free_ptq

    scheme = QuantizationScheme.model_validate(_group(observer))
    model_free_ptq(BASE, folder, scheme=scheme, ignore=IGNORE)


def _canonical(name: str) -> str:
    plain = name.startswith(("model.layers.", "model.embed_tokens.", "model.norm."))
    return name.replace("model.", "model.language_model.", 1) if plain else name


def _written(folder: Path) -> dict[str, Tensor]:
    return {_canonical(name): tensor for name, tensor in read_all_tensors(folder).items()}


@pytest.mark.parametrize("observer", OBSERVERS)
def test_the_weights_are_those_of_model_free_ptq(parity: Parity, observer: str) -> None:
    """Packed, plain, MTP head and vision tower: every tensor, and no other."""
    ours, theirs = (
        read_all_tensors(folders[observer]) for folders in (parity.ours, parity.model_free)
    )

    assert 32 * len(SUFFIXES) == sum(name.endswith(SUFFIXES) for name in ours)
    assert theirs == ours


@pytest.mark.parametrize("observer", OBSERVERS)
def test_oneshot_differs_in_the_norms_alone(parity: Parity, observer: str) -> None:
    """It rounds all gains 1 + w to BF16 though it smooths nothing; ours stay the source's."""
    source, ours = read_all_tensors(BASE), read_all_tensors(parity.ours[observer])
    theirs = _written(parity.oneshot[observer])
    different = {name for name, tensor in theirs.items() if ours[name] != tensor}

    assert {
        name for name in theirs if ARCHITECTURE.offset_norm(name) and not name.startswith("mtp.")
    } == different
    assert [source[name] for name in different] == [ours[name] for name in different]


@pytest.mark.parametrize("observer", OBSERVERS)
def test_the_files_beside_the_weights_are_the_librarys(parity: Parity, observer: str) -> None:
    """quantization_config and recipe.yaml are those of `oneshot`; vision is ignored besides."""
    ours, theirs = parity.ours[observer], parity.oneshot[observer]
    configs = [
        read_json(folder / "config.json")["quantization_config"] for folder in (ours, theirs)
    ]
    ignored, library = ({_canonical(name) for name in config.pop("ignore")} for config in configs)
    recipes = [yaml.safe_load((folder / "recipe.yaml").read_text()) for folder in (theirs, ours)]

    assert configs[1] == configs[0]
    assert library == {name for name in ignored if not name.startswith("model.visual.")}
    assert recipes[0] == recipes[1]


# --- what it takes and what it says --------------------------------------------------------------


def test_rounding_needs_no_calibration_and_no_extra(small: Project, carnice: Carnice) -> None:
    """One action for each quantized module, all norms the source's, nothing to install."""
    (plan,) = plan_variants([NEAREST], small.options()).variants
    quantized = len(plan.conversion.quantized)

    assert 3 + 7 == quantized
    assert Counter({GroupQuantize.name: quantized}) == Counter(
        action.op.name for action in plan.actions.values()
    )
    assert "\n" == carnice("extras", NEAREST).out
    assert "llmcompressor\n" == carnice("extras", AWQ).out


def test_what_awq_leaves_alone_is_rounded_once_for_both(small: Project) -> None:
    """`o_proj`, into which nothing is smoothed, is one action of both variants."""
    plans = plan_variants([AWQ, NEAREST], small.options()).variants
    awq, nearest = (
        {
            action.identity
            for action in plan.actions.values()
            if isinstance(action.op, GroupQuantize)
        }
        for plan in plans
    )

    assert 3 + 7 == len(awq) == len(nearest)
    assert 1 == len(awq & nearest)


@pytest.fixture
def rounded(small: Project) -> Options:
    """Where the variant is built."""
    build_variants([NEAREST], small.options())
    return small.options()


def test_every_module_is_compared_with_its_source(rounded: Options) -> None:
    """Nothing was smoothed, so nothing is left out, norms included."""
    (result,) = verify_variants([NEAREST], rounded, VerifySettings(run=False)).variants
    found = {check.name: check for check in result.checks}

    assert [] == [name for name, check in found.items() if check.outcome is Outcome.FAILED]
    assert 3 + 7 == len(found["round trip"].details["modules"])
    assert 0 == found["round trip"].details["not_compared"]


def test_nothing_in_the_folder_speaks_of_awq(rounded: Options) -> None:
    """Not the card, its tags, the library's recipe, nor how it is launched."""
    folder = rounded.out / NEAREST
    files = [folder / "README.md", folder / "config.json", folder / "recipe.yaml"]
    for path in (*files, *folder.glob("serve/*/*.sh"), folder / "serve" / "README.md"):
        assert "awq" not in path.read_text().lower(), path
    card = (folder / "README.md").read_text()

    assert "| Algorithm | rounding to nearest |" in card
    assert "Calibration" not in card


# --- knobs ---------------------------------------------------------------------------------------


def test_a_knob_of_another_algorithm_is_refused(small: Project, carnice: Carnice) -> None:
    """As it would be ignored; `awq: null` takes back what a parent says."""
    changes = ["--set", "quantize.algorithm=nearest"]
    finished = carnice("plan", AWQ, *changes)

    assert 0 == carnice("plan", AWQ, *changes, "--set", "quantize.awq=null").code
    check_refused_at_once(
        finished,
        small,
        f"carnice_build/presets/{AWQ}.yaml:",
        "algorithm nearest has no use for `awq`",
    )


@pytest.mark.parametrize(("key", "instead"), CompressedFormat.retired.items())
def test_an_old_key_is_refused_with_the_new_one(
    small: Project, carnice: Carnice, key: str, instead: str
) -> None:
    """With file and line; what became a knob of AWQ, and what a recipe no longer says."""
    small.recipe(
        "old",
        f"extends: {AWQ}.yaml\nvariant: old\ndescription: x\nquantize:\n  {key}: 8\n",
    )

    check_refused_at_once(
        carnice("plan", "old"),
        small,
        f"recipes/old.yaml:5:{len(key) + 5}: quantize.{key} is gone; expected {instead}",
    )


@pytest.mark.parametrize("name", ["v100", "vllm"])
def test_an_old_profile_is_refused_with_the_new_one(
    small: Project, carnice: Carnice, name: str
) -> None:
    """The profiles are for every folder of the format, and no longer named after AWQ."""
    check_refused_at_once(
        carnice("plan", AWQ, "--set", f"package.serve=w4a16-awq-{name}"),
        small,
        f"did you mean 'w4a16-{name}'?",
    )
