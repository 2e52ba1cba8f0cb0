"""Actions that want a GPU: who gets which, tried with processes that pose as some."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from conftest import Finished

from carnice_build import processor
from carnice_build.dtypes import TensorSpec
from carnice_build.errors import BackendError
from carnice_build.execute.executor import LocalExecutor
from carnice_build.execute.jobs import Job
from carnice_build.execute.processes import LocalRunner
from carnice_build.execute.workbench import JobResult
from carnice_build.graph import Action, ActionGraph, ActionOutput, ProcessOp
from carnice_build.tensor_file import TensorFile

Carnice = Callable[..., Finished]

pytestmark = pytest.mark.usefixtures("cold")

SPEC = TensorSpec("U8", (1,))
PATIENCE = 60.0


class _OnFiles(ProcessOp):
    """What takes no tensor and gives one byte."""

    version = 1
    libraries = ()

    def infer(
        self, params: Mapping[str, Any], inputs: Sequence[TensorSpec]
    ) -> tuple[TensorSpec, ...]:
        return (SPEC,)

    def memory(self, params: Mapping[str, Any], inputs: Sequence[TensorSpec]) -> int:
        return 1


class Meet(_OnFiles):
    """Waits in `folder` until `count` are there, and says which GPU it sees."""

    name = "test.meet"

    def run(
        self,
        params: Mapping[str, Any],
        inputs: Sequence[TensorFile],
        outputs: Sequence[TensorFile],
        progress: Callable[[], None],
    ) -> None:
        folder = Path(params["folder"])
        seen = os.environ.get("CUDA_VISIBLE_DEVICES", "any")
        (folder / str(params["number"])).write_text(seen)
        end = time.monotonic() + PATIENCE
        while len(list(folder.iterdir())) < params["count"]:
            if time.monotonic() > end:
                raise TimeoutError("nobody came")
            time.sleep(0.01)


class OutOfMemoryError(RuntimeError):
    """Called as torch's is."""


class Greedy(_OnFiles):
    """Asks for more than there is."""

    name = "test.greedy"

    def run(self, *_: Any) -> None:
        raise OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 TiB. GPU 0 has none")


def action(op: ProcessOp, **params: Any) -> Action:
    """An action of its own."""
    (ref,) = ActionGraph().add(op, params)
    assert isinstance(ref.origin, ActionOutput)
    return ref.origin.action


def outputs(folder: Path, number: int) -> list[TensorFile]:
    path = folder / f"out-{number}"
    path.write_bytes(b"\0")
    return [TensorFile(SPEC, str(path))]


def met(folder: Path, devices: Sequence[int], wanted: Sequence[str]) -> list[str]:
    """What each action sees, which wait for each other; they want these devices."""
    hall = folder / "hall"
    hall.mkdir()
    with (
        LocalRunner(len(wanted), lambda _: None, devices) as runner,
        ThreadPoolExecutor(len(wanted)) as threads,
    ):
        for future in [
            threads.submit(
                runner.run,
                action(Meet(), folder=str(hall), count=len(wanted), number=number, device=device),
                [],
                outputs(folder, number),
            )
            for number, device in enumerate(wanted)
        ]:
            future.result()
    return sorted(path.read_text() for path in hall.iterdir())


def test_each_gpu_has_a_process_that_sees_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They work side by side, and beside what needs none."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    assert ["1", "3", "any"] == met(tmp_path, (1, 3), ("cuda", "cpu", "cuda"))


def test_numbers_count_the_gpus_that_we_see(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As torch counts them: of those that somebody gave us, the second one is number 1."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-7")

    assert ["GPU-7"] == met(tmp_path, (1,), ("cuda",))
    assert (0, 1) == processor.all_gpus()


def test_one_that_names_its_gpu_sees_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its number would mean another one if some were hidden."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")

    assert ["5,7"] == met(tmp_path, (0,), ("cuda:1",))


@pytest.mark.parametrize(("gpus", "most"), [(1, 1), (2, 2)])
def test_no_thread_waits_for_a_gpu(gpus: int, most: int) -> None:
    """As many start as there are GPUs, and what needs none goes on beside them."""
    wanting = [Job([], [action(Meet(), number=n, device="cuda")], {}, frozenset()) for n in (1, 2)]
    plain = [Job([], [action(Meet(), number=n, device="cpu")], {}, frozenset()) for n in (3, 4)]
    running: list[Job] = []
    peaks: list[int] = []

    def work(job: Job) -> JobResult:
        running.append(job)
        peaks.append(sum(item.wants_gpu for item in running))
        time.sleep(0.05)
        running.remove(job)
        return JobResult()

    done: list[JobResult] = []
    LocalExecutor(4, 1 << 20, gpus).run([*wanting, *plain], work, done.append)

    assert 4 == len(done)
    assert most == max(peaks)


def test_a_gpu_without_memory_is_named(tmp_path: Path) -> None:
    """With the layer, torch's own words, and what would help."""
    said = "greedy of layer 7 ran out of the memory of GPU 3: CUDA out of memory$"
    with (
        LocalRunner(1, lambda _: None, devices=[3]) as runner,
        pytest.raises(BackendError) as caught,
    ):
        runner.run(action(Greedy(), device="cuda", layer=7), [], outputs(tmp_path, 0))

    assert re.search(said, caught.value.what)
    assert "calibration.length" in caught.value.expected


@pytest.mark.parametrize("given", ["", "a", "0,", "0,0", "-1"])
def test_what_are_no_gpus_is_refused(carnice: Carnice, given: str) -> None:
    """Before anything is planned."""
    finished = carnice("build", "mlx-4bit", f"--devices={given}")

    assert 2 == finished.code
    assert "--devices" in finished.err
    assert "such as 0 or 0,1" in finished.err
