"""Tensors that are put together of others in files, or are a part of one; moves no byte.

All experts of one projection are one tensor here, whichever way a checkpoint spells them: one
tensor an expert, or rows of a fused one.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from math import gcd

from blake3 import blake3

from carnice_build.checkpoint.rows import FillRows, RowsOfTensor
from carnice_build.dtypes import TensorSpec
from carnice_build.errors import CheckpointError
from carnice_build.tensors import ByteSource, Place, Reader, SourceTensor

BLOCK_BYTES = 1 << 20
"""Bytes that are read at a time where some are left out."""


@dataclass(frozen=True, slots=True)
class _Run:
    """Bytes of a file that are read in one go."""

    file: ByteSource
    offset: int
    count: int


class Stack:
    """The bytes of several tensors end to end; see `ByteSource`.

    Neighbours that are neighbours in their file too are one read.
    """

    def __init__(self, pieces: Sequence[SourceTensor]) -> None:
        """`pieces` have bytes, and all as many; there is at least one."""
        self._pieces = pieces

    def _files(self) -> Iterator[ByteSource]:
        return (run.file for run in self._runs)

    @cached_property
    def _runs(self) -> Sequence[_Run]:
        count = self._pieces[0].spec.nbytes
        runs: list[_Run] = []
        file: ByteSource | None = None
        start = end = 0
        for piece in self._pieces:
            if piece.file is not file or piece.offset != end:
                if file is not None:
                    runs.append(_Run(file, start, end - start))
                file, start = piece.file, piece.offset
                end = start
            end += count
        assert file is not None
        runs.append(_Run(file, start, end - start))
        return runs

    @cached_property
    def _starts(self) -> Sequence[int]:
        """Where each run begins."""
        return [0, *accumulate(run.count for run in self._runs[:-1])]

    @property
    def name(self) -> str:
        """That of the first piece's file."""
        return self._runs[0].file.name

    @property
    def size(self) -> int:
        """Bytes of all pieces."""
        return len(self._pieces) * self._pieces[0].spec.nbytes

    @cached_property
    def identity(self) -> str:
        """A digest over where the bytes are; however they are cut, the same."""
        places = (f"{run.file.identity}|{run.offset}|{run.count}" for run in self._runs)
        return f"stack|{blake3(chr(10).join(places).encode()).hexdigest()}"

    def path(self) -> None:
        """See `ByteSource.path`: there is no such file."""
        return

    @property
    def local(self) -> bool:
        """True when all files are."""
        return all(file.local for file in self._files())

    @property
    def in_files(self) -> bool:
        """True when it is so of all files."""
        return all(file.in_files for file in self._files())

    @property
    def random_access(self) -> bool:
        """True when it is so of all files."""
        return all(file.random_access for file in self._files())

    def locate(self, offset: int) -> tuple[SourceTensor, int]:
        """See `Composite.locate`."""
        index, inner = divmod(offset, self._pieces[0].spec.nbytes)
        return self._pieces[index], inner

    def held_bytes(self) -> int:
        """See `Holding.held_bytes`: of one piece, for the next is opened when it is closed."""
        return max(piece.held_bytes for piece in self._pieces)

    def _parts(self, offset: int, count: int) -> Iterator[_Run]:
        """The runs that hold `count` bytes from `offset` on, cut to them."""
        index = bisect_right(self._starts, offset) - 1
        while count:
            run, inner = self._runs[index], offset - self._starts[index]
            length = min(count, run.count - inner)
            if length:
                yield _Run(run.file, run.offset + inner, length)
            offset, count, index = offset + length, count - length, index + 1

    def places(self, offset: int, count: int) -> Sequence[Place] | None:
        """See `Ranged.places`."""
        found: list[Place] = []
        for part in self._parts(offset, count):
            path = part.file.path()
            if path is None:
                return None
            found.append((path, part.offset, part.count))
        return found

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """See `Readable.read_into`."""
        done = 0
        for part in self._parts(offset, len(buffer)):
            part.file.read_into(part.offset, buffer[done : done + part.count])
            done += part.count

    @contextmanager
    def open_range(self, offset: int, count: int) -> Iterator[Reader]:
        """See `ByteSource.open_range`: each run is opened when the one before it was read."""
        flow = _Flow(self._parts(offset, count))
        try:
            yield flow.read
        finally:
            flow.close()


