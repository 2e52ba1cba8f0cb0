"""What a calibration runs over, as a plan found it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from carnice_build.checkpoint.checkpoint import Checkpoint
from carnice_build.checkpoint.datasets import Dataset
from carnice_build.graph import ActionGraph
from carnice_build.models.base import Architecture
from carnice_build.recipe.schema import CalibrationSpec


@dataclass(frozen=True)
class CalibrationSource:
    """A recipe's calibration, with its dataset found and the small files as they are packaged.

    Its actions go into `graph`; `profile` is that of the body; `where` says of an entry of the
    section where it stands.
    """

    spec: CalibrationSpec
    dataset: Dataset
    body: Checkpoint
    files: Mapping[str, bytes]
    architecture: Architecture
    graph: ActionGraph
    profile: str | None
    where: Callable[[str], str]
