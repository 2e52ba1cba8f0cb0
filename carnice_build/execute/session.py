"""One run of the executor: from what is missing to finished packs."""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import get_ident

from carnice_build.errors import PlanError
from carnice_build.execute.array_job import ArrayJob
from carnice_build.execute.events import Advanced, Listener, Notice, Span, Started
from carnice_build.execute.executor import Executor
from carnice_build.execute.jobs import Job, Placement, Sink, plan_jobs, plan_placements
from carnice_build.execute.look_ahead import looking_ahead
from carnice_build.execute.process_job import ProcessJob
from carnice_build.execute.runner import Runner
from carnice_build.execute.source_files import fetch_ahead
from carnice_build.execute.transients import Transients, own_link
from carnice_build.execute.workbench import JobResult, Workbench
from carnice_build.formats.layout import PackLayout
from carnice_build.graph import Action
from carnice_build.planning.planner import VariantPlan
from carnice_build.planning.status import BuildStatus, survey
from carnice_build.plugins import failures_blamed
from carnice_build.store.files import io_errors_named
from carnice_build.store.packs import PartialPack
from carnice_build.store.store import Store
from carnice_build.system import physical_memory
from carnice_build.units import format_size


@dataclass
class Outcome:
    """What a run did; `packs` maps every layout that the variants need to its pack.

    `seconds` is the time that a worker spent on each action that was made, by its identity;
    actions of one job have equal parts of the job's.
    """

    packs: dict[str, str] = field(default_factory=dict)
    made: list[Action] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    read_bytes: int = 0
    written_bytes: int = 0


def execute(
    variants: Sequence[VariantPlan],
    status: BuildStatus,
    actions: Iterable[Action],
    store: Store,
    executor: Executor,
    runner: Runner,
    listen: Listener,
    only: Container[str] | None = None,
) -> Outcome:
    """Make every pack that `variants` need and the store lacks, by the survey `status`.

    With `only`, do the jobs on what these identities name, and finish no pack that lacks others.

    Raises PlanError when the disk is too small, BuildError when it fills up meanwhile.
    """
    with io_errors_named(store.root):
        return _Run(variants, actions, store, executor, runner, listen, only).execute(status)


