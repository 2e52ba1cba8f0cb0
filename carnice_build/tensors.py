"""Tensors in files: where bytes come from, and a tensor's place among them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol, runtime_checkable

from carnice_build.dtypes import ITEM_SIZE, TensorSpec, shared_spec


@dataclass(frozen=True)
class SourceTensor:
    """A tensor in a file of a checkpoint; `file` is None in a shape file, which has no bytes.

    `stored` are the bytes of a checkpoint that are read for it, where these are not its own.
    """

    name: str
    spec: TensorSpec
    file: ByteSource | None
    offset: int
    stored: int | None = None

    @cached_property
    def identity(self) -> str:
        """Names these bytes on this machine while the file stays as it is."""
        origin = self.file.identity if self.file else f"shape|{self.name}"
        return f"{origin}|{self.offset}|{self.spec.nbytes}"

    @property
    def held_bytes(self) -> int:
        """Memory that it takes to read it, beyond what is read."""
        return self.file.held_bytes() if isinstance(self.file, Holding) else 0

    @property
    def stored_bytes(self) -> int:
        """Bytes of the checkpoint that are read for it; of what is read for several, its share."""
        return self.spec.nbytes if self.stored is None else self.stored

    def share(self, spec: TensorSpec) -> int | None:
        """What is `stored` of a part of it that is such a tensor."""
        if self.stored is None:
            return None
        return self.stored * spec.nbytes // max(1, self.spec.nbytes)

    def located(self, index: int) -> tuple[SourceTensor, int]:
        """The checkpoint's own tensor that flat element `index` lies in, and its index there."""
        if not isinstance(self.file, Composite):
            return self, index
        item = ITEM_SIZE[self.spec.dtype]
        piece, offset = self.file.locate(self.offset + index * item)
        return piece.located(offset // item)


@dataclass(frozen=True)
class Piece(SourceTensor):
    """Elements of `whole` that follow one another, as a tensor of its own."""

    whole: SourceTensor | None = None

    def located(self, index: int) -> tuple[SourceTensor, int]:
        """See `SourceTensor.located`: the whole tensor is the checkpoint's."""
        assert self.whole is not None
        before = (self.offset - self.whole.offset) // ITEM_SIZE[self.spec.dtype]
        return self.whole.located(before + index)


STACK = "*"
"""In the place of an expert's number: what all experts have, as one tensor [E, ...]."""


def numbered(name: str, count: int) -> list[str]:
    """The names of `count` experts that a stack's name stands for; any other name by itself."""
    if STACK not in name:
        return [name]
    start, _, end = name.partition(STACK)
    return [f"{start}{index}{end}" for index in range(count)]


def stacks(name: str) -> dict[str, int]:
    """The names of stacks that `name` may be one expert's of, each with the expert's number.

    The inverse of `numbered`; a name does not tell which of its numbers is that of an expert.
    """
    return {
        f"{name[: match.start()]}{STACK}{name[match.end() :]}": int(match[0])
        for match in _NUMBER.finditer(name)
    }


_NUMBER = re.compile(r"(?<![^.])(?:0|[1-9]\d{0,8})(?![^.])")


def expert_of(name: str) -> tuple[str, int] | None:
    """The stack and the number of what is called an expert's; None where nothing is."""
    found = (item for item in stacks(name).items() if f"experts.{STACK}" in item[0])
    return next(found, None)


def members(name: str, spec: TensorSpec) -> Sequence[tuple[str, TensorSpec]]:
    """The tensors that a name stands for, in the order of their bytes.

    A `*` in it stands for the indices of the first axis: the tensors of a stack, end to end.
    """
    if STACK not in name:
        return [(name, spec)]
    one = shared_spec(spec.dtype, spec.shape[1:])
    return [(member, one) for member in numbered(name, spec.shape[0])]


Reader = Callable[[memoryview], None]
"""Fills a buffer with the bytes that follow those of the call before, or raises CheckpointError."""


class Readable(Protocol):
    """Bytes that can be read by range."""

    @property
    def name(self) -> str:
        """What messages call the file."""

    @property
    def size(self) -> int:
        """Length in bytes."""

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes from `offset` on, or raise CheckpointError."""


class ByteSource(Readable, Protocol):
    """A file of a checkpoint, read by several threads at once."""

    @property
    def identity(self) -> str:
        """Changes whenever the content may have changed; holds on this machine only."""

    def path(self) -> Path | None:
        """Where the whole file is on this machine, None when it is not."""

    @property
    def local(self) -> bool:
        """True when nothing that is read of it comes from another machine."""

    @property
    def in_files(self) -> bool:
        """True when its bytes lie in files here as they are, or will when they are read.

        Unlike `path` and `places`, it downloads nothing.
        """

    @property
    def random_access(self) -> bool:
        """True when a small read costs little wherever it is."""

    def open_range(self, offset: int, count: int) -> AbstractContextManager[Reader]:
        """Read `count` bytes from `offset` on in order, by one thread, in pieces of any size."""


@runtime_checkable
class Composite(Protocol):
    """A `ByteSource` that is put together of several tensors of a checkpoint."""

    def locate(self, offset: int) -> tuple[SourceTensor, int]:
        """The tensor that byte `offset` lies in, and how many of its bytes lie before."""


Place = tuple[Path, int, int]
"""A range of a file of this machine: where it is, its offset and how many bytes it has."""


@runtime_checkable
class Ranged(Protocol):
    """A `ByteSource` whose bytes are ranges of files, as they are."""

    def places(self, offset: int, count: int) -> Sequence[Place] | None:
        """Where `count` bytes from `offset` on lie, end to end; None unless all do so here."""


def places(source: SourceTensor) -> Sequence[Place] | None:
    """Where the bytes of `source` lie on this machine; None where they are made, or elsewhere."""
    if source.file is None:
        return None
    path = source.file.path()
    if path is not None:
        return [(path, source.offset, source.spec.nbytes)]
    if isinstance(source.file, Ranged):
        return source.file.places(source.offset, source.spec.nbytes)
    return None


@runtime_checkable
class Holding(Protocol):
    """A `ByteSource` that takes memory while a range of it is open."""

    def held_bytes(self) -> int:
        """How much, beyond a block or two."""
