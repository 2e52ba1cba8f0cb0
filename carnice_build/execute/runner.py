"""Where a worker's work runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from carnice_build.graph import Action
from carnice_build.tensor_file import TensorFile


class Runner(Protocol):
    """Runs the actions of process ops, one to a worker."""

    def run(
        self, action: Action, inputs: Sequence[TensorFile], outputs: Sequence[TensorFile]
    ) -> None:
        """Have a worker fill `outputs`, files of zeros on this machine, and wait until it has.

        Several threads call this at once, each for a job that the executor has admitted.
        Raises BackendError when the worker died or a library failed, and what else the op raises.
        """
