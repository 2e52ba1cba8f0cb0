"""GGUF files as packs: built, split, resumed after a kill, checked, shared and linked."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import Finished, Project
from gguf_project import TYPES_OF_FLOATS, gap, metadata, stand_in, tensors
from imatrix_files import imatrix_file
from tiny import contents

from carnice_build.commands.build import BuildResult, build_variants
from carnice_build.commands.plan import plan_variants

pytest.importorskip("numba")

Carnice = Callable[..., Finished]

RECIPE = """\
extends: _base/carnice-vision-mtp.yaml
variant: {name}
description: A
quantize: {knobs}
"""

PLAIN = "{format: gguf, mix: Q8_0}"


@pytest.fixture
def project(project: Project) -> Project:
    """With recipes that need kernels which take no second to compile."""
    stand_in(project)
    write(project, "plain", PLAIN)
    return project


def write(project: Project, name: str, knobs: str, more: str = "") -> None:
    """Write a recipe of the text model, the head and the tower."""
    project.recipe(name, RECIPE.format(name=name, knobs=knobs) + more)


def build(project: Project, *names: str, **changes: object) -> BuildResult:
    """Build in this process."""
    return build_variants(names, project.options(**changes))


@pytest.fixture
def built(project: Project) -> Project:
    """The same, with `plain` built."""
    build(project, "plain")
    return project


def files(project: Project, name: str = "plain") -> list[Path]:
    """The GGUF files of a folder, in the order of their names."""
    return sorted((project.out / name).glob("*.gguf"))


def test_a_folder_holds_the_model_and_the_tower(built: Project) -> None:
    """In files that are called as publishers call them, and in the order of the recipe's words."""
    model, projector = files(built)

    assert "Carnice-V2-27b-Q8_0.gguf" == model.name
    assert "mmproj-Carnice-V2-27b-F16.gguf" == projector.name
    assert {"F32", "Q8_0"} == {kind for kind, _, _ in tensors(model).values()}
    assert ("model", "mmproj") == (
        metadata(model)["general.type"],
        metadata(projector)["general.type"],
    )


def test_a_published_file_is_the_pack(built: Project) -> None:
    """One file with two names, so that a cache and what was built of it take the disk once."""
    packs = {path.stat().st_ino: path for path in (built.cache / "packs").iterdir()}

    assert {path.stat().st_ino for path in files(built)} == packs.keys()
    assert {2} == {path.stat().st_nlink for path in files(built)}


def test_split_files_hold_what_one_file_holds(built: Project) -> None:
    """The same tensors in the same order, all that is said of the model in the first file."""
    write(built, "split", PLAIN, "package: {shard: 700kB}\n")
    build(built, "split")
    whole, _ = files(built)
    *parts, projector = files(built, "split")
    first, *others = (metadata(part) for part in parts)
    count = len(parts)

    assert count > 3
    assert [f"Carnice-V2-27b-Q8_0-{i + 1:05}-of-{count:05}.gguf" for i in range(count)] == [
        part.name for part in parts
    ]
    assert list(tensors(whole).items()) == list(tensors(*parts).items())
    said = {"split.no", "split.count", "split.tensors.count"}
    assert metadata(whole) == {key: value for key, value in first.items() if key not in said}
    assert list(range(count)) == [item["split.no"] for item in (first, *others)]
    assert {(count, len(tensors(whole)))} == {
        (item["split.count"], item["split.tensors.count"]) for item in (first, *others)
    }
    assert all(item.keys() == said for item in others)
    assert all(sum(len(data) for _, _, data in tensors(part).values()) <= 7e5 for part in parts)
    assert projector.read_bytes() == files(built)[1].read_bytes()


def test_splitting_otherwise_computes_nothing(built: Project) -> None:
    """Nor does putting split files together: tensors are copied from the packs that have them."""
    write(built, "split", PLAIN, "package: {shard: 1MB}\n")
    split = build(built, "split")
    again = build(built, "plain")

    assert (0, 0) == (split.actions_run, again.actions_run)


@pytest.mark.parametrize("module", ["mlp.down_proj", "self_attn.o_proj"])
def test_a_rule_runs_the_actions_of_what_it_is_about(built: Project, module: str) -> None:
    """One tensor gets another type, and every other one is copied."""
    rule = f'{{match: "*.layers.3.{module}", type: Q4_0}}'
    write(built, "ruled", f"{{format: gguf, mix: Q8_0, rules: [{rule}]}}")
    result = build(built, "ruled")
    plain, ruled = (tensors(files(built, name)[0]) for name in ("plain", "ruled"))
    (changed,) = (name for name in plain if plain[name] != ruled[name])

    assert 1 == result.actions_run
    assert ("Q8_0", "Q4_0") == (plain[changed][0], ruled[changed][0])
    assert plain.keys() == ruled.keys()


