"""Outputs that are large and needed once: removed from the store when their last reader is done."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from carnice_build.execute.jobs import Job
from carnice_build.graph import Action, ActionOutput, ProcessOp, TensorRef


class Transients:
    """Counts the readers that each transient output of a build still has."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self._readers: dict[str, int] = {}
        for job in jobs:
            for action in job.actions:
                for ref in transient_inputs(action):
                    self._readers[ref.identity] = self._readers.get(ref.identity, 0) + 1

    def release(self, action: Action) -> Iterator[TensorRef]:
        """Note that `action` is settled; gives the tensors that nobody needs any more."""
        for ref in transient_inputs(action):
            self._readers[ref.identity] -= 1
            if not self._readers[ref.identity]:
                yield ref


def transient_inputs(action: Action) -> Iterator[TensorRef]:
    """The inputs of `action` that are not kept for long, each once."""
    seen: set[str] = set()
    for ref in action.inputs:
        origin = ref.origin
        if (
            isinstance(origin, ActionOutput)
            and isinstance(origin.action.op, ProcessOp)
            and origin.index in origin.action.op.transient
            and ref.identity not in seen
        ):
            seen.add(ref.identity)
            yield ref


def scratch_bytes(actions: Iterable[Action]) -> int:
    """Most bytes of transient tensors at one time, when `actions` run in this order."""
    order = list(actions)
    last = {
        ref.identity: index
        for index, action in enumerate(order)
        for ref in transient_inputs(action)
    }
    ends: dict[int, int] = {}
    held = most = 0
    for index, action in enumerate(order):
        if isinstance(action.op, ProcessOp):
            for output in action.op.transient:
                size = action.outputs[output].nbytes
                held += size
                end = last.get(f"{action.identity}|{output}", index)
                ends[end] = ends.get(end, 0) + size
        most = max(most, held)
        held -= ends.get(index, 0)
    return most
