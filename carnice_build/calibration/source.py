"""What a calibration runs over, as a plan found it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from carnice_build.checkpoint.checkpoint import Checkpoint
from carnice_build.checkpoint.datasets import Dataset
from carnice_build.recipe.schema import CalibrationSpec


@dataclass(frozen=True)
class CalibrationSource:
    """A recipe's calibration, with its dataset found and the small files as they are packaged."""

    spec: CalibrationSpec
    dataset: Dataset
    body: Checkpoint
    files: Mapping[str, bytes]
