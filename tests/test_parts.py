"""A calibration in parts: chains side by side, which find what one chain finds, bit for bit."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Barrier
from typing import Any

import numpy as np
import pytest
from calibrating import FINE_TUNE, QUICK, build
from conftest import Finished, Project
from family_builds import write_texts
from tiny import contents
from zoo import write_zoo

from carnice_build.calibration.parts import Combine, CombineExperts, Cut, shares
from carnice_build.calibration.passes import Forward
from carnice_build.calibration.tokens import Tokens
from carnice_build.commands.plan import plan_variants
from carnice_build.execute import source_files
from carnice_build.execute.processes import LocalRunner
from carnice_build.graph import Action, BadInput, NonFiniteValue, TensorData
from carnice_build.tensor_file import TensorFile
from carnice_build.tensors import SourceTensor

pytest_plugins = ["calibrating"]

Ran = Callable[..., Counter[str]]
FORWARD = "calibration.forward"
PASSES = tuple(f"calibration.{op}{of}" for op in ("forward", "combine") for of in ("", "_experts"))
TWO = ("calibration.parts=2",)
TEXT = ("calibration.dataset=demo/bottles.txt", "calibration.samples=3")
"""Samples that differ, of lengths that differ; those of the demo begin with the same words."""


def shards(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(folder).items() if name.endswith("safetensors")}


# --- one layer's statistics ----------------------------------------------------------------------


def amax(*values: float) -> TensorData:
    return TensorData("F32", np.array(values, np.float32))


def combined(op: Combine, *inputs: TensorData) -> list[Any]:
    outputs = [np.full_like(item.array, 77) for item in inputs[: 1 + len(op.figures)]]
    op.apply({}, inputs, [TensorData("", array) for array in outputs])
    return [array.tolist() for array in outputs]


def test_the_largest_of_the_parts_counts() -> None:
    """Linear by linear; 0 stays for an expert that no token was sent to in any part."""
    assert [[3.0, 2.5, 0.0]] == combined(
        Combine(), amax(1, 2.5, 0), amax(3, 0, 0), amax(2, 1e-30, 0)
    )


def test_counts_of_tokens_are_summed_exactly() -> None:
    """As whole numbers, of which floats would lose some."""
    counts = [TensorData("I64", np.array(item)) for item in ([2**53, 0], [1, 0], [1, 5])]
    inputs = [item for pair in zip([amax(1, 2)] * 3, counts, strict=True) for item in pair]

    assert [[1.0, 2.0], [2**53 + 2, 5]] == combined(CombineExperts(), *inputs)


@pytest.mark.parametrize(
    ("value", "error"), [(np.nan, NonFiniteValue), (np.inf, NonFiniteValue), (-1.0, BadInput)]
)
def test_what_is_no_magnitude_is_refused(value: float, error: type[Exception]) -> None:
    """It says of which part; a zero has no sign either."""
    for bad in {value, -0.0} if value < 0 else {value}:
        with pytest.raises(error) as raised:
            combined(Combine(), amax(1, 2), amax(1, bad))
        assert 1 == getattr(raised.value, "operand", None)


def test_parts_differ_by_one_sample_at_most() -> None:
    """The first have more."""
    assert [[5], [3, 2], [2, 2, 1], [1] * 5] == [shares(5, parts) for parts in (1, 2, 3, 5)]


# --- builds --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def expected(shared: Project) -> dict[str, bytes]:
    """The tensors that one chain makes; what it found of layers is in the cache of `shared`."""
    rows = (f"{'so ' * row}{row} green bottles hanging on the wall" for row in range(6))
    (shared.root / "demo" / "bottles.txt").write_text("\n".join(rows))
    build(shared, FINE_TUNE, changes=TEXT, jobs=1)
    return shards(shared.out / FINE_TUNE)


def test_parts_make_the_tensors_of_one_chain_side_by_side(
    calibrated: Project, expected: dict[str, bytes], ran: Ran, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only passes run and what they found is put together: the scales have the keys they had.

    Both parts must be in a layer at once here, or neither gets on.
    """
    both, run = Barrier(2, timeout=60), LocalRunner.run

    def together(self: LocalRunner, action: Action, *files: Any) -> None:
        if isinstance(action.op, Forward):
            both.wait()
        run(self, action, *files)

    monkeypatch.setattr(LocalRunner, "run", together)
    made = ran(calibrated, FINE_TUNE, changes=(*TEXT, *TWO), jobs=2)

    assert expected == shards(calibrated.out / FINE_TUNE)
    assert made == {
        "calibration.cut": 1,
        "calibration.embed": 2,
        FORWARD: 2 * 4,
        "calibration.combine": 4,
    }


@pytest.mark.usefixtures("expected")
def test_further_samples_in_parts_of_their_own_run_alone(calibrated: Project, ran: Ran) -> None:
    """A part is known by its tokens: what one chain found of them is not looked for again."""
    made = ran(calibrated, FINE_TUNE, changes=(*TEXT, "calibration.samples=6", *TWO))

    assert (1, 4, 4) == (made["calibration.embed"], made[FORWARD], made["calibration.combine"])


