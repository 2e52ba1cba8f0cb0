"""Tensors whose numbers follow from a config, so that no file has to hold them."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from blake3 import blake3

from carnice_build.dtypes import TensorSpec
from carnice_build.tensors import Reader, SourceTensor


@dataclass(frozen=True)
class KnownBytes:
    """A few bytes in memory; see `ByteSource`."""

    name: str
    content: bytes

    local = True
    in_files = False
    random_access = True

    @property
    def size(self) -> int:
        """How many there are."""
        return len(self.content)

    @property
    def identity(self) -> str:
        """A digest of the bytes."""
        return f"known|{blake3(self.content).hexdigest()}"

    def path(self) -> None:
        """See `ByteSource.path`: there is no such file."""
        return

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """See `Readable.read_into`."""
        buffer[:] = self.content[offset : offset + len(buffer)]

    @contextmanager
    def open_range(self, offset: int, count: int) -> Iterator[Reader]:
        """See `ByteSource.open_range`."""
        at = offset

        def read(buffer: memoryview) -> None:
            nonlocal at
            self.read_into(at, buffer)
            at += len(buffer)

        yield read


def known_floats(name: str, numbers: Sequence[float]) -> SourceTensor:
    """A tensor called `name` of these numbers, each rounded to float32."""
    content = struct.pack(f"<{len(numbers)}f", *numbers)
    return SourceTensor(name, TensorSpec("F32", (len(numbers),)), KnownBytes(name, content), 0)
