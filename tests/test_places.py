"""Where the sources of a recipe are: the profile that is taken when none is named, and folders."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Finished, Project, TinyCheckpoint
from test_bad_input import check_refused_at_once

from carnice_build.checkpoint.profiles import Profiles
from carnice_build.commands.build import build_variants
from carnice_build.commands.plan import plan_variants
from carnice_build.recipe.schema import SourceSpec

Carnice = Callable[..., Finished]

PROFILES = """
demo: {owner/small: demo/small, owner/other: demo/other}
shapes: {owner/large: shapes/large.json}
mine: {owner/mine: mine}
full: hub
"""
OWN = """
extends: preset:mlx-4bit
variant: own
sources:
  body: {model: local/own, folder: FOLDER}
steps:
  - drop: {match: 'model.visual.*'}
"""


@pytest.mark.parametrize(
    ("models", "profile"),
    [
        (["owner/small", "owner/other"], "demo"),
        (["owner/small", "owner/mine"], "full"),
        (["owner/mine"], "mine"),
        (["owner/large"], "full"),
        (["nobody/unknown"], "full"),
        ([], "demo"),
    ],
)
def test_the_profile_is_the_first_that_has_all_models(
    tmp_path: Path, models: list[str], profile: str
) -> None:
    """With their weights: what is known by its shapes alone is not taken from there unasked."""
    (tmp_path / "_profiles.yaml").write_text(PROFILES)
    sources = [SourceSpec(model=model) for model in models]

    assert profile == Profiles(tmp_path).default(sources)


def test_a_folder_is_no_stand_in(tmp_path: Path) -> None:
    """What it is calibrated on is looked for on the hub, not among the profile's samples."""
    (tmp_path / "_profiles.yaml").write_text(PROFILES)

    assert "full" == Profiles(tmp_path).default([SourceSpec(model="owner/small", folder="mine")])


def test_without_a_file_of_profiles_there_is_the_hub(project: Project, carnice: Carnice) -> None:
    """As profile `full`; any other is refused as ever."""
    (project.recipes / "_profiles.yaml").unlink()

    assert "full" == Profiles(project.recipes).default([SourceSpec(model="owner/small")])
    check_refused_at_once(
        carnice("plan", "mlx-4bit", "--profile", "demo"),
        project,
        "recipes/_profiles.yaml: there is no profile 'demo'; expected full",
    )


@pytest.mark.parametrize("absolute", [False, True], ids=["below the project", "anywhere"])
def test_a_recipe_may_name_the_folder_of_a_source(
    project: Project, tiny_checkpoint: TinyCheckpoint, absolute: bool
) -> None:
    """It is built from there, in a project without profiles, and its pages do not tell where."""
    (project.recipes / "_profiles.yaml").unlink()
    folder = tiny_checkpoint() if absolute else project.base.relative_to(project.root)
    project.recipe("own", OWN.replace("FOLDER", str(folder)))
    build_variants(["own"], project.options())
    record = json.loads(project.built("own")["build.json"])
    card = project.built("own")["README.md"].decode()

    assert "a local folder" == record["sources"]["body"]["profile"]
    assert "| The model | a local folder |  |" in card
    assert "huggingface.co/local" not in card
    assert "base_model" not in card
    assert str(folder) not in card


def test_the_command_line_has_the_last_word(project: Project, tmp_path: Path) -> None:
    """`--source` is over the folder of a recipe, as it is over profiles."""
    project.recipe("own", OWN.replace("FOLDER", str(tmp_path / "none")))
    options = project.options(sources={"body": project.base})
    (variant,) = plan_variants(["own"], options).variants

    assert str(project.base) == variant.body.where


@pytest.mark.parametrize("folder", ["../elsewhere", "demo/../../x", "/tmp/../etc", "''"])
def test_a_folder_that_climbs_is_refused(project: Project, carnice: Carnice, folder: str) -> None:
    """A path is below the project, or says all of where it is."""
    project.recipe("own", OWN.replace("FOLDER", folder))

    check_refused_at_once(
        carnice("plan", "own"), project, "recipes/own.yaml:5:36: sources.body.folder"
    )


def test_the_names_that_a_profile_has_are_told(project: Project, carnice: Carnice) -> None:
    """`make all` builds those that there are stand-ins for, and asks no hub for others."""
    project.recipe("own", OWN.replace("FOLDER", "own"))
    every, some = (
        carnice("names", *options).out.split() for options in ((), ("--profile", "demo"))
    )

    assert {"own", "mlx-4bit", "nvfp4-text-mtp"} < set(every)
    assert {"mlx-4bit", "nvfp4-text-mtp"} < set(some)
    assert not {"own", "int4-bf16-mtp"} & set(some)
