"""Which job runs when: in order, as soon as what it needs is there and memory allows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Protocol

from carnice_build.execute.jobs import Job
from carnice_build.execute.workbench import JobResult


class Executor(Protocol):
    """Says when each job of a DAG runs; never more than `width` at once."""

    width: int

    def run(
        self,
        jobs: Sequence[Job],
        work: Callable[[Job], JobResult],
        done: Callable[[JobResult], None],
    ) -> None:
        """Call `work` for every job after those it needs, and `done`, in this thread, after each.

        The first error stops the start of further jobs and is raised when those running ended.
        """


class LocalExecutor:
    """Threads of this process under a byte budget."""

    def __init__(self, threads: int, memory: int, gpus: int = 1) -> None:
        """At most `threads` jobs at once, whose peak bytes add up to at most `memory`.

        A job that alone exceeds the budget runs by itself.
        Of those that want a GPU at most `gpus` run, so that none holds a thread while it waits.
        """
        self.width = threads
        self._memory = memory
        self._gpus = gpus

    def run(
        self,
        jobs: Sequence[Job],
        work: Callable[[Job], JobResult],
        done: Callable[[JobResult], None],
    ) -> None:
        """See `Executor.run`."""
        waiting = dict(enumerate(jobs))
        finished: set[int] = set()
        running: dict[Future[JobResult], int] = {}
        with ThreadPoolExecutor(self.width, thread_name_prefix="carnice") as pool:
            try:
                while waiting or running:
                    for index in self._admissible(waiting, finished, running, jobs):
                        running[pool.submit(work, waiting.pop(index))] = index
                    ended, _ = wait(running, return_when=FIRST_COMPLETED)
                    for future in ended:
                        finished.add(running.pop(future))
                        done(future.result())
            except BaseException:
                # Those under way end by themselves; what they finish is remembered.
                wait(running)
                raise

    def _admissible(
        self,
        waiting: dict[int, Job],
        finished: set[int],
        running: dict[Future[JobResult], int],
        jobs: Sequence[Job],
    ) -> list[int]:
        chosen: list[int] = []
        used = sum(jobs[index].peak_bytes for index in running.values())
        free = self._gpus - sum(jobs[index].wants_gpu for index in running.values())
        for index, job in waiting.items():
            if len(running) + len(chosen) >= self.width:
                break
            if not job.needs <= finished or (job.wants_gpu and not free):
                continue
            if used + job.peak_bytes > self._memory and (running or chosen):
                break
            chosen.append(index)
            used += job.peak_bytes
            free -= job.wants_gpu
        return chosen