class _Flow:
    """Runs read one after another."""

    def __init__(self, parts: Iterator[_Run]) -> None:
        self._parts = parts
        self._open = ExitStack()
        self._reader: Reader | None = None
        self._left = 0

    def read(self, buffer: memoryview) -> None:
        """Fill `buffer` with what follows."""
        done = 0
        while done < len(buffer):
            if not self._left:
                self._next()
            assert self._reader is not None
            length = min(len(buffer) - done, self._left)
            self._reader(buffer[done : done + length])
            done, self._left = done + length, self._left - length

    def _next(self) -> None:
        self.close()
        part = next(self._parts)
        self._reader = self._open.enter_context(part.file.open_range(part.offset, part.count))
        self._left = part.count

    def close(self) -> None:
        """End the run that is open."""
        self._open.close()


class EveryRow(RowsOfTensor):
    """Row `first` and each `step`-th after it of a tensor [rows, ...]; see `ByteSource`.

    It reads the rows between them as well: those are few bytes, or one request.
    """

    def __init__(self, tensor: SourceTensor, first: int, step: int) -> None:
        """`tensor` has bytes."""
        super().__init__(tensor, tensor.spec.row_bytes)
        self._first = first
        self._step = step

    @property
    def size(self) -> int:
        """Bytes of the chosen rows."""
        return -(-(self.tensor.spec.shape[0] - self._first) // self._step) * self._row_bytes

    @property
    def identity(self) -> str:
        """The tensor's, and which of its rows."""
        return f"rows|{self._first}::{self._step} of {self._row_bytes}|{self.tensor.identity}"

    def locate(self, offset: int) -> tuple[SourceTensor, int]:
        """See `Composite.locate`."""
        row, inner = divmod(offset, self._row_bytes)
        return self.tensor, (self._first + row * self._step) * self._row_bytes + inner

    def _span(self, first: int, stop: int) -> tuple[int, int]:
        start = self.tensor.offset + (self._first + first * self._step) * self._row_bytes
        return start, ((stop - 1 - first) * self._step + 1) * self._row_bytes

    def _filled_from(self, read: Reader, first: int, stop: int) -> FillRows:
        import numpy as np

        stride = self._step * self._row_bytes
        room = np.empty(max(1, BLOCK_BYTES // stride) * stride, np.uint8)
        _, left = self._span(first, stop)

        def fill(buffer: memoryview) -> None:
            nonlocal left
            rows = np.frombuffer(buffer, np.uint8).reshape(-1, self._row_bytes)
            most = len(room) // stride
            for start in range(0, len(rows), most):
                some = rows[start : start + most]
                # Nothing is read behind the last row that is wanted.
                taken = min(left, len(some) * stride)
                read(room[:taken].data)
                some[:] = room[: len(some) * stride].reshape(len(some), stride)[
                    :, : self._row_bytes
                ]
                left -= taken

        return fill


def stacked(name: str, parts: Sequence[SourceTensor]) -> SourceTensor:
    """The tensors `parts`, at least one, as one of shape [parts, ...] called `name`.

    CheckpointError that names the odd one unless all are of one type and shape.
    """
    first = parts[0].spec
    if any(part.spec is not first and part.spec != first for part in parts):
        raise _odd_one(parts)
    spec = TensorSpec(first.dtype, (len(parts), *first.shape))
    # A shape file has names and shapes for all of its tensors, and bytes for none.
    file = Stack(parts) if parts[0].file is not None else None
    plain = all(part.stored is None for part in parts)
    stored = None if plain else sum(part.stored_bytes for part in parts)
    return SourceTensor(name, spec, file, 0, stored)


def _odd_one(parts: Sequence[SourceTensor]) -> CheckpointError:
    ((usual, _),) = Counter(part.spec for part in parts).most_common(1)
    odd = next(part for part in parts if part.spec != usual)
    like = next(part for part in parts if part.spec == usual)
    return CheckpointError(
        f"tensor {odd.name!r} is {odd.spec.dtype} {list(odd.spec.shape)}",
        where=odd.file.name if odd.file else None,
        expected=f"{usual.dtype} {list(usual.shape)}, as {like.name!r} is",
    )


@dataclass(frozen=True)
class _Whole(SourceTensor):
    """A tensor of the checkpoint, `whole`, by another name."""

    whole: SourceTensor | None = None

    def located(self, index: int) -> tuple[SourceTensor, int]:
        """See `SourceTensor.located`."""
        assert self.whole is not None
        return self.whole.located(index)


def whole_stack(name: str, tensor: SourceTensor) -> SourceTensor:
    """A tensor [experts, rows, ...] as the stack that it is."""
    return _Whole(name, tensor.spec, tensor.file, tensor.offset, tensor.stored, tensor)


def slab_rows(tensor: SourceTensor, index: int, start: int, stop: int) -> SourceTensor:
    """Rows `start` to `stop` of slab `index` of a tensor [slabs, rows, ...]."""
    slabs, rows, *rest = tensor.spec.shape
    assert 0 <= index < slabs and 0 <= start <= stop <= rows, "rows beyond the slab"
    spec = TensorSpec(tensor.spec.dtype, (stop - start, *rest))
    row_bytes = tensor.spec.row_bytes // max(1, rows)
    offset = tensor.offset + index * tensor.spec.row_bytes + start * row_bytes
    name = f"{tensor.name}[{index}, {start}:{stop}]"
    return SourceTensor(name, spec, tensor.file, offset, tensor.share(spec))


def slab_stack(
    name: str, tensor: SourceTensor, start: int, stop: int, step: int = 1
) -> SourceTensor:
    """Rows `start` to `stop`, or every `step`-th, of every slab of [slabs, rows, ...] as a stack.

    Of a fused `gate_up_proj` [experts, 2 * inner, hidden] so are the gates of all experts made,
    whether they lie before the others or between them.
    """
    slabs, rows, *rest = tensor.spec.shape
    if step == 1:
        return stacked(name, [slab_rows(tensor, index, start, stop) for index in range(slabs)])
    assert 0 <= start < step and stop == rows and rows % step == 0, "rows that do not take turns"
    # All slabs take turns alike, so they are rows of one matrix.
    whole = TensorSpec(tensor.spec.dtype, (slabs * rows, *rest))
    flat = SourceTensor(tensor.name, whole, tensor.file, tensor.offset, tensor.stored)
    file = EveryRow(flat, start, step) if tensor.file is not None else None
    spec = TensorSpec(tensor.spec.dtype, (slabs, rows // step, *rest))
    return SourceTensor(name, spec, file, 0, tensor.share(spec))


def rows_of_slabs(
    name: str, tensor: SourceTensor, ranges: Sequence[tuple[int, int]]
) -> SourceTensor:
    """A matrix of ranges of rows of [slabs, rows, columns]: of all slabs the first, then the next.

    Each range is its first row and where it stops.
    """
    unit = gcd(*(row for span in ranges for row in span))
    pieces = [
        slab_rows(tensor, slab, row, row + unit)
        for start, stop in ranges
        for slab in range(tensor.spec.shape[0])
        for row in range(start, stop, unit)
    ]
    made = stacked(name, pieces)
    spec = TensorSpec(tensor.spec.dtype, (len(pieces) * unit, *tensor.spec.shape[2:]))
    return SourceTensor(name, spec, made.file, 0, made.stored)
