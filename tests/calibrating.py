"""Projects whose checkpoints are small enough to calibrate in a test, cut from the demo's.

A plugin that the test modules name, because a second conftest.py would hide the first.
"""

from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY, Project
from qwen import HEAD
from tiny import (
    Tensor,
    read_all_tensors,
    read_json,
    read_safetensors,
    write_json,
    write_safetensors,
)

from carnice_build.commands.build import BuildResult, build_variants
from carnice_build.execute import session

DEMO = REPOSITORY / "demo"
LAYERS = (0, 1, 2, 7)
"""Of the demo's eight: linear, linear, linear, full; the fine-tune left the first two alone."""

FINE_TUNE, BASE = "nvfp4-text-mtp", "qwen-nvfp4-text-mtp"
QUICK = ("calibration.samples=2", "calibration.length=24", "calibration.threads=1")
TOKENS = "jsonl"
_LAYER = re.compile(r"(language_model\.layers\.)(\d+)\.")


def cut_demo(name: str, folder: Path, layers: Sequence[int] = LAYERS) -> Path:
    """A copy of the demo checkpoint `name` with these of its decoder layers, in one shard."""
    source = DEMO / name
    ignore = shutil.ignore_patterns("model*")
    shutil.copytree(source, folder, ignore=ignore)
    config = read_json(source / "config.json")
    text = config["text_config"]
    text["layer_types"] = [text["layer_types"][layer] for layer in layers]
    text["num_hidden_layers"] = len(layers)
    write_json(folder / "config.json", config)
    write_safetensors(folder / "model.safetensors", _cut(_tensors(source), layers))
    return folder


@cache
def _tensors(source: Path) -> dict[str, Tensor]:
    return read_all_tensors(source)


def _cut(tensors: dict[str, Tensor], layers: Sequence[int]) -> dict[str, Tensor]:
    kept = {}
    for name, tensor in tensors.items():
        match = _LAYER.search(name)
        if match and int(match[2]) not in layers:
            continue
        place = f"{match[1]}{layers.index(int(match[2]))}." if match else ""
        kept[_LAYER.sub(place, name)] = tensor
    return kept


def tie(folder: Path) -> None:
    """Make the checkpoint one whose head is its embedding."""
    config = read_json(folder / "config.json")
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = True
    write_json(folder / "config.json", config)
    tensors = read_safetensors(folder / "model.safetensors")
    del tensors[HEAD]
    write_safetensors(folder / "model.safetensors", tensors)


def make_project(root: Path, layers: Sequence[int] = LAYERS) -> Project:
    """A working folder with all recipes and the cut checkpoints of profile `demo`."""
    project = Project(root)
    shutil.copytree(REPOSITORY / "recipes", project.recipes)
    cut_demo("qwen3.6-27b", project.base, layers)
    cut_demo("carnice-v2-27b", project.checkpoint, layers)
    shutil.copyfile(DEMO / "calibration.jsonl", root / "demo" / "calibration.jsonl")
    return project


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project for all tests of a module, built by one worker; not to be changed."""
    project = make_project(tmp_path_factory.mktemp("calibrated") / "project")
    build(project, FINE_TUNE, jobs=1)
    return project


@pytest.fixture
def calibrated(shared: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """The checkpoints of `shared` with a copy of its cache, where the test may build."""
    project = Project(tmp_path / "project")
    for name in ("recipes", "cache"):
        shutil.copytree(shared.root / name, project.root / name)
    # The very files: what was read of them is remembered by their inodes.
    (project.root / "demo").symlink_to(shared.root / "demo")
    monkeypatch.chdir(project.root)
    return project


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A project of two layers, linear and full, where nothing was built; the current folder."""
    project = make_project(tmp_path / "project", (2, 7))
    monkeypatch.chdir(project.root)
    return project


def build(
    project: Project, *variants: str, changes: Sequence[str] = (), **options: Any
) -> BuildResult:
    """Build with `changes` on top of what makes a calibration quick."""
    overrides = (*QUICK, *changes)
    return build_variants(variants, project.options(overrides=overrides, **options))


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Counter[str]]:
    """`ran(project, variant, ...)` builds as `build` does, and counts the actions by their op."""
    made: list[str] = []
    execute = session.execute

    def watched(*arguments: Any) -> session.Outcome:
        outcome = execute(*arguments)
        made.extend(action.op.name for action in outcome.made)
        return outcome

    monkeypatch.setattr(session, "execute", watched)

    def call(project: Project, *variants: str, **options: Any) -> Counter[str]:
        made.clear()
        build(project, *variants, **options)
        return Counter(made)

    return call