class _Run:
    def __init__(
        self,
        variants: Sequence[VariantPlan],
        actions: Iterable[Action],
        store: Store,
        executor: Executor,
        runner: Runner,
        listen: Listener,
        only: Container[str] | None,
    ) -> None:
        self._only = only
        self._variants = variants
        self._actions = actions
        self._store = store
        self._executor = executor
        self._runner = runner
        self._listen = listen
        self._packs: dict[str, PartialPack] = {}
        self._outcome = Outcome()
        self._disturbed = False

    def execute(self, status: BuildStatus) -> Outcome:
        try:
            status = self._claim(status)
            for path in self._store.damaged:
                self._listen(Notice(f"{path} was changed after it was written: making it again"))
            self._outcome.packs = dict(status.finished)
            if status.pending:
                self._check_disk(status)
                self._work(status)
            return self._outcome
        finally:
            self._release()

    def _release(self) -> None:
        for pack in self._packs.values():
            pack.close()
        self._packs.clear()

    def _claim(self, status: BuildStatus) -> BuildStatus:
        """Lock every pack that must be written, and look again if another build was at work.

        Locks are taken in one order by everybody, so two builds never wait for each other.
        """
        while not set(status.pending) <= set(self._packs):
            self._release()
            self._disturbed = False
            for identity, layout in sorted(status.pending.items()):
                pack = self._store.partial(identity, layout.header, layout.size)
                if not pack.acquire(waiting=self._note_waiting):
                    self._disturbed = True
                    continue
                self._packs[identity] = pack
                self._disturbed |= self._store.finished_pack(identity) is not None
            if self._disturbed:
                status = survey(self._variants, self._store)
        for identity in set(self._packs) - set(status.pending):
            self._packs.pop(identity).discard()
        return status

    def _note_waiting(self) -> None:
        self._disturbed = True
        self._listen(Notice("waiting for another build that makes the same files"))

    def _check_disk(self, status: BuildStatus) -> None:
        held = sum(pack.allocated_bytes() for pack in self._packs.values())
        scratch = status.scratch_bytes(self._actions, self._executor.width)
        # What becomes of the holes in a pack is not known: a part leaves them.
        needed = status.bytes_to_write + scratch - held if self._only is None else scratch
        free = self._store.free_bytes()
        if needed > free:
            raise PlanError(
                f"the build needs {format_size(needed)} more disk, {format_size(free)} are free",
                where=str(self._store.root),
            )

    def _work(self, status: BuildStatus) -> None:
        placements = plan_placements(status) if self._only is None else []
        jobs = looking_ahead(plan_jobs(status, self._actions, self._only), self._executor.width)
        self._listen(
            Started(
                read_bytes=sum(job.read_bytes for job in jobs),
                write_bytes=self._bytes_to_write(status, jobs),
                actions=sum(len(job.actions) for job in jobs),
                packs=len(status.pending),
                steps=sum(job.steps for job in jobs),
            )
        )
        for identity, pack in self._packs.items():
            pack.prepare()
            for offset, count in status.pending[identity].gaps:
                # They hold something else where a damaged pack is made good.
                pack.write(offset, memoryview(bytes(count)))
        with (
            ThreadPoolExecutor(1, thread_name_prefix="carnice-sync") as finisher,
            self._store.workspace() as scratch,
        ):
            transients = Transients(jobs)
            bench = Workbench(
                self._store,
                self._packs,
                self._runner,
                scratch,
                self._progress,
                dict(status.digests),
                transients.awaited,
            )
            ledger = _Ledger(status.pending, self._finish_in(finisher))
            self._run_all(bench, placements, jobs, transients, ledger, finisher)
        self._outcome.packs.update(ledger.results(partial=self._only is not None))

    def _bytes_to_write(self, status: BuildStatus, jobs: Sequence[Job]) -> int:
        if self._only is None:
            return status.bytes_to_write
        return sum(job.sink_bytes for job in jobs)

    def _run_all(
        self,
        bench: Workbench,
        placements: Sequence[Placement],
        jobs: Sequence[Job],
        transients: Transients,
        ledger: _Ledger,
        finisher: ThreadPoolExecutor,
    ) -> None:
        def done(result: JobResult) -> None:
            self._count(result)
            ledger.fill(result.filled)
            self._flush_ahead(finisher)
            for action in result.settled:
                for ref in transients.release(action):
                    self._store.drop_blob(bench.digest_of(ref))
                    own_link(bench.scratch, ref.identity).unlink(missing_ok=True)

        for placement in placements:
            done(_place(bench, placement))
        self._executor.run(jobs, lambda job: self._timed(bench, job), done)

    def _flush_ahead(self, finisher: ThreadPoolExecutor) -> None:
        """Let the disk work beside the processors, or the build waits for it at the end.

        What memory would not keep anyway need not drive out all else that is in it.
        """
        for pack in self._packs.values():
            if pack.due_for_flush():
                finisher.submit(pack.flush, forget=self._is_large())

    def _is_large(self) -> bool:
        """True for a build that writes more than half of what the machine has memory for."""
        return sum(pack.size for pack in self._packs.values()) > physical_memory() // 2

    def _progress(self, count: int) -> None:
        self._listen(Advanced(count))

    def _timed(self, bench: Workbench, job: Job) -> JobResult:
        start = time.perf_counter()
        try:
            with failures_blamed(*(action.op for action in job.actions)):
                result = _do(bench, job)
        except BaseException:
            bench.failed.set()
            raise
        end = time.perf_counter()
        result.seconds = end - start
        self._listen(Span(job.title, "job", get_ident(), start, end, result.read_bytes))
        return result

    def _finish_in(
        self, pool: ThreadPoolExecutor
    ) -> Callable[[PackLayout, list[str]], Future[str]]:
        def finish(layout: PackLayout, digests: list[str]) -> str:
            start = time.perf_counter()
            pack = self._store.finish(self._packs[layout.identity], digests, layout.counts)
            end = time.perf_counter()
            self._listen(Span(f"pack {pack[:12]}", "sync", get_ident(), start, end, 0))
            return pack

        return lambda layout, digests: pool.submit(finish, layout, digests)

    def _count(self, result: JobResult) -> None:
        self._outcome.made += result.made
        for action in result.made:
            self._outcome.seconds[action.identity] = result.seconds / len(result.made)
        self._outcome.read_bytes += result.read_bytes
        self._outcome.written_bytes += result.written_bytes


def _do(bench: Workbench, job: Job) -> JobResult:
    if job.ahead is not None:
        return fetch_ahead(bench, job.ahead)
    kind = ProcessJob if job.process is not None else ArrayJob
    return kind(bench, job).run()


def _place(bench: Workbench, placement: Placement) -> JobResult:
    """Copy a tensor from one file of the cache into a pack."""
    result = JobResult()
    bench.copy(placement.location, placement.sink, placement.count, placement.digest, result)
    return result


class _Ledger:
    """Which places of each pack are still empty; a full pack goes to be finished at once."""

    def __init__(
        self,
        layouts: dict[str, PackLayout],
        finish: Callable[[PackLayout, list[str]], Future[str]],
    ) -> None:
        self._layouts = layouts
        self._finish = finish
        self._digests: dict[str, dict[int, str]] = {identity: {} for identity in layouts}
        self._finished: dict[str, Future[str]] = {}

    def fill(self, places: Iterable[tuple[Sink, str]]) -> None:
        """Note filled places."""
        for sink, digest in places:
            filled = self._digests[sink.layout]
            filled[sink.offset] = digest
            layout = self._layouts[sink.layout]
            if len(filled) == len(layout.slots) and sink.layout not in self._finished:
                digests = [filled[slot.offset] for slot in layout.slots]
                self._finished[sink.layout] = self._finish(layout, digests)

    def results(self, *, partial: bool) -> dict[str, str]:
        """The pack of each layout, or of each that is full if that may be a part of them.

        Waits for those still being made durable.
        """
        missing = set(self._layouts) - set(self._finished)
        assert partial or not missing, f"places stayed empty in {missing}"
        return {layout: future.result() for layout, future in self._finished.items()}
