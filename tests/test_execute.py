"""What an executor and a runner are given, and that a build needs nothing else of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from conftest import Project

from carnice_build.commands.plan import plan_variants
from carnice_build.execute.executor import Executor, LocalExecutor
from carnice_build.execute.jobs import Job
from carnice_build.execute.processes import LocalRunner
from carnice_build.execute.runner import Runner
from carnice_build.execute.session import Outcome, execute
from carnice_build.execute.workbench import JobResult
from carnice_build.graph import Action, ProcessOp
from carnice_build.planning.status import survey
from carnice_build.store.store import Store
from carnice_build.tensor_file import TensorFile

VARIANT = "mlx-mixed_3_6"
MEMORY = 1 << 30


class OneByOne:
    """An executor without threads: `jobs` is how many it was given."""

    width = 1

    def __init__(self) -> None:
        self.jobs = 0

    def run(
        self,
        jobs: Sequence[Job],
        work: Callable[[Job], JobResult],
        done: Callable[[JobResult], None],
    ) -> None:
        """Jobs come with those they need before them."""
        self.jobs = len(jobs)
        for index, job in enumerate(jobs):
            assert job.needs <= set(range(index))
            done(work(job))


class Here:
    """A runner without processes: `ran` counts the actions it was given, by their op."""

    def __init__(self) -> None:
        self.ran: Counter[str] = Counter()

    def run(
        self, action: Action, inputs: Sequence[TensorFile], outputs: Sequence[TensorFile]
    ) -> None:
        """Work where it is called."""
        assert isinstance(action.op, ProcessOp)
        action.op.run(action.params, inputs, outputs, lambda: None)
        self.ran[action.op.name] += 1


def executed(project: Project, cache: Path, executor: Executor, runner: Runner) -> Outcome:
    """What making all packs of the variant, with mlx itself as the backend, comes to."""
    plan = plan_variants([VARIANT], project.options(overrides=("quantize.backend=mlx",)))
    with Store(cache) as store:
        status = survey(plan.variants, store)
        return execute(
            plan.variants, status, plan.graph, store, executor, runner, lambda event: None
        )


def test_a_runner_gets_the_work_of_process_ops_and_no_other(project: Project) -> None:
    """Whatever runs them, the actions are the same ones, and the packs have the same bytes."""
    pytest.importorskip("mlx.core")
    runner, steps = Here(), []
    elsewhere = executed(project, project.root / "here", LocalExecutor(2, MEMORY), runner)
    with LocalRunner(2, steps.append) as processes:
        local = executed(project, project.root / "processes", LocalExecutor(2, MEMORY), processes)

    ops = Counter(action.op.name for action in elsewhere.made)
    assert {"mlx.quantize.reference": ops["mlx.quantize.reference"]} == runner.ran
    assert len(ops) > 1
    assert local.packs == elsewhere.packs


def test_an_executor_decides_when_and_nothing_else(project: Project) -> None:
    """One that runs jobs in their order, one by one, makes the packs that threads make."""
    pytest.importorskip("mlx.core")
    executor = OneByOne()
    alone = executed(project, project.root / "alone", executor, Here())
    threads = executed(project, project.root / "threads", LocalExecutor(4, MEMORY), Here())

    assert executor.jobs > 1
    assert threads.packs == alone.packs
