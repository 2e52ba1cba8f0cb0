"""Rows flowing from a source tensor through actions into packs, a block at a time.

While a block is in the processor's cache it is digested, given to every action and written to
its places, so memory does not grow with the tensor and no byte is fetched twice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from blake3 import blake3

from carnice_build.checkpoint.checkpoint import read_samples
from carnice_build.dtypes import NUMPY_NAME, WIDE_FLOATS, TensorSpec
from carnice_build.execute.jobs import Sink
from carnice_build.graph import Action, ArrayOp, NonFiniteValue, TensorData
from carnice_build.kernels.elementwise import non_finite_index
from carnice_build.store.packs import PartialPack
from carnice_build.tensors import SourceTensor

BLOCK_BYTES = 2 << 20
"""Source bytes in one block: of those measured, the one that costs least (docs/benchmarks.md)."""


class RowOutput:
    """One output that grows row by row: written to its places and digested as it comes."""

    def __init__(
        self, spec: TensorSpec, sinks: Sequence[Sink], packs: Mapping[str, PartialPack]
    ) -> None:
        self.spec = spec
        self._sinks = [(packs[sink.layout], sink.offset) for sink in sinks]
        self._hasher = blake3()
        self._done = 0

    def append(self, block: memoryview) -> None:
        """Take the next bytes."""
        self._hasher.update(block)
        for pack, offset in self._sinks:
            pack.write(offset + self._done, block)
        self._done += len(block)

    def digest(self) -> str:
        """Digest of all bytes so far."""
        return self._hasher.hexdigest()


class RowAction:
    """An action applied to one block after another.

    The blocks' results share one set of buffers: fresh ones each time would have the threads
    wait for each other in the kernel's memory management.
    """

    def __init__(self, action: Action, outputs: Sequence[RowOutput], rows: int) -> None:
        """`rows` is the most rows that a block has."""
        assert isinstance(action.op, ArrayOp)
        self._op = action.op
        self.action = action
        self.outputs = outputs
        self._buffers = [
            np.empty((rows, *output.spec.shape[1:]), NUMPY_NAME[output.spec.dtype])
            for output in outputs
        ]

    def feed(self, data: TensorData) -> None:
        """Apply the action to the rows of `data`."""
        rows = data.array.shape[0]
        results = [
            TensorData(output.spec.dtype, buffer[:rows])
            for output, buffer in zip(self.outputs, self._buffers, strict=True)
        ]
        # The action may see the source's bytes under another shape of the same rows.
        shape = (rows, *self.action.inputs[0].spec.shape[1:])
        seen = TensorData(data.dtype, data.array.reshape(shape))
        self._op.apply(self.action.params, [seen], results)
        for output, result in zip(self.outputs, results, strict=True):
            output.append(as_bytes(result.array))

    def finish(self) -> None:
        """Nothing was held back."""


class TransposedAction:
    """A transposed action applied to one block after another; holds its outputs until the end."""

    def __init__(self, action: Action, outputs: Sequence[RowOutput]) -> None:
        assert isinstance(action.op, ArrayOp)
        self._op = action.op
        self.action = action
        self.outputs = outputs
        self._first = 0
        self._results = [
            TensorData(item.spec.dtype, np.empty(item.spec.shape, NUMPY_NAME[item.spec.dtype]))
            for item in outputs
        ]

    def feed(self, data: TensorData) -> None:
        """Apply the action to the rows of `data`, which follow those before."""
        self._op.apply_rows(self.action.params, self._first, data, self._results)
        self._first += data.array.shape[0]

    def finish(self) -> None:
        """Give the outputs away."""
        for output, result in zip(self.outputs, self._results, strict=True):
            output.append(as_bytes(result.array))


StreamAction = RowAction | TransposedAction


def as_bytes(array: np.ndarray[Any, Any]) -> memoryview:
    """The array's memory, which must be contiguous."""
    return array.reshape(-1).view(np.uint8).data


def block_rows(spec: TensorSpec) -> int:
    """Rows of a tensor that are read at a time."""
    rows = spec.shape[0] if spec.shape else 1
    return max(1, min(rows, BLOCK_BYTES // max(1, spec.row_bytes)))


def stream(
    source: SourceTensor,
    actions: Sequence[StreamAction],
    copy: RowOutput | None,
    want_digest: bool,
    progress: Callable[[int], None],
) -> str | None:
    """Read `source` once, feeding every block to `copy` and `actions`.

    Returns its digest when asked for.  Raises NonFiniteValue with the element's flat index.
    """
    assert source.file is not None
    spec = source.spec
    shape = spec.shape or (1,)
    rows_per_block = block_rows(spec)
    buffer = np.empty(rows_per_block * spec.row_bytes, np.uint8)
    hasher = blake3() if want_digest and copy is None else None
    with source.file.open_range(source.offset, spec.nbytes) as read:
        for first in range(0, shape[0], rows_per_block):
            rows = min(rows_per_block, shape[0] - first)
            block = buffer[: rows * spec.row_bytes]
            read(block.data)
            if hasher is not None:
                hasher.update(block.data)
            array = block.view(NUMPY_NAME[spec.dtype]).reshape(rows, *shape[1:])
            _feed(TensorData(spec.dtype, array), actions, copy, first)
            progress(len(block))
    for action in actions:
        action.finish()
    if copy is not None:
        return copy.digest()
    return hasher.hexdigest() if hasher is not None else None


def _feed(
    data: TensorData, actions: Sequence[StreamAction], copy: RowOutput | None, first_row: int
) -> None:
    try:
        if copy is not None:
            refuse_non_finite(data)
            copy.append(as_bytes(data.array))
        for action in actions:
            action.feed(data)
    except NonFiniteValue as error:
        elements_per_row = data.array.size // data.array.shape[0]
        raise NonFiniteValue(first_row * elements_per_row + error.index) from None


def refuse_non_finite(data: TensorData) -> None:
    """Raise NonFiniteValue for NaN or infinity in weights that are passed on as they are."""
    if data.dtype in WIDE_FLOATS:
        index = non_finite_index(data.array, data.dtype)
        if index >= 0:
            raise NonFiniteValue(index)


def sample_digest(source: SourceTensor) -> str:
    """A digest over samples of the tensor, its type and its shape; see `read_samples`."""
    assert source.file is not None
    if not source.file.random_access:
        # A request for each sample would cost more than a recognised tensor saves.
        return blake3(source.identity.encode()).hexdigest()
    hasher = blake3(f"{source.spec.dtype} {source.spec.shape}".encode())
    for sample in read_samples(source):
        hasher.update(sample)
    return hasher.hexdigest()
