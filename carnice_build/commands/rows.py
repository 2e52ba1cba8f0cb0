"""Whether a file of samples has as many as a plan wants, before any work is done."""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import IO

from carnice_build.calibration.samples import too_few
from carnice_build.calibration.tokens import Tokens
from carnice_build.graph import Action
from carnice_build.planning.planner import VariantPlan
from carnice_build.tensors import SourceTensor

_LONGEST = 1 << 20
"""Bytes of a line; of a longer one each piece counts, so that it is never too few."""


def check_rows(variants: Iterable[VariantPlan]) -> None:
    """Raise CheckpointError where a `.jsonl` file has fewer rows than are to be calibrated on.

    Whatever else is wrong with it, its reader says.
    """
    for variant in variants:
        if not variant.body.buildable:
            # Its numbers are those of a model that is not here, and so may the text be.
            continue
        for action in variant.actions.values():
            if action.op.name == Tokens.name and action.params.get("rows") == "jsonl":
                _check(action)


def _check(action: Action) -> None:
    origin = action.inputs[1].origin
    path = origin.file.path() if isinstance(origin, SourceTensor) and origin.file else None
    if path is None or action.params.get("joined"):
        return
    wanted = action.params["samples"]
    there = _rows(path, wanted)
    if there is not None and there < wanted:
        raise too_few(there, wanted, str(path))


def _rows(path: Path, most: int) -> int | None:
    """How many rows a file has, as far as `most`; None where it has something else."""
    try:
        with path.open("rb") as file:
            found = list(islice(_lines(file), most))
    except OSError:
        return None
    if len(found) == most:
        return most
    return len(found) if all(map(_is_row, found)) else None


def _lines(file: IO[bytes]) -> Iterable[bytes]:
    return (line for line in iter(lambda: file.readline(_LONGEST), b"") if line.strip())


def _is_row(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line.decode("utf-8")), dict)
    except (ValueError, RecursionError):
        return False
