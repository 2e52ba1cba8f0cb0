"""Outputs that are large and needed once: removed from the store when their last reader is done."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from carnice_build.execute.jobs import Job
from carnice_build.graph import Action, TensorRef
from carnice_build.planning.scratch import transient_inputs


def own_link(scratch: Path, identity: str) -> Path:
    """Where a build keeps a link of its own to the transient tensor with this identity.

    The store has one file for equal tensors, and drops it for all variants and builds at once.
    """
    return scratch / identity.replace("|", "-")


class Transients:
    """Counts the readers that each transient output of a build still has."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self._readers: dict[str, int] = {}
        for job in jobs:
            for action in job.actions:
                for ref in transient_inputs(action):
                    self._readers[ref.identity] = self._readers.get(ref.identity, 0) + 1

    def awaited(self, identity: str) -> bool:
        """Whether the transient tensor with this identity still has a reader."""
        return self._readers.get(identity, 0) > 0

    def release(self, action: Action) -> Iterator[TensorRef]:
        """Note that `action` is settled; gives the tensors that nobody needs any more."""
        for ref in transient_inputs(action):
            self._readers[ref.identity] -= 1
            if not self._readers[ref.identity]:
                yield ref
