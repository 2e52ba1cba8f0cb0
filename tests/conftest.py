"""Fixtures for all tests.

`tiny_checkpoint()`  a tiny checkpoint; shared when no folder is given, so not to be changed
`project`            a working folder with the recipes, their tiny checkpoints, cache and build
`carnice("build", ...)`  the command line in this process: exit code, stdout, stderr

A test that looks into files finds readers and writers in `tiny`.
"""

from __future__ import annotations

import contextlib
import io
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pytest
from hypothesis import settings
from tiny import contents, write_tiny

from carnice_build.cli.main import run
from carnice_build.commands.options import Options

pytest_plugins = ["warm"]

pytest.register_assert_rewrite("attacking", "calibrating", "remotes")

REPOSITORY = Path(__file__).parent.parent

settings.register_profile("tests", derandomize=True, deadline=None, database=None)
settings.load_profile("tests")


class TinyCheckpoint(Protocol):
    """See `tiny_checkpoint`."""

    def __call__(self, folder: Path | None = None, **options: Any) -> Path: ...


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> TinyCheckpoint:
    """`tiny_checkpoint(folder, **options)`: a checkpoint with the options of `tiny.write_tiny`.

    Each set of options is made once in a session.
    With a `folder`, which must not exist, the test gets a copy there and may damage it.
    """
    made: dict[str, Path] = {}

    def make(folder: Path | None = None, **options: Any) -> Path:
        key = repr(sorted(options.items()))
        if key not in made:
            made[key] = write_tiny(tmp_path_factory.mktemp("tiny") / "checkpoint", **options)
        return made[key] if folder is None else Path(shutil.copytree(made[key], folder))

    return make


@dataclass(frozen=True)
class Project:
    """A working folder, which is also the current one, so that the defaults of `carnice` fit."""

    root: Path

    @property
    def recipes(self) -> Path:
        """A copy of the repository's recipes."""
        return self.root / "recipes"

    @property
    def checkpoint(self) -> Path:
        """The Carnice stand-in, source `body`: two shards, triple prefix, vision, no MTP head."""
        return self.root / "demo" / "carnice-v2-27b"

    @property
    def base(self) -> Path:
        """The Qwen stand-in: one shard, vision and MTP head."""
        return self.root / "demo" / "qwen3.6-27b"

    @property
    def cache(self) -> Path:
        """The cache; not there before the first build."""
        return self.root / "cache"

    @property
    def out(self) -> Path:
        """The output folder; not there before the first build."""
        return self.root / "build"

    def options(self, **changes: Any) -> Options:
        """Options for `build_variants`, `plan_variants` and the like."""
        places = {"recipes": self.recipes, "out": self.out, "cache": self.cache, "jobs": 2}
        return Options(**(places | changes))

    def recipe(self, name: str, text: str) -> Path:
        """Write recipe `name`."""
        path = self.recipes / f"{name}.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    def built(self, variant: str) -> dict[str, bytes]:
        """Every file of a built variant."""
        return contents(self.out / variant)


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, which is the current one: no clone, no recipes, no profiles."""
    folder = tmp_path / "empty"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def project(
    tmp_path: Path, tiny_checkpoint: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> Project:
    """A working folder with all recipes, whose `demo` profile means tiny checkpoints."""
    found = Project(tmp_path / "project")
    shutil.copytree(REPOSITORY / "recipes", found.recipes)
    tiny_checkpoint(found.base, seed=0)
    tiny_checkpoint(found.checkpoint, seed=1, mtp=False, prefix=True, shards=2)
    (found.recipes / "_profiles.yaml").write_text(
        "demo:\n"
        "  Qwen/Qwen3.6-27B: demo/qwen3.6-27b\n"
        "  kai-os/Carnice-V2-27b: demo/carnice-v2-27b\n"
    )
    monkeypatch.chdir(found.root)
    return found


@dataclass(frozen=True)
class Finished:
    """How a run of the command line ended."""

    code: int
    out: str
    err: str


@pytest.fixture
def carnice(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Finished]:
    """`carnice("plan", "mlx-4bit")`: run the command line in this process."""

    def call(*arguments: object) -> Finished:
        monkeypatch.setattr(sys, "argv", ["carnice", *map(str, arguments)])
        out, err = io.StringIO(), io.StringIO()
        code = 0
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                run()
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else int(end.code is not None)
        return Finished(code, out.getvalue(), err.getvalue())

    return call


@pytest.fixture(scope="session")
def vlm_zoo(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`vlm_zoo(case)`: a tiny checkpoint with a tower, made once; not to be changed."""
    from mlx_vlm_families import write_vlm

    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = write_vlm(tmp_path_factory.mktemp(name) / "checkpoint", name)
        return made[name]

    return make
