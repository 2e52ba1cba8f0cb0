"""The parts of a build as tasks of Ray: given to it, watched, and their answers taken."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import ray

from carnice_build.commands.node import Answer, Board, Report, do_part
from carnice_build.commands.options import Options
from carnice_build.commands.plan import Plan
from carnice_build.commands.remote import RemoteAccess
from carnice_build.commands.travelling import make_errand
from carnice_build.errors import BuildError, PlanError, printable
from carnice_build.execute.events import Advanced, Listener, Notice, Started, Stepped
from carnice_build.execute.parts import Share, divide
from carnice_build.extras import pip_install
from carnice_build.planning.status import BuildStatus
from carnice_build.units import format_size, plural

PARTS_A_NODE = 4
"""More than one, so that nodes that are quick do more, and one that dies costs little."""

_RETRIES = 3
"""Of a part, when the node that works on it dies."""

_LOOK_SECONDS = 0.5

_NODE_ID = "ray.io/node-id"
"""The label of a node that Ray itself gives it."""

_MISSING = re.compile(r"No module named '([\w.]+)'")
"""What Ray says where a task cannot begin; what a package lacks while it works is an answer."""


class Work:
    """The parts of a build: given to Ray, watched, and their answers taken.

    `left` are identities of what is still to do when it begins, `failed` counts parts that no node
    did; `whole` says whether nodes pushed all that there is of the variants.
    """

    def __init__(
        self,
        plan: Plan,
        status: BuildStatus,
        access: RemoteAccess,
        options: Options,
        listen: Listener,
    ) -> None:
        self._plan = plan
        self._status = status
        self._access = access
        self._options = options
        self._listen = listen
        self._shares: dict[int, Share] = {}
        self._settled: set[int] = set()
        self._told: set[str] = set()
        self._faulty: set[str] = set()
        self._wanted: dict[int, Mapping[str, float]] = {}
        self._progress = (0, 0)
        self._asked: Any = None
        self._reports: Mapping[int, Report] = {}
        self.left = {name for name in status.actions if status.to_run(name)}
        self.left |= set(status.sources)
        self.answers: list[Answer] = []
        self.failed = 0
        self.whole = False

    def run(self, names: Sequence[str]) -> None:
        """Have all parts done that are left; those that fail are counted.

        Raises what a node answers that no node would answer otherwise.
        """
        nodes = self._nodes()
        count = PARTS_A_NODE * max(1, len(nodes))
        divided = enumerate(divide(count, self._plan.variants, self._plan.graph), 1)
        shares = {number: share for number, share in divided if share.members}
        self._shares = {
            number: share for number, share in shares.items() if share.members & self.left
        }
        self._begin(len(nodes))
        jobs = min(self._options.jobs, int(max((node["CPU"] for node in nodes), default=1)) or 1)
        options = replace(self._options, jobs=jobs)
        errand = ray.put(make_errand(names, self._plan, count, options, self._access.url))
        board = ray.remote(Board).options(num_cpus=0, max_restarts=-1).remote()
        part = ray.remote(do_part)

        def give(number: int) -> Any:
            wanted: dict[str, Any] = dict(self._wanted[number])
            if self._faulty:
                wanted["label_selector"] = {_NODE_ID: f"!in({','.join(sorted(self._faulty))})"}
            task = part.options(**wanted, max_retries=_RETRIES, name=f"carnice part {number}")
            return task.remote(errand, number, board)

        waiting = {}
        for number, share in self._shares.items():
            self._wanted[number] = _resources(share, options)
            self._check_fits(self._wanted[number], nodes)
            waiting[give(number)] = number
        # When it ends otherwise, so does the job, with which Ray ends all its tasks.  `ray.cancel`
        # aborts this process when a task ends meanwhile (2.60: "task that was not pending").
        self._watch(waiting, board, give)
        self.whole = not self.failed and len(self._shares) == len(shares)

    def _begin(self, nodes: int) -> None:
        self._listen(
            Started(
                read_bytes=sum(share.bytes for share in self._shares.values()),
                write_bytes=self._status.bytes_to_write,
                actions=len(self.left & self._status.actions.keys()),
                packs=len(self._status.pending),
                steps=sum(share.steps for share in self._shares.values()),
            )
        )
        parts = plural(len(self._shares), "part")
        self._listen(Notice(f"the cluster has {plural(nodes, 'node')} for {parts}"))

    def _nodes(self) -> Sequence[Mapping[str, Any]]:
        """What the nodes have on which none of its parts failed."""
        alive = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
        return [node["Resources"] for node in alive if node["NodeID"] not in self._faulty]

    def _check_fits(self, wanted: Mapping[str, float], nodes: Sequence[Mapping[str, Any]]) -> None:
        """Tell of what no node has: Ray waits for one, which may be started for it or not."""
        if not _fits(wanted, nodes):
            gpu = " and a GPU" if wanted["num_gpus"] else ""
            cores = plural(int(wanted["num_cpus"]), "core")
            self._tell(
                f"no node has {cores}, {format_size(int(wanted['memory']))} of memory{gpu}: "
                "waiting for one"
            )

    def _watch(self, waiting: dict[Any, int], board: Any, give: Callable[[int], Any]) -> None:
        again: set[Any] = set()
        while waiting:
            done, _ = ray.wait(list(waiting), num_returns=len(waiting), timeout=_LOOK_SECONDS)
            for ref in done:
                number = waiting.pop(ref)
                again.discard(ref)
                if self._settle(ref, number):
                    self._settled.add(number)
                else:
                    ref = give(number)
                    waiting[ref] = number
                    again.add(ref)
            for ref in [ref for ref in again if not self._has_other(waiting[ref])]:
                # Ray would wait for a new node.
                again.remove(ref)
                number = waiting.pop(ref)
                self._fail(self._name(number), "no other node is left")
                self._settled.add(number)
            self._look(board)

    def _name(self, number: int) -> str:
        return f"part {number} of {len(self._shares)}"

    def _has_other(self, number: int) -> bool:
        """Whether there is a node that may be given a part at which another failed."""
        return _fits(self._wanted[number], self._nodes())

    def _settle(self, ref: Any, number: int) -> bool:
        """Take the answer of a part; False when another node is to be asked."""
        name = self._name(number)
        try:
            answer: Answer = ray.get(ref)
        except ray.exceptions.RayError as error:
            missing = _MISSING.search(str(error))
            if missing is not None:
                raise _lacking(missing[1]) from None
            self._fail(name, _said(error))
            return True
        if answer.error is not None:
            if answer.error.exit_code == PlanError.exit_code:
                raise PlanError(
                    f"node {answer.node}: {answer.error.sentence()}",
                    where="--ray",
                    problems=answer.error.problems,
                )
            if answer.error.exit_code == BuildError.exit_code:
                # Not of what it was given: it would be free for the next part at once, and fail.
                self._faulty.add(answer.node_id)
                if self._has_other(number):
                    self._listen(
                        Notice(f"{name} goes to another node: {answer.error} (on {answer.node})")
                    )
                    return False
            self._fail(name, f"{answer.error} (on {answer.node})")
            return True
        self._access.publish(answer.bodies)
        self.answers.append(answer)
        seconds = answer.result.seconds if answer.result else 0.0
        done = len(self._settled) + 1
        self._listen(
            Notice(f"{done} of {len(self._shares)} parts: {answer.node} took {seconds:.1f} s")
        )
        return True

    def _fail(self, name: str, reason: str) -> None:
        self.failed += 1
        self._listen(Notice(f"{name} failed, and is left to this machine: {reason}"))

    def _look(self, board: Any) -> None:
        """Show how far the nodes are."""
        reports = self._read(board)
        for report in reports.values():
            for text in report.notices:
                self._tell(text)
        old_bytes, old_steps = self._progress
        reached = [self._reached(number, reports) for number in self._shares]
        now_bytes = max(old_bytes, sum(count for count, _ in reached))
        now_steps = max(old_steps, sum(count for _, count in reached))
        self._progress = (now_bytes, now_steps)
        if now_bytes > old_bytes:
            self._listen(Advanced(now_bytes - old_bytes))
        memory = max((report.memory for report in reports.values()), default=0)
        for _ in range(old_steps, now_steps):
            self._listen(Stepped(memory))

    def _read(self, board: Any) -> Mapping[int, Report]:
        """What is on the board, or was when it last answered: its node may be one that died."""
        self._asked = self._asked or board.read.remote()
        if ray.wait([self._asked], timeout=0)[0]:
            with suppress(ray.exceptions.RayError):
                self._reports = ray.get(self._asked)
            self._asked = None
        return self._reports

    def _reached(self, number: int, reports: Mapping[int, Report]) -> tuple[int, int]:
        """The bytes and steps of a part that are done."""
        share, report = self._shares[number], reports.get(number, Report())
        if number in self._settled:
            return share.bytes, share.steps
        return min(share.bytes, report.read_bytes), min(share.steps, report.steps)

    def _tell(self, text: str) -> None:
        """Say something once, however many nodes say it."""
        if text not in self._told:
            self._told.add(text)
            self._listen(Notice(text))


def _fits(wanted: Mapping[str, float], nodes: Iterable[Mapping[str, Any]]) -> bool:
    """Whether one of the nodes, busy or not, has what is wanted."""
    names = {"CPU": "num_cpus", "GPU": "num_gpus", "memory": "memory"}
    return any(
        all(node.get(name, 0) >= wanted[key] for name, key in names.items()) for node in nodes
    )


def _resources(share: Share, options: Options) -> dict[str, float]:
    return {
        "num_cpus": options.jobs,
        "memory": max(options.memory, share.peak_bytes),
        "num_gpus": int(share.wants_gpu),
    }


def _lacking(module: str) -> PlanError:
    return PlanError(
        f"a node of the cluster lacks {module}",
        where="--ray",
        expected=f"on all of its nodes, in Ray's Python, this version by {pip_install('ray')}",
    )


def _said(error: Exception) -> str:
    """What of an error of Ray is for a person: a word on its kind, or what raised it in a task."""
    cause = getattr(error, "cause", None)
    lines = str(cause or error).strip().splitlines()
    return f"{type(cause or error).__name__}: {printable(lines[0]) if lines else ''}"
