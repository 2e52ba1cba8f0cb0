"""Shape files: what a checkpoint holds, names and shapes without bytes, for plans at full size.

In a file of format 2 a name stands for several tensors where it holds ranges of numbers: as
`layers.[0-2,5].mlp`, which is that of layers 0, 1, 2 and 5.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

from carnice_build.checkpoint.header import tensor_spec
from carnice_build.dtypes import TensorSpec
from carnice_build.errors import CheckpointError

FORMATS = ("carnice-shapes-1", "carnice-shapes-2")
MOST_TENSORS = 1_000_000
"""Twice as many as the largest checkpoint with one tensor an expert has."""

_NUMBER = "[0-9]{1,6}"
_RUN = f"{_NUMBER}(?:-{_NUMBER})?"
_RANGE = re.compile(rf"\[({_RUN}(?:,{_RUN})*)\]")


def read_shapes(
    where: str, content: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, TensorSpec]]:
    """The config of a shape file and its tensors by name; CheckpointError when it is none."""
    if content.get("format") not in FORMATS:
        raise CheckpointError(
            f"is a file of format {content.get('format')!r}",
            where=where,
            expected=f"a checkpoint folder, or a shape file of format {' or '.join(FORMATS)}",
        )
    config, table = content.get("config"), content.get("tensors")
    if not isinstance(config, dict) or not isinstance(table, dict):
        raise CheckpointError("has no config or no tensors", where=where)
    ranges = content["format"] != FORMATS[0]
    tensors: dict[str, TensorSpec] = {}
    for row, item in table.items():
        room = MOST_TENSORS - len(tensors)
        names = expanded(where, row, room) if ranges else [row]
        # Of the names of a row the last one is the longest.
        spec = _spec(where, names[-1], item)
        count = len(tensors) + len(names)
        tensors.update(dict.fromkeys(names, spec))
        if len(tensors) < count:
            raise CheckpointError(f"names tensors of {row!r} twice", where=where)
    return config, tensors


def expanded(where: str, row: str, most: int = MOST_TENSORS) -> Sequence[str]:
    """The names that a row of a shape file stands for; CheckpointError when more than `most`."""
    first, *rest = _RANGE.split(row)
    numbers = [_numbers(where, row, text) for text in rest[::2]]
    if any(bracket in part for part in (first, *rest[1::2]) for bracket in "[]"):
        raise _no_range(where, row)
    count = 1
    for runs in numbers:
        count *= sum(map(len, runs))
    if count > most:
        raise CheckpointError(
            f"names {count} tensors by {row!r}",
            where=where,
            expected=f"at most {MOST_TENSORS} in all",
        )
    names = [first]
    for runs, text in zip(numbers, rest[1::2], strict=True):
        ends = [f"{number}{text}" for number in chain(*runs)]
        names = [name + end for name in names for end in ends]
    return names


def _numbers(where: str, row: str, text: str) -> list[range]:
    runs: list[range] = []
    for run in text.split(","):
        low, _, high = run.partition("-")
        found = range(int(low), int(high or low) + 1)
        if not found or (runs and found[0] < runs[-1].stop):
            raise _no_range(where, row)
        runs.append(found)
    return runs


def _no_range(where: str, row: str) -> CheckpointError:
    return CheckpointError(
        f"has the name {row!r}", where=where, expected="ranges of rising numbers, as in [0-2,5]"
    )


def _spec(where: str, name: str, item: object) -> TensorSpec:
    if not isinstance(item, list) or len(item) != 2 or not isinstance(item[1], list):
        raise CheckpointError(
            f"tensor {name!r} is malformed", where=where, expected="[dtype, [sizes]]"
        )
    return tensor_spec(where, name, *item)
