"""While a layer is computed, the files of the next one come: from a hub, or from a cold disk.

No pass computes anything here: it waits for what it wants to see, and leaves zeros and ones.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Condition
from typing import Any

import numpy as np
import pytest
from calibrating import FINE_TUNE, LAYERS, QUICK, build, make_project
from conftest import Project
from fake_hub import CARNICE, QWEN, Answer, FakeHub, Request, status
from tiny import contents

from carnice_build.calibration.passes import Forward
from carnice_build.checkpoint.header import read_header
from carnice_build.checkpoint.source import LocalFile
from carnice_build.commands.plan import plan_and_survey
from carnice_build.errors import BackendError, CheckpointError
from carnice_build.execute import session, source_files
from carnice_build.execute.processes import LocalRunner
from carnice_build.execute.source_files import SourceFiles
from carnice_build.execute.workbench import JobResult, Workbench
from carnice_build.graph import Action
from carnice_build.tensor_file import TensorFile
from carnice_build.tensors import SourceTensor

pytest_plugins = ["hub_fixtures"]

LAST = len(LAYERS) - 1
DATASET = "neuralmagic/calibration: demo/calibration.jsonl"


def layer_of(name: str) -> int:
    """The decoder layer that a tensor is of, -1 for one of none."""
    found = re.search(r"layers\.(\d+)\.", name)
    return int(found[1]) if found else -1


@dataclass
class Passes:
    """What happened: tensors `fetched`, `layers` that came ahead, and passes that have `begun`."""

    fetched: list[str] = field(default_factory=list)
    layers: set[int] = field(default_factory=set)
    begun: list[int] = field(default_factory=list)
    during: Callable[[int], object] = lambda layer: None
    _changed: Condition = field(default_factory=Condition)

    def note(self, change: Callable[[], object]) -> None:
        """Let something have happened."""
        with self._changed:
            change()
            self._changed.notify_all()

    def wait(self, until: Callable[[], bool]) -> None:
        """Until that is so; an error if it is not within a minute."""
        with self._changed:
            assert self._changed.wait_for(until, timeout=60), "it never happened"

    def next_layer(self, layer: int) -> None:
        """Wait for the files of the layer after this one."""
        self.wait(lambda: layer == LAST or layer + 1 in self.layers)

    @property
    def newest(self) -> int:
        """The last layer of which something was fetched."""
        return max(map(layer_of, self.fetched))


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Passes:
    """Passes in the place of those that compute; each calls `during` with its layer."""
    seen = Passes()
    download, ahead = source_files._download, source_files.fetch_ahead

    def downloading(source: SourceTensor, path: Path) -> str:
        digest = download(source, path)
        seen.note(lambda: seen.fetched.append(source.name))
        return digest

    def fetching(bench: Workbench, action: Action) -> JobResult:
        result = ahead(bench, action)
        seen.note(lambda: seen.layers.add(action.params["layer"]))
        return result

    def run(_: LocalRunner, action: Action, inputs: Any, outputs: Sequence[TensorFile]) -> None:
        if isinstance(action.op, Forward):
            layer = action.params["layer"]
            seen.note(lambda: seen.begun.append(layer))
            seen.during(layer)
            outputs[1].write(np.ones(outputs[1].spec.shape, np.float32))

    monkeypatch.setattr(source_files, "_download", downloading)
    monkeypatch.setattr(session, "fetch_ahead", fetching)
    monkeypatch.setattr(LocalRunner, "run", run)
    return seen


@pytest.fixture
def streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub: FakeHub) -> Project:
    """A project of four layers whose models are on the hub; the current folder."""
    project = make_project(tmp_path / "project")
    (project.recipes / "_profiles.yaml").write_text(
        f"online: {{{DATASET}, {CARNICE}: hub, {QWEN}: hub}}\n"
    )
    hub.add(CARNICE, project.checkpoint, "c" * 40)
    hub.add(QWEN, project.base, "d" * 40)
    monkeypatch.chdir(project.root)
    return project


def stream(project: Project, **options: Any) -> dict[str, bytes]:
    """The shards of a build that keeps no weights of the hub."""
    build(project, FINE_TUNE, profile="online", stream=True, **options)
    built = contents(options.get("out", project.out) / FINE_TUNE)
    return {name: data for name, data in built.items() if name.endswith(".safetensors")}


def test_the_next_layer_comes_while_one_is_computed(streamed: Project, passes: Passes) -> None:
    """One layer ahead and no more, for which the plan has disk; no tensor comes twice."""
    options = streamed.options(profile="online", stream=True, overrides=QUICK)
    planned = plan_and_survey([FINE_TUNE], options)
    scratch = planned.status.scratch_bytes(planned.plan.graph, options.jobs)
    newest: list[int] = []
    used: list[int] = []

    def during(layer: int) -> None:
        passes.next_layer(layer)
        newest.append(passes.newest)
        work = (
            path.stat()
            for path in (streamed.cache / "partial").glob("work-*/**/*")
            if path.is_file()
        )
        used.append(sum({item.st_ino: item.st_size for item in work}.values()))

    passes.during = during
    stream(streamed)

    assert [1, 2, 3, 3] == newest
    assert {1} == set(Counter(passes.fetched).values())
    assert 0.9 * scratch < max(used) <= scratch


def test_a_plan_of_a_calibration_downloads_no_weights(streamed: Project, hub: FakeHub) -> None:
    """It counts the disk for copies without asking where files that will be kept are."""
    options = streamed.options(profile="online", overrides=QUICK)
    planned = plan_and_survey([FINE_TUNE], options)
    kept = planned.status.scratch_bytes(planned.plan.graph, 1)
    options = replace(options, stream=True)
    planned = plan_and_survey([FINE_TUNE], options)
    streaming = planned.status.scratch_bytes(planned.plan.graph, 1)
    size = (streamed.checkpoint / "model.safetensors").stat().st_size

    assert 0 < kept < streaming
    assert sum(hub.sent[f"/{model}/model.safetensors"] for model in (CARNICE, QWEN)) < size / 10


def test_one_after_another_nothing_comes_early(streamed: Project, passes: Passes) -> None:
    """With one job at a time there is no thread for it; the bytes are the same."""
    newest: list[int] = []
    passes.during = lambda layer: newest.append(passes.newest)
    alone = stream(streamed, jobs=1, cache=streamed.root / "other")

    assert [0, 1, 2, 3] == newest
    assert {1} == set(Counter(passes.fetched).values())
    assert set() == passes.layers
    assert alone == stream(streamed, jobs=3)


def refuse(hub: FakeHub, file: Path, layer: int, passes: Passes) -> Callable[[], bool]:
    """Have the hub refuse the tensors of a layer; tells whether it was asked for one."""
    asked: list[int] = []
    entries = read_header(LocalFile(file)).entries
    first = {entry.offset for entry in entries if layer_of(entry.name) == layer}

    def fault(request: Request, answer: Answer) -> Answer:
        if request.host == "cdn" and request.range and request.range[0] in first:
            passes.note(lambda: asked.append(layer))
            status(404)(answer)
        return answer

    hub.faults.append(fault)
    return lambda: bool(asked)


def test_what_fails_to_come_fails_as_it_would_later(
    streamed: Project, hub: FakeHub, passes: Passes
) -> None:
    """The layer is not begun, and of what came of it the next build uses nothing.

    The weights are quantized already, so that nothing else asks for them.
    """
    three, four = ("calibration.samples=3",), ("calibration.samples=4",)
    whole = stream(streamed, jobs=1, changes=four, cache=streamed.root / "other")
    stream(streamed)
    asked = refuse(hub, streamed.checkpoint / "model.safetensors", 2, passes)
    with pytest.raises(CheckpointError) as later:
        stream(streamed, jobs=1, changes=three)
    passes.begun.clear()
    passes.layers.clear()
    passes.during = lambda layer: passes.wait(asked) if layer else passes.next_layer(layer)
    with pytest.raises(CheckpointError) as ahead:
        stream(streamed, changes=four)
    begun = list(passes.begun)
    hub.faults.clear()

    assert [0, 1] == begun
    assert str(later.value) == str(ahead.value)
    assert [] == list((streamed.cache / "partial").glob("work-*"))
    assert whole == stream(streamed, changes=four)


def test_a_pass_that_fails_ends_what_was_to_come(
    streamed: Project, passes: Passes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the tensor that is on its way."""
    expect, expected = SourceFiles.expect, []

    def slow(self: SourceFiles, source: SourceTensor, own: Path) -> None:
        if layer_of(source.name) == 1:
            passes.note(lambda: expected.append(source.name))
            assert self._bench.failed.wait(60)
        expect(self, source, own)

    def during(layer: int) -> None:
        passes.wait(lambda: bool(expected))
        raise BackendError("it broke")

    monkeypatch.setattr(SourceFiles, "expect", slow)
    passes.during = during
    with pytest.raises(BackendError, match="it broke"):
        stream(streamed)

    assert 1 == len(expected)


def test_the_system_is_told_what_will_be_read(
    streamed: Project, passes: Passes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of files that are here nothing is copied; what is on disk comes into memory meanwhile."""
    told: list[tuple[Path, int]] = []
    monkeypatch.setattr(
        source_files, "will_read", lambda path, offset, count: told.append((path, offset))
    )
    told_then: list[int] = []
    file = streamed.checkpoint / "model.safetensors"
    entries = read_header(LocalFile(file)).entries
    layers = {entry.offset: layer_of(entry.name) for entry in entries}

    def during(layer: int) -> None:
        passes.next_layer(layer)
        told_then.append(max(layers[offset] for _, offset in told))

    (streamed.recipes / "_profiles.yaml").write_text(
        f"online: {{{DATASET}, {CARNICE}: demo/carnice-v2-27b, {QWEN}: demo/qwen3.6-27b}}\n"
    )
    passes.during = during
    stream(streamed)

    assert [1, 2, 3, 3] == told_then
    assert {file.resolve()} == {path.resolve() for path, _ in told}
    assert [] == passes.fetched
