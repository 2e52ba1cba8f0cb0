"""What every format must do, whichever it is; `samples.FORMATS` says how a recipe asks for each."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import yaml
from calibrating import cut_demo
from conftest import Finished, Project
from pydantic import ValidationError
from samples import FORMATS as SAMPLES
from tiny import contents, read_json, write_json
from verifying import Copy

from carnice_build.commands.build import build_variants
from carnice_build.commands.diff import State, diff_folders
from carnice_build.commands.explain import explain_variants
from carnice_build.commands.options import Options
from carnice_build.commands.plan import plan_variants
from carnice_build.commands.report import built_variants, collect_report
from carnice_build.commands.verify import VerifySettings, verify_variants
from carnice_build.formats.base import OutputTensor
from carnice_build.formats.folder import open_folder
from carnice_build.formats.registry import FORMATS
from carnice_build.planning.planner import VariantPlan
from carnice_build.planning.status import Status

every_format = pytest.mark.parametrize("kind", SAMPLES)


def test_every_format_has_a_sample() -> None:
    """What the tests below say of all formats, they try on each of them."""
    lacking = set(FORMATS) - set(SAMPLES)

    assert not lacking, (
        f"add to FORMATS in tests/samples.py a FormatSample of {', '.join(sorted(lacking))}, with "
        "what its section `quantize` must say"
    )


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> Options:
    """Where there is a recipe for each format, of two layers of the demo's base."""
    project = Project(tmp_path_factory.mktemp("formats"))
    cut_demo("qwen3.6-27b", project.base, (2, 7))
    (project.root / "rows.txt").write_text("Nothing is said.\nA row, and then one more row.\n")
    project.recipes.mkdir()
    profiles = {"demo": {"owner/model": "demo/qwen3.6-27b"}}
    (project.recipes / "_profiles.yaml").write_text(yaml.safe_dump(profiles))
    for kind, sample in SAMPLES.items():
        recipe = {
            "variant": kind,
            "description": f"A model in the format {kind}",
            "sources": {"body": {"model": "owner/model"}},
            "quantize": {"format": kind, **sample.quantize},
            "calibration": {"dataset": "rows.txt", "samples": 2, "length": 16, "threads": 1},
            "package": {"serve": fitting(kind)},
            "card": {"repo": f"owner/{kind}"},
        }
        (project.recipes / f"{kind}.yaml").write_text(yaml.safe_dump(recipe))
    return Options(
        recipes=project.recipes,
        out=project.root / "build",
        cache=project.root / "cache",
        jobs=2,
    )


@pytest.fixture(scope="module")
def built(options: Options) -> Callable[[str], VariantPlan]:
    """`built("mlx")` is the plan of a format's variant, whose folder is in `options.out`.

    Each is built once, and not to be changed.
    """
    plans: dict[str, VariantPlan] = {}

    def build(kind: str) -> VariantPlan:
        if kind not in plans:
            build_variants([kind], options)
            (plans[kind],) = plan_variants([kind], options).variants
        return plans[kind]

    return build


Built = Callable[[str], VariantPlan]


# --- building ------------------------------------------------------------------------------------


@every_format
def test_a_finished_build_has_nothing_to_do(kind: str, options: Options, built: Built) -> None:
    """Built again, it runs no action, reads no weight and leaves every file as it is."""
    built(kind)
    before = {path: path.stat().st_mtime_ns for path in (options.out / kind).rglob("*")}
    result = build_variants([kind], options)

    assert (0, 0) == (result.actions_run, result.read_bytes)
    assert before == {path: path.stat().st_mtime_ns for path in (options.out / kind).rglob("*")}


@every_format
def test_another_cache_gives_the_same_folder(
    kind: str, options: Options, built: Built, tmp_path: Any
) -> None:
    """Every byte follows from recipe and sources, whatever was built before."""
    built(kind)
    elsewhere = replace(options, out=tmp_path / "build", cache=tmp_path / "cache", jobs=1)
    build_variants([kind], elsewhere)

    assert contents(options.out / kind) == contents(elsewhere.out / kind)


