"""`carnice explain` says what a build would run and the one thing that changed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from typing import Any

from conftest import Finished, Project

from carnice_build.commands.build import build_variants
from carnice_build.commands.explain import Explanation, explain_variants
from carnice_build.planning.status import Status

ONE_DOWN_PROJ = 'quantize.rules+={match: "*.layers.1.mlp.down_proj", bits: 8}'


def explained(project: Project, variant: str = "mlx-mixed_3_6", **changes: Any) -> Explanation:
    (explanation,) = explain_variants([variant], project.options(**changes))
    return explanation


def sentences(explanation: Explanation) -> list[str]:
    return [str(reason) for reason in explanation.reasons]


def test_what_was_never_built_is_said_so(project: Project) -> None:
    """Before the first build, every action is new."""
    assert all("never built here" in text for text in sentences(explained(project)))


def test_nothing_to_say_after_a_build(project: Project) -> None:
    """A finished variant has no reasons."""
    build_variants(["mlx-mixed_3_6"], project.options())

    assert [] == sentences(explained(project))


def test_a_knob_names_its_values_and_its_place(project: Project) -> None:
    """A changed override is quoted with the old and the new value."""
    build_variants(["mlx-mixed_3_6"], project.options())
    found = sentences(explained(project, overrides=(ONE_DOWN_PROJ,)))

    assert [f"1 x mlx.quantize: bits 3 -> 8 by --set {ONE_DOWN_PROJ}"] == found


def test_a_rule_in_a_file_is_named_by_its_line(project: Project) -> None:
    """A changed rule is named by file, line and column, in the file that holds it."""
    build_variants(["mlx-mixed_3_6"], project.options())
    path = project.recipes / "mlx-mixed_3_6.yaml"
    path.write_text(path.read_text() + "quantize:\n  rules+:\n    - {match: lm_head, bits: 5}\n")
    line = path.read_text().split("match: lm_head")[0].count("\n") + 1
    (reason,) = explained(project).reasons

    assert "bits 6 -> 5" == reason.cause
    assert reason.where is not None
    assert reason.where.startswith(f"{path}:{line}:")


def test_a_knob_of_a_preset_is_named_by_its_place_in_the_package(project: Project) -> None:
    """So the sentence is the same wherever the package is installed."""
    build_variants(["mlx-4bit"], project.options())
    path = project.recipes / "mlx-4bit.yaml"
    path.write_text(path.read_text().replace("preset:mlx-4bit", "preset:mlx-6bit"))
    (reason,) = explained(project, "mlx-4bit").reasons

    assert "bits 4 -> 6" == reason.cause
    assert "carnice_build/presets/mlx-6bit.yaml:6:9" == reason.where


def test_another_mode_of_mlx_is_named_by_who_said_it(project: Project) -> None:
    """Be it one of floats instead of another, or another op than that of floats."""
    build_variants(["mlx-mxfp4"], project.options())
    rules = 'quantize.rules=[{match: "*.down_proj", mode: affine, bits: 6}, '
    rules += "{match: lm_head, mode: nvfp4}]"
    found = sentences(explained(project, "mlx-mxfp4", overrides=(rules,)))

    assert [
        f"8 x mlx.quantize: op mlx.quantize.float -> mlx.quantize by --set {rules}",
        f'1 x mlx.quantize.float: mode "mxfp4" -> "nvfp4" by --set {rules}',
    ] == found


def test_actions_found_in_the_cache_are_told_apart(project: Project) -> None:
    """What another variant made already is changed, but does not run."""
    build_variants(["mlx-mixed_3_6", "mlx-6bit"], project.options())
    explanation = explained(project, overrides=("quantize.bits=6",))

    assert 0 == explanation.counts[Status.RUN] + explanation.counts[Status.READ]
    assert all(text.endswith("found in the cache") for text in sentences(explanation))


def test_another_source_is_to_be_read(project: Project) -> None:
    """A copied checkpoint is another file, whose content nobody knows yet."""
    build_variants(["mlx-mixed_3_6"], project.options())
    copy = shutil.copytree(project.checkpoint, project.root / "copy")
    explanation = explained(project, sources={"body": copy})

    assert explanation.counts[Status.READ] > 0
    assert all("its source is another file" in text for text in sentences(explanation))


def test_a_lost_result_is_said_so(project: Project) -> None:
    """When the packs are gone and no input changed, that is the reason."""
    build_variants(["mlx-mixed_3_6"], project.options())
    for pack in (project.cache / "packs").iterdir():
        pack.unlink()

    assert all("no longer in the cache" in text for text in sentences(explained(project)))


def test_a_new_version_of_a_library_is_named(project: Project, monkeypatch: Any) -> None:
    """An update of a library whose code makes the bytes is a reason of its own."""
    build_variants(["mlx-mixed_3_6"], project.options())
    from carnice_build import keys

    real = keys.library_version
    monkeypatch.setattr(
        keys, "library_version", lambda name: "9.9" if name == "numba" else real(name)
    )
    found = sentences(explained(project))

    assert any("numba" in text and "-> 9.9" in text for text in found)


def test_json_holds_the_same(project: Project, carnice: Callable[..., Finished]) -> None:
    """`--json` gives the reasons as data."""
    (explanation,) = json.loads(carnice("explain", "mlx-mixed_3_6", "--json").out)

    assert explanation["variant"] == "mlx-mixed_3_6"
    assert (
        sum(reason["count"] for reason in explanation["reasons"]) == explanation["counts"]["read"]
    )