def test_two_mixes_share_what_they_have_in_common(built: Project) -> None:
    """After Q8_0, floats are those of it, and the tower's file is the very same."""
    write(built, "other", "{format: gguf, mix: Q4_0}")
    result = build(built, "other")
    plain, other = (tensors(files(built, name)[0]) for name in ("plain", "other"))
    new = [name for name in other if other[name] != plain[name]]

    assert len(new) == result.actions_run
    assert not TYPES_OF_FLOATS & {other[name][0] for name in new}
    assert files(built)[1].samefile(files(built, "other")[1])


def test_where_an_importance_matrix_lies_changes_no_byte(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From another current folder, too: the file tells its name, and nothing of the machine."""
    entries = {"blk.0.ffn_down.weight": (np.ones((1, 512), "f4"), np.ones(1, "f4"))}
    (project.root / "mine").mkdir()
    (project.root / "mine" / "own.gguf").write_bytes(imatrix_file(entries, ["a"], 1, 2))
    write(project, "weighed", "{format: gguf, mix: Q4_0, imatrix: {file: mine/own.gguf}}")

    def header() -> bytes:
        return plan_variants(["weighed"], project.options()).variants[0].packs[0].header

    here = header()
    monkeypatch.chdir(project.recipes)
    assert here == header()
    assert b"quantize.imatrix.file\x08\0\0\0\x08\0\0\0\0\0\0\0own.gguf" in here


def test_files_of_several_types_can_lie_in_one_folder(project: Project) -> None:
    """As they do on the hub: names differ by type, and what is called the same is the same."""
    mixes = ("BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_K_S", "IQ4_XS", "Q4_0")
    seen: dict[str, str] = {}
    for mix in mixes:
        write(project, mix.lower(), f"{{format: gguf, mix: {mix}}}")
        (plan,) = plan_variants([mix.lower()], project.options()).variants
        for pack in plan.packs:
            assert pack.identity == seen.setdefault(pack.name, pack.identity)

    assert len(mixes) + 1 == len(seen)


def test_damage_is_found_and_made_good(built: Project, carnice: Carnice) -> None:
    """In a tensor, in the header, which holds the tokenizer, and in the zeros between tensors.

    Only what is lost is made again.
    """
    expected = contents(built.out)
    model = files(built)[0]
    pack = next(path for path in (built.cache / "packs").iterdir() if path.samefile(model))
    content, between = model.read_bytes(), gap(model)
    _, _, data = tensors(model)["blk.3.ffn_down.weight"]
    (built.out / "plain").rename(built.root / "published")
    for place, said, lost in (
        (content.index(b"tokenizer.ggml.merges") + 100, "the header", 0),
        (content.index(data) + 7, "blk.3.ffn_down.weight", 1),
        (between, "the places between tensors", 0),
    ):
        damaged = bytearray(content)
        damaged[place] ^= 1
        pack.unlink()
        pack.write_bytes(damaged)
        found = carnice("cache", "verify")

        assert (1, f"packs/{pack.name}: damaged: {said}\n1 damaged file\n") == (
            found.code,
            found.out,
        )
        assert lost == build(built, "plain").actions_run
        assert expected == contents(built.out)
        assert 0 == carnice("cache", "verify").code


KILLED = """
import os, signal, sys
from carnice_build.commands.build import build_variants
from carnice_build.commands.options import Options
from carnice_build.execute.events import Advanced

left = int(sys.argv[1])

def watch(event):
    global left
    left -= isinstance(event, Advanced)
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)

build_variants(["plain"], Options(jobs=1), watch)
"""


@pytest.mark.parametrize("steps", [1, 60, 150])
def test_a_killed_build_goes_on_where_it_was(project: Project, steps: int) -> None:
    """The same bytes as without the kill, padding between tensors too, and no work done twice."""
    reference = build(project, "plain", cache=project.root / "reference")
    expected = contents(project.out)
    (project.out / "plain").rename(project.root / "published")
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(steps)], cwd=project.root, check=False
    )
    finished = build(project, "plain")

    assert -signal.SIGKILL == killed.returncode
    assert expected == contents(project.out)
    assert finished.actions_run < reference.actions_run or steps == 1
