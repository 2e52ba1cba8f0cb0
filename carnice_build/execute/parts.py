"""The parts of a build that several machines do: which jobs go together, and who does which.

What a machine must do is said by the plan alone and not by what is there already, so that all of
them divide it alike without asking each other.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from carnice_build.execute.jobs import Job, plan_jobs
from carnice_build.graph import Action
from carnice_build.planning.planner import VariantPlan
from carnice_build.planning.status import survey
from carnice_build.store.store import Store


@dataclass(frozen=True)
class Part:
    """Part `number` of `count`, from 1."""

    number: int
    count: int

    def __str__(self) -> str:
        return f"part {self.number} of {self.count}"


def members_of(
    part: Part, variants: Sequence[VariantPlan], actions: Iterable[Action]
) -> frozenset[str]:
    """The identities of the actions and source tensors that the part works on.

    `actions` are those of the graph, in topological order.
    Jobs that need each other are in one part, so a chain of calibration is; beside that, parts
    have as equal numbers of bytes to read as can be had by giving the largest away first.
    """
    with TemporaryDirectory() as folder, Store(Path(folder) / "empty") as nothing:
        jobs = plan_jobs(survey(variants, nothing), actions)
    shares: list[set[str]] = [set() for _ in range(part.count)]
    loads = [0] * part.count
    units = [_Unit.of([jobs[index] for index in group]) for group in _groups(jobs)]
    for unit in sorted(units, key=lambda unit: (-unit.bytes, unit.name)):
        lightest = loads.index(min(loads))
        loads[lightest] += unit.bytes
        shares[lightest] |= unit.members
    return frozenset(shares[part.number - 1])


@dataclass(frozen=True)
class _Unit:
    """Jobs that go together: what they work on, and what they read."""

    members: frozenset[str]
    bytes: int

    @classmethod
    def of(cls, jobs: Sequence[Job]) -> _Unit:
        return cls(frozenset().union(*(job.members for job in jobs)), sum(map(_bytes, jobs)))

    @property
    def name(self) -> str:
        """What orders units of one size."""
        return min(self.members)


def _bytes(job: Job) -> int:
    """What a job reads: of a process all that it is given, for it works on that for long."""
    if job.process is None:
        return job.read_bytes
    return sum(ref.spec.nbytes for ref in job.actions[0].inputs)


def _groups(jobs: Sequence[Job]) -> Iterable[Iterable[int]]:
    import networkx

    needed = networkx.Graph()
    needed.add_nodes_from(range(len(jobs)))
    needed.add_edges_from((index, other) for index, job in enumerate(jobs) for other in job.needs)
    groups: Iterable[Iterable[int]] = networkx.connected_components(needed)
    return groups
