"""The parts of a build that several machines do: which jobs go together, and who does which.

What a machine must do is said by the plan alone and not by what is there already, so that all of
them divide it alike without asking each other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from carnice_build.execute.jobs import Job, plan_jobs
from carnice_build.graph import Action, ActionOutput
from carnice_build.planning.planner import VariantPlan
from carnice_build.planning.scratch import transient_inputs
from carnice_build.planning.status import survey
from carnice_build.store.store import Store

if TYPE_CHECKING:
    import networkx


@dataclass(frozen=True)
class Part:
    """Part `number` of `count`, from 1."""

    number: int
    count: int

    def __str__(self) -> str:
        return f"part {self.number} of {self.count}"


@dataclass(frozen=True)
class Share:
    """What a part works on: the identities of its actions and source tensors.

    `bytes` are those that it reads, `steps` those of long work, `peak_bytes` the most memory that
    one of its jobs takes; `wants_gpu` says whether one computes on a GPU.
    """

    members: frozenset[str] = frozenset()
    bytes: int = 0
    steps: int = 0
    peak_bytes: int = 0
    wants_gpu: bool = False

    @classmethod
    def of(cls, jobs: Sequence[Job]) -> Share:
        """These jobs together."""
        return cls(
            members=frozenset().union(*(job.members for job in jobs)),
            bytes=sum(job.read_bytes for job in jobs),
            steps=sum(job.steps for job in jobs),
            peak_bytes=max((job.peak_bytes for job in jobs), default=0),
            wants_gpu=any(job.wants_gpu for job in jobs),
        )


def divide(
    count: int, variants: Sequence[VariantPlan], actions: Iterable[Action]
) -> Sequence[Share]:
    """The shares of `count` parts; those for which there is no work are empty.

    `actions` are those of the graph, in topological order.
    Jobs that need each other are in one part, and so is a chain of a calibration, whose hidden
    states are too large to travel, with what follows from it alone.
    What chains begin with, as tokens, is made by each part that has one.
    What follows from chains of several parts is nobody's: it is left to the build that puts the
    parts together.
    Beside that, parts have as equal numbers of bytes to read as can be had by giving the largest
    away first.
    """
    with TemporaryDirectory() as folder, Store(Path(folder) / "empty") as nothing:
        jobs = plan_jobs(survey(variants, nothing), actions)
    shares: list[set[int]] = [set() for _ in range(count)]
    loads = [0] * count
    # Groups of one size stay in the order of the jobs, which is the same on all machines;
    # identities are not, where a checkpoint is a folder.
    for group in sorted(_groups(jobs), key=lambda group: -_size(jobs, group)):
        lightest = loads.index(min(loads))
        loads[lightest] += _size(jobs, group)
        shares[lightest] |= group
    return [Share.of([jobs[index] for index in sorted(share)]) for share in shares]


def members_of(
    part: Part, variants: Sequence[VariantPlan], actions: Iterable[Action]
) -> frozenset[str]:
    """The identities of the actions and source tensors that the part works on; see `divide`."""
    return divide(part.count, variants, actions)[part.number - 1].members


def _bytes(job: Job) -> int:
    """How much work a job is: what it reads; of a process all that it is given, over and over."""
    if job.process is None:
        return job.read_bytes
    return sum(ref.spec.nbytes for ref in job.actions[0].inputs)


def _size(jobs: Sequence[Job], group: Iterable[int]) -> int:
    return sum(_bytes(jobs[index]) for index in group)


def _groups(jobs: Sequence[Job]) -> list[set[int]]:
    """What one machine does, as jobs by their indices, with all that these need.

    A chain and what follows from it alone; of what follows from no chain, what needs each other.
    Jobs that chains begin with are in several.
    """
    import networkx

    needs = networkx.DiGraph()
    needs.add_nodes_from(range(len(jobs)))
    needs.add_edges_from((need, index) for index, job in enumerate(jobs) for need in job.needs)
    large = networkx.Graph(
        (need, index) for need, index in needs.edges if _is_large(jobs[need], jobs[index])
    )
    chains = [set(chain) for chain in networkx.connected_components(large)]
    behind = [_reached(networkx.descendants, needs, chain) for chain in chains]
    alone = Counter(index for found in behind for index in found)
    groups = [
        chain | {index for index in found if alone[index] == 1}
        for chain, found in zip(chains, behind, strict=True)
    ]
    groups = [group | _reached(networkx.ancestors, needs, group) for group in groups]
    rest = needs.subgraph(needs.nodes - set().union(*groups) - alone.keys()).to_undirected()
    groups += [set(group) for group in networkx.connected_components(rest)]
    return sorted(groups, key=min)


def _reached(
    walk: Callable[[networkx.DiGraph, int], set[int]],
    needs: networkx.DiGraph,
    group: Iterable[int],
) -> set[int]:
    """What a walk from each of a group comes to."""
    return set().union(*(walk(needs, index) for index in group))


def _is_large(maker: Job, reader: Job) -> bool:
    """Whether the reader is given something that is not kept."""
    made = {action.identity for action in maker.actions}
    given = (ref for action in reader.actions for ref in transient_inputs(action))
    return any(
        isinstance(ref.origin, ActionOutput) and ref.origin.action.identity in made for ref in given
    )
