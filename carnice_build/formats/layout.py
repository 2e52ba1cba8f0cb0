"""A file of tensors before its bytes exist: its header, and the place of each tensor in it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from carnice_build.store.digests import digest_texts

if TYPE_CHECKING:
    from carnice_build.formats.base import OutputTensor


@dataclass(frozen=True, slots=True)
class Slot:
    """A tensor's place in a pack; of a stack that is published apart, the place of all of it."""

    tensor: OutputTensor
    offset: int


@dataclass(frozen=True)
class PackLayout:
    """A shard before its bytes exist: header, places and what will fill them.

    `name` is that of the file in the folder.
    Tensors lie end to end, each filled up with zeros to a multiple of `alignment`.
    """

    name: str
    header: bytes
    slots: tuple[Slot, ...]
    alignment: int = 1

    @cached_property
    def size(self) -> int:
        """Bytes of the whole file."""
        if not self.slots:
            return len(self.header)
        last = self.slots[-1]
        end = last.offset + last.tensor.ref.spec.nbytes
        return end + -end % self.alignment

    @property
    def gaps(self) -> Iterator[tuple[int, int]]:
        """Where zeros fill up what lies after a tensor, and how many."""
        starts = [*(slot.offset for slot in self.slots[1:]), self.size]
        for slot, start in zip(self.slots, starts, strict=True):
            end = slot.offset + slot.tensor.ref.spec.nbytes
            if start > end:
                yield end, start - end

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """How many of the header's tensors each slot holds."""
        return tuple(slot.tensor.count for slot in self.slots)

    @cached_property
    def identity(self) -> str:
        """Names the layout: the header, and what identifies each tensor before it is read.

        Variants that call the file otherwise share it.
        """
        refs = (slot.tensor.ref.identity for slot in self.slots)
        return digest_texts([self.header.hex(), *refs])


@dataclass(frozen=True)
class Publication:
    """What a recipe says of the files that tensors go into.

    `model` is what the model is called in names of files; `shard_bytes` is None where the recipe
    leaves it to the format when a file is split.
    """

    variant: str
    model: str
    shard_bytes: int | None
