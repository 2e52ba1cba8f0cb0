"""What a tensor of a GGUF file is: its name, where its values come from, what was done to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from carnice_build.graph import TensorRef
from carnice_build.models.base import TensorFact

Kind = Literal["F32", "F16", "MXFP4", "half", "matrix"]
"""The type that the converter writes: one of these always; F16 in a file of F16, and F32 in any
other; or the file's own."""


class HeadsSwapped(NamedTuple):
    """What changed places, as arguments of `swapped_rows`, or of `swapped_columns`."""

    first: int
    second: int
    size: int
    skip: int
    columns: bool


class HeadPart(NamedTuple):
    """Rows of each head of a matrix, which a tensor has: [heads, rows, columns].

    If it is `turned`, [heads, columns, rows].
    """

    start: int
    rows: int
    turned: bool


class Named(NamedTuple):
    """A tensor of the file: `ref` has its values, of any float type, to be cast or quantized.

    `fact` is that of the tensor of the architecture that it is made of.
    `merged` is that of the stack whose rows follow in each expert, if there is one.
    `swapped` says that heads changed places in its columns, and which.
    Of a tensor that the checkpoint holds in MXFP4 the `codes` are ggml's bytes of it: U8 [...,
    columns / 32 * 17].
    """

    name: str
    ref: TensorRef
    fact: TensorFact
    kind: Kind
    swapped: HeadsSwapped | None = None
    codes: TensorRef | None = None
    merged: TensorFact | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """As files have it: columns first."""
        return self.ref.spec.shape[::-1]


@dataclass(frozen=True)
class Place:
    """What the tensors of files are called that one of the architecture becomes, and how.

    There is one name, but of a convolution over frames, and of a matrix of `heads` whose `parts`
    have one each; those of one name lie below each other.  `how` is a function of `ops.Values`.
    Of a stack that is one tensor with another, `merged` is the one whose rows follow.
    `shape` is that of each tensor, rows first; of parts it follows from these.
    """

    fact: TensorFact
    names: Sequence[str]
    shape: Sequence[int] = ()
    swapped: HeadsSwapped | None = None
    how: str | None = None
    heads: int = 0
    parts: Sequence[HeadPart] = ()
    merged: TensorFact | None = None


def spelled(names: Mapping[str, str], name: str) -> str | None:
    """GGUF's name by that of the tensor, or of its module."""
    if name in names:
        return names[name]
    module, _, end = name.rpartition(".")
    return f"{names[module]}.{end}" if module in names else None