@every_format
def test_explain_names_the_knob_that_changed(
    kind: str, options: Options, built: Built, tmp_path: Any
) -> None:
    """After a change of one knob, it and its place are the reason of just the actions that run."""
    change, place = SAMPLES[kind].change, f"--set {SAMPLES[kind].change}"
    if change is None:
        pytest.skip("no knob changes what an action does")
    built(kind)
    shutil.copytree(options.cache, tmp_path / "cache")
    changed = replace(
        options, overrides=(change,), cache=tmp_path / "cache", out=tmp_path / "build"
    )
    (explanation,) = explain_variants([kind], changed)
    running = [reason for reason in explanation.reasons if reason.status is not Status.CACHED]
    ran = build_variants([kind], changed).actions_run

    assert 0 < ran == sum(reason.count for reason in running)
    for reason in running:
        assert " -> " in reason.cause
        assert reason.where == (place if SAMPLES[kind].blamed else None)


# --- what is in the folder -----------------------------------------------------------------------


@every_format
def test_what_was_built_is_what_was_planned(kind: str, options: Options, built: Built) -> None:
    """The files hold the planned tensors, some of them quantized, and weigh what they should."""
    plan = built(kind)
    folder = open_folder(options.out / kind)
    sizes = [(options.out / kind / name).stat().st_size for name in folder.shards]

    assert plan.conversion.quantized
    assert {tensor.name for tensor in plan.conversion.tensors} == set(folder.tensors)
    assert sorted(pack.name for pack in plan.packs) == sorted(folder.shards)
    assert plan.weights_bytes == sum(sizes)


@every_format
def test_the_card_says_what_it_is(kind: str, options: Options, built: Built) -> None:
    """The hub's metadata are those of the format, and the text mentions it and its widths."""
    plan = built(kind)
    card = FORMATS[kind].model_validate({"format": kind, **SAMPLES[kind].quantize}).card()
    _, front, body = (options.out / kind / "README.md").read_text().split("---\n", 2)
    metadata = yaml.safe_load(front)

    assert card.library == metadata["library_name"]
    assert set(card.tags) <= set(metadata["tags"])
    assert any(tag in body.lower().replace("-", "") for tag in map(plain, card.tags))
    for scheme in plan.conversion.quantized.values():
        assert f"{scheme.bits}" in body


def fitting(kind: str) -> list[str]:
    """The serving profiles that are for the schemes of a format's sample."""
    number_format = FORMATS[kind].model_validate({"format": kind, **SAMPLES[kind].quantize})
    serving = number_format.serving()
    profiles = serving.profiles if serving else {}
    schemes = number_format.schemes()
    return [name for name, profile in profiles.items() if profile.fits(schemes)]


def plain(tag: str) -> str:
    """A tag as it may stand in a text."""
    return tag.replace("-", "")


@every_format
def test_every_serving_profile_is_rendered(kind: str, options: Options, built: Built) -> None:
    """Each profile that fits the folder becomes launches that say how the engine calls it."""
    built(kind)
    scripts = {
        path.relative_to(options.out / kind).parts: path.read_text()
        for path in (options.out / kind / "serve").rglob("*.sh")
    }

    profiles = fitting(kind)
    # A profile that is alone has no folder of its own.
    launches = {
        profile: [text for path, text in scripts.items() if len(profiles) == 1 or profile in path]
        for profile in profiles
    }

    assert bool(profiles) == bool(scripts)
    assert all(launches.values())


# --- verify --------------------------------------------------------------------------------------


@pytest.fixture
def copy(kind: str, options: Options, built: Built, tmp_path: Any) -> Copy:
    """A copy of the folder, which the test may damage."""
    built(kind)
    return Copy.of(kind, options, tmp_path)


@every_format
def test_a_fresh_build_passes(kind: str, copy: Copy) -> None:
    """No check has anything to say."""
    assert {} == copy.problems()


def owner(tensor: OutputTensor, plan: VariantPlan) -> str:
    """The module of a tensor, as `Conversion.quantized` has it: by its name, or the source's."""
    module = tensor.name.rpartition(".")[0]
    return module if module in plan.conversion.quantized else tensor.fact.module


@every_format
def test_a_changed_byte_is_found(kind: str, copy: Copy, built: Built) -> None:
    """The tensor whose byte changed is named, for each tensor of a quantized module."""
    plan = built(kind)
    module = next(iter(plan.conversion.quantized))
    names = [tensor.name for tensor in plan.conversion.tensors if owner(tensor, plan) == module]

    assert names
    for name in names:
        copy.flip(name, 0, 1)
        assert f"tensor {name} " in copy.problems()["digests"]


