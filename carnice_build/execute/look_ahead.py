"""Jobs that have the files of a layer here while the layer before it is computed.

They are for the passes of a calibration, whose layers need each other, so that a device or a
processor would wait for a hub or for a disk with each.
They are jobs as others are: they take a thread of those that there are, and memory of the budget.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate

from carnice_build.execute.jobs import Job
from carnice_build.graph import Action, ActionOutput
from carnice_build.planning.scratch import transient_inputs


def looking_ahead(jobs: Sequence[Job], width: int) -> Sequence[Job]:
    """The jobs, of which `width` may run at once, and before some of them one that fetches for it.

    It begins when the layer before can, so that it is one layer ahead and no more.
    Whatever it did not fetch, the job itself does; one after another they would gain nothing.
    """
    if width < 2:
        return jobs
    makers = {action.identity: index for index, job in enumerate(jobs) for action in job.actions}
    begins = [_begin(job, makers) for job in jobs]
    counts = accumulate(begin is not None for begin in begins)
    places = [index + before for index, before in enumerate(counts)]
    found: list[Job] = []
    for job, begin in zip(jobs, begins, strict=True):
        job.needs = {places[need] for need in job.needs}
        if begin is not None:
            job.needs.add(len(found))
            needs = {places[need] for need in begin}
            found.append(Job([], [], {}, frozenset(), needs, job.actions[0]))
        found.append(job)
    return found


def _begin(job: Job, makers: Mapping[str, int]) -> Iterable[int] | None:
    """What is done when the layer before that of `job` begins; None if none is to be computed."""
    if job.process is None:
        return None
    before = [action for action in _layers_before(job.actions[0]) if action.identity in makers]
    if not before:
        return None
    behind = (item.identity for action in before for item in _layers_before(action))
    return {makers[identity] for identity in behind if identity in makers}


def _layers_before(action: Action) -> Iterable[Action]:
    """What makes its hidden states, and whatever else goes from layer to layer."""
    origins = (ref.origin for ref in transient_inputs(action))
    return [origin.action for origin in origins if isinstance(origin, ActionOutput)]