def test_parts_that_are_killed_go_on_where_they_were(
    calibrated: Project, expected: dict[str, bytes], ran: Ran
) -> None:
    """kill -9 in a layer: what either part has found stays, and the tensors are one chain's."""
    shutil.rmtree(calibrated.cache)
    settings = [part for item in (*QUICK, *TEXT, *TWO) for part in ("--set", item)]
    process = subprocess.Popen(
        [sys.executable, "-m", "carnice_build", "build", FINE_TUNE, *settings, "--jobs", "2"],
        cwd=calibrated.root,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while statistics(calibrated) < 3:
        assert process.poll() is None
        time.sleep(0.001)
    process.kill()
    process.wait()
    made = ran(calibrated, FINE_TUNE, changes=(*TEXT, *TWO), jobs=2)

    # Of the three that were there, two may be of passes that had not put away the rest.
    assert 0 < made[FORWARD] <= 2 * 4 - 1
    assert expected == shards(calibrated.out / FINE_TUNE)
    assert [] == list((calibrated.cache / "partial").iterdir())


def statistics(project: Project) -> int:
    """How often something was found of a layer, by the sizes of files in the cache."""
    files = (path for path in (project.cache / "blobs").rglob("*") if path.is_file())
    return sum(path.stat().st_size in (32, 28) for path in files)


def test_parts_count_the_tokens_that_one_chain_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ran: Ran
) -> None:
    """`build.json` says the same of every expert; other files of equal content make nothing run."""
    monkeypatch.chdir(tmp_path)
    project, source = family_project(tmp_path, "qwen3_moe"), tmp_path / "source"
    out = project.out / "v"
    options = {"sources": {"body": source}, "jobs": 1}
    ran(project, "v", **options)
    whole, counted = shards(out), figures(out)
    made = ran(project, "v", changes=TWO, **options)
    shutil.copytree(source, tmp_path / "copy")
    again = ran(project, "v", changes=TWO, **options | {"sources": {"body": tmp_path / "copy"}})

    assert whole == shards(out)
    assert counted == figures(out)
    assert any(sum(counts) for counts in counted.values())
    assert {"calibration.cut", "calibration.embed", *PASSES} == set(made)
    assert Counter() == again


def family_project(root: Path, family: str, steps: str = "") -> Project:
    """A project with the recipe `v`, NVFP4 of the checkpoint `source`, which is there."""
    project = Project(root)
    write_zoo(root / "source", family, "hub")
    write_texts(root / "rows.jsonl")
    project.recipes.mkdir()
    (project.recipes / "_profiles.yaml").write_text("demo: {}\n")
    project.recipe(
        "v",
        f"variant: v\ndescription: A\nsources: {{body: {{model: a/b}}}}\n{steps}"
        "quantize: {format: nvfp4}\ncalibration: {dataset: rows.jsonl}\n",
    )
    return project


def figures(folder: Path) -> dict[str, list[int]]:
    """What `build.json` counts."""
    found: dict[str, list[int]] = json.loads((folder / "build.json").read_text())["figures"]
    return found


def test_parts_in_a_layer_get_its_tensors_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is decoded for a process, or fetched, is for all that are in that layer; so are digests.

    Nothing is computed here: both parts stay in a layer until both are there.
    """
    both, got = Barrier(2, timeout=60), Counter[tuple[str, str]]()

    def counted(of: str) -> None:
        function = getattr(source_files, of)

        def call(source: SourceTensor, *path: Path) -> Any:
            got[of, source.identity] += 1
            return function(source, *path)

        monkeypatch.setattr(source_files, of, call)

    def found(_: LocalRunner, action: Action, inputs: Any, outputs: Sequence[TensorFile]) -> None:
        if isinstance(action.op, Forward):
            both.wait()
            outputs[1].write(np.ones(outputs[1].spec.shape, np.float32))
        if isinstance(action.op, Tokens):
            outputs[0].write(np.arange(outputs[0].spec.size, dtype=np.int32))
        if isinstance(action.op, Cut):
            action.op.run(action.params, inputs, outputs, lambda: None)

    counted("read_digest")
    counted("_download")
    monkeypatch.setattr(LocalRunner, "run", found)
    project = family_project(tmp_path, "deepseek_v3", "steps: [{decode: {}}]\n")
    monkeypatch.chdir(tmp_path)
    build(project, "v", changes=TWO, jobs=2, sources={"body": tmp_path / "source"})

    assert {"read_digest", "_download"} == {of for of, _ in got}
    assert {1} == set(got.values())


# --- plans ---------------------------------------------------------------------------------------


def test_a_pass_knows_which_samples_it_has(
    shared: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error names a sample by its number among all; no key holds that."""
    monkeypatch.chdir(shared.root)
    options = shared.options(overrides=("calibration.samples=5", "calibration.parts=3"))
    ops = [action.op for action in plan_variants([FINE_TUNE], options).graph]

    assert [0, 2, 4] * 4 == [op.first for op in ops if isinstance(op, Forward)]


REFUSED = {
    "w4a16-awq": "AWQ's search takes all samples together",
    "w4a16-gptq": "GPTQ takes all samples together",
    "int4-autoround": "method tune takes all samples together",
}


@pytest.mark.parametrize("variant", REFUSED)
def test_what_parts_do_not_give_takes_no_parts(
    calibrated: Project, carnice: Callable[..., Finished], variant: str
) -> None:
    """The plan says it, with the line of the recipe."""
    path = calibrated.recipes / "own.yaml"
    path.write_text(
        f"extends: {variant}.yaml\nvariant: own\ndescription: A\ncalibration:\n  parts: 2\n"
    )
    finished = carnice("plan", "own")

    assert 2 == finished.code
    said = f"recipes/own.yaml:5:10: {REFUSED[variant]}, and calibration.parts is 2; expected 1"
    assert said in finished.err
