"""Weights whose rows or columns lie in another order in their file: heads that changed places."""

from __future__ import annotations

from math import gcd

from carnice_build.checkpoint.rows import FillRows, RowsOfTensor
from carnice_build.checkpoint.stack import BLOCK_BYTES, stacked
from carnice_build.dtypes import ITEM_SIZE, TensorSpec
from carnice_build.errors import CheckpointError
from carnice_build.tensors import Piece, Reader, SourceTensor


class Swapped(RowsOfTensor):
    """A tensor of blocks [first, second] of pieces as one of blocks [second, first]; see
    `ByteSource`."""

    def __init__(self, tensor: SourceTensor, first: int, second: int, piece: int) -> None:
        """`tensor` has bytes, which are whole blocks; a `piece` has so many."""
        self._first, self._second, self._piece = first, second, piece
        super().__init__(tensor, first * second * piece)

    @property
    def size(self) -> int:
        """That of the tensor."""
        return self.tensor.spec.nbytes

    @property
    def identity(self) -> str:
        """The tensor's, and what changes places."""
        return f"swapped|{self._first}, {self._second} of {self._piece}|{self.tensor.identity}"

    def locate(self, offset: int) -> tuple[SourceTensor, int]:
        """See `Composite.locate`."""
        block, inner = divmod(offset, self._row_bytes)
        index, rest = divmod(inner, self._piece)
        second, first = divmod(index, self._first)
        piece = first * self._second + second
        return self.tensor, block * self._row_bytes + piece * self._piece + rest

    def held_bytes(self) -> int:
        """See `Holding.held_bytes`: blocks as they lie, and one in order."""
        return max(BLOCK_BYTES, self._row_bytes) + self._row_bytes + self.tensor.held_bytes

    def _span(self, first: int, stop: int) -> tuple[int, int]:
        return self.tensor.offset + first * self._row_bytes, (stop - first) * self._row_bytes

    def _filled_from(self, read: Reader, first: int, stop: int) -> FillRows:
        import numpy as np

        most = max(1, BLOCK_BYTES // self._row_bytes)
        room = np.empty((most, self._first, self._second, self._piece), np.uint8)

        def fill(buffer: memoryview) -> None:
            shape = (-1, self._second, self._first, self._piece)
            blocks = np.frombuffer(buffer, np.uint8).reshape(shape)
            for start in range(0, len(blocks), most):
                some = blocks[start : start + most]
                read(room[: len(some)].reshape(-1).data)
                some[:] = room[: len(some)].swapaxes(1, 2)

        return fill


def swapped_rows(
    tensor: SourceTensor, first: int, second: int, rows: int, skip: int = 0
) -> SourceTensor:
    """Behind `skip` rows, blocks [first, second] of so many `rows` as blocks [second, first].

    Of a block alone, which may be a whole matrix, no more than what is asked for is read at once.
    CheckpointError for rows that are no such blocks.
    """
    block = first * second * rows
    count, *rest = tensor.spec.shape
    blocks, odd = divmod(count - skip, block) if block else (0, count)
    if odd or (skip and blocks != 1):
        raise _unfit(tensor, f"{count} rows are not {skip} and blocks of {block}")
    if 1 in (first, second):
        return tensor
    if blocks != 1:
        return _swapped(tensor, first, second, rows * tensor.spec.row_bytes)
    unit = gcd(rows, skip)
    starts = [*range(0, skip, unit)]
    for inner in range(second):
        for outer in range(first):
            start = skip + (outer * second + inner) * rows
            starts += range(start, start + rows, unit)
    pieces = [_rows(tensor, start, unit) for start in starts]
    name = _name(tensor, first, second, rows * tensor.spec.row_bytes)
    whole = stacked(name, pieces)
    spec = TensorSpec(tensor.spec.dtype, (count, *rest))
    return SourceTensor(whole.name, spec, whole.file, whole.offset, whole.stored)


def swapped_columns(tensor: SourceTensor, first: int, second: int, columns: int) -> SourceTensor:
    """Blocks [first, second] of so many `columns` of a matrix as blocks [second, first].

    CheckpointError for columns that are no such blocks.
    """
    count, block = tensor.spec.shape[-1], first * second * columns
    if not block or count % block:
        raise _unfit(tensor, f"{count} columns are not blocks of {block}")
    if 1 in (first, second):
        return tensor
    piece = columns * ITEM_SIZE[tensor.spec.dtype]
    return _swapped(tensor, first, second, piece)


def _unfit(tensor: SourceTensor, why: str) -> CheckpointError:
    return CheckpointError(
        f"heads of tensor {tensor.name!r} cannot change places: {why}",
        where=tensor.file.name if tensor.file else None,
        expected="numbers of heads in config.json of which one divides the other",
    )


def _swapped(tensor: SourceTensor, first: int, second: int, piece: int) -> SourceTensor:
    file = Swapped(tensor, first, second, piece) if tensor.file is not None else None
    name = _name(tensor, first, second, piece)
    return SourceTensor(name, tensor.spec, file, 0, tensor.share(tensor.spec))


def _rows(tensor: SourceTensor, start: int, count: int) -> SourceTensor:
    spec = TensorSpec(tensor.spec.dtype, (count, *tensor.spec.shape[1:]))
    offset = tensor.offset + start * tensor.spec.row_bytes
    name = f"{tensor.name}[{start}]"
    return Piece(name, spec, tensor.file, offset, tensor.share(spec), tensor)


def _name(tensor: SourceTensor, first: int, second: int, piece: int) -> str:
    """Of a tensor without bytes it is all that tells the two apart."""
    return f"{tensor.name}, swapped {first}, {second} of {piece} bytes"