@every_format
def test_another_modules_numbers_are_found(kind: str, copy: Copy, built: Built) -> None:
    """A quantized module that is compared with its source must hold the source's numbers, even if
    nobody knew a digest."""
    plan = built(kind)
    settings = VerifySettings(run=False)
    (result,) = verify_variants([kind], copy.options, settings).variants
    (check,) = (check for check in result.checks if "modules" in check.details)
    module = next(iter(check.details["modules"]))
    largest = max(
        (tensor for tensor in plan.conversion.tensors if owner(tensor, plan) == module),
        key=lambda tensor: tensor.ref.spec.nbytes,
    )
    copy.edit(largest.name, lambda content: content.reverse())

    assert module in copy.problems()["round trip"]


@every_format
def test_a_config_without_its_quantization_is_found(kind: str, copy: Copy) -> None:
    """An engine would take the packed weights for plain ones."""
    path = copy.folder / "config.json"
    config = read_json(path)
    lost = [name for name in config if name.startswith("quantization")]
    write_json(path, {name: value for name, value in config.items() if name not in lost})

    if not lost:
        pytest.skip("config.json does not say it")
    assert "structure" in copy.problems()


@every_format
def test_a_module_that_is_not_excluded_any_more_is_found(kind: str, copy: Copy) -> None:
    """An engine would take a plain module for a quantized one; whichever it is, it is named."""
    if not SAMPLES[kind].excluded:
        pytest.skip("config.json lists nothing that is not quantized")
    path = copy.folder / "config.json"
    config = read_json(path)
    *sections, last = SAMPLES[kind].excluded
    section = config
    for name in sections:
        section = section[name]
    listed = section[last]

    assert listed
    for entry in list(listed):
        rest = [name for name in listed if name != entry]
        section[last] = rest if isinstance(listed, list) else {name: listed[name] for name in rest}
        write_json(path, config)
        assert entry.removeprefix("re:").strip("^$.*") in copy.problems()["structure"], entry


# --- diff and report -----------------------------------------------------------------------------


@every_format
def test_a_folder_is_the_same_as_itself(
    kind: str, options: Options, built: Built, carnice: Callable[..., Finished]
) -> None:
    """Nothing differs between a variant and itself, given by name and by path."""
    built(kind)
    finished = carnice("diff", kind, options.out / kind, "--out", options.out, "--json")
    found = json.loads(finished.out)

    assert found["same"] is True
    assert {"same"} == {item["state"] for item in found["modules"].values()}


@every_format
def test_its_numbers_can_be_compared(kind: str, options: Options, built: Built) -> None:
    """Each quantized module is held against the source's, and is near it but not equal."""
    plan = built(kind)
    source = options.recipes.parent / "demo" / "qwen3.6-27b"
    diff = diff_folders(source, options.out / kind, jobs=1)
    schemes = set(map(str, plan.conversion.quantized.values()))
    quantized = [item for item in diff.modules if item.b and item.b.storage in schemes]

    assert len(plan.conversion.quantized) == len(quantized)
    for item in quantized:
        assert item.state is State.DIFFERENT
        assert item.relative is not None, item.module
        assert math.isfinite(item.relative)
        assert 0 < item.relative


@every_format
def test_it_can_be_compared_with_every_other_format(
    kind: str, options: Options, built: Built
) -> None:
    """Modules that two formats quantize are the same module, with numbers to compare."""
    built(kind)
    for other in SAMPLES:
        built(other)
        diff = diff_folders(options.out / other, options.out / kind, jobs=1)
        both = [item for item in diff.modules if item.a and item.b and "mlp." in item.module]
        assert both
        for item in both:
            # Of a bias of zeros there is no share that it could be off by.
            equal = item.state is State.SAME or item.squared_difference == 0
            assert equal or math.isfinite(item.relative or math.nan)


@every_format
def test_a_report_lists_it(kind: str, options: Options, built: Built) -> None:
    """Its row has the format's name and the size of its folder."""
    plan = built(kind)
    (row,) = collect_report([kind], options).variants

    assert kind in built_variants(options)
    assert kind == row.format
    assert len(plan.conversion.quantized) >= len(row.errors)
    assert sum(len(content) for content in contents(options.out / kind).values()) == row.size


@every_format
def test_a_format_refuses_what_it_does_not_know(kind: str) -> None:
    """A key with a slip in it is an error, and never a default in its place."""
    section = {"format": kind, **SAMPLES[kind].quantize}

    assert FORMATS[kind].model_validate(section)
    with pytest.raises(ValidationError, match="Extra inputs"):
        FORMATS[kind].model_validate({**section, "nonsense": 1})
