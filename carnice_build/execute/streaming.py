"""Rows flowing from source tensors through actions into packs, a block at a time.

While a block is in the processor's cache it is digested, given to every action and written to
its places, so memory does not grow with the tensors and no byte is fetched twice.
Several sources are cut into the same number of rows, and come in lockstep.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from blake3 import blake3

from carnice_build.checkpoint.checkpoint import read_samples
from carnice_build.checkpoint.together import open_together
from carnice_build.dtypes import NUMPY_NAME, WIDE_FLOATS, TensorSpec
from carnice_build.execute.blame import bad_input, non_finite, not_finite
from carnice_build.execute.jobs import Sink, block_rows, first_axis, plain_rows
from carnice_build.graph import Action, ArrayOp, BadInput, NonFiniteValue, TensorData
from carnice_build.kernels.elementwise import non_finite_index
from carnice_build.store.packs import PartialPack
from carnice_build.tensors import Reader, SourceTensor


class RowOutput:
    """One output that grows row by row: written to its places and digested as it comes."""

    def __init__(
        self,
        spec: TensorSpec,
        sinks: Sequence[Sink],
        packs: Mapping[str, PartialPack],
        own: Path | None = None,
    ) -> None:
        """`own` is a file that is to hold the output too, where another job reads it."""
        self.spec = spec
        self.own = own
        self._file: BinaryIO | None = own.open("wb") if own else None
        self._sinks = [(packs[sink.layout], sink.offset) for sink in sinks]
        self._hasher = blake3()
        self._done = 0

    def append(self, block: memoryview) -> None:
        """Take the next bytes."""
        self._hasher.update(block)
        for pack, offset in self._sinks:
            pack.write(offset + self._done, block)
        if self._file is not None:
            self._file.write(block)
        self._done += len(block)

    def digest(self) -> str:
        """Digest of all bytes, of which there are no more."""
        if self._file is not None:
            self._file.close()
        return self._hasher.hexdigest()


class Flow:
    """A source tensor while its rows come: the block that is in memory, and what it is read for."""

    def __init__(
        self, source: SourceTensor, rows: int, block: int, copy: RowOutput | None, want_digest: bool
    ) -> None:
        """The tensor comes in `rows`, `block` of them at a time at most; `copy` takes them too."""
        self.source = source
        self._copy = copy
        self._rows = max(1, rows)
        self._stored = source.stored_bytes
        self._row_bytes = source.spec.nbytes // max(1, rows)
        self._row_elements = source.spec.size // max(1, rows)
        self._buffer = np.empty(block * self._row_bytes, np.uint8)
        self._hasher = blake3() if want_digest and copy is None else None
        self.block = self._buffer
        self.first_element = 0

    def take(self, read: Reader, first: int, count: int) -> int:
        """Read rows `first` and following, `count` of them; how many stored bytes that takes."""
        self.block = self._buffer[: count * self._row_bytes]
        self.first_element = first * self._row_elements
        read(self.block.data)
        if self._hasher is not None:
            self._hasher.update(self.block.data)
        if self._copy is not None:
            spec = self.source.spec
            refuse_non_finite(
                self.source,
                TensorData(spec.dtype, self.block.view(NUMPY_NAME[spec.dtype])),
                self.first_element,
            )
            self._copy.append(self.block.data)
        before, after = (self._stored * row // self._rows for row in (first, first + count))
        return after - before

    def digest(self) -> str | None:
        """Digest of the whole tensor, when it was asked for or copied."""
        if self._copy is not None:
            return self._copy.digest()
        return self._hasher.hexdigest() if self._hasher is not None else None


class _FlowingAction:
    """An action whose inputs flow."""

    def __init__(
        self, action: Action, outputs: Sequence[RowOutput], flows: Mapping[str, Flow], rows: int
    ) -> None:
        """The flows come in `rows`; the action may see more of them, of the same bytes."""
        assert isinstance(action.op, ArrayOp)
        self._op = action.op
        self.action = action
        self.outputs = outputs
        self._inputs = [(flows[ref.identity], ref.spec) for ref in action.inputs]
        self._finer = first_axis(action.inputs[0].spec) // max(1, rows)

    def feed(self, count: int) -> None:
        """Apply the action to the `count` rows that the flows hold.

        CheckpointError for what it refuses.
        """
        blocks = [
            TensorData(
                spec.dtype,
                flow.block.view(NUMPY_NAME[spec.dtype]).reshape(
                    count * self._finer, *spec.shape[1:]
                ),
            )
            for flow, spec in self._inputs
        ]
        try:
            self._work(blocks)
        except NonFiniteValue as error:
            if error.operand is None:
                raise non_finite(self.action, error) from None
            index = self._inputs[error.operand][0].first_element + error.index
            raise non_finite(self.action, NonFiniteValue(index, error.operand)) from None
        except BadInput as error:
            first = self._inputs[error.operand][0].first_element
            raise bad_input(self.action, error.at(first)) from None

    def _work(self, blocks: Sequence[TensorData]) -> None:
        raise NotImplementedError


class RowAction(_FlowingAction):
    """An action applied to one block after another.

    The blocks' results share one set of buffers: fresh ones each time would have the threads
    wait for each other in the kernel's memory management.
    """

    def __init__(
        self,
        action: Action,
        outputs: Sequence[RowOutput],
        flows: Mapping[str, Flow],
        rows: int,
        block: int,
    ) -> None:
        """`block` is the most of the flows' rows that come at a time."""
        super().__init__(action, outputs, flows, rows)
        self._buffers = [
            np.empty((block * self._finer, *output.spec.shape[1:]), NUMPY_NAME[output.spec.dtype])
            for output in outputs
        ]
        self._figures: dict[int, list[Any]] = {index: [] for index in action.op.figures}

    def _work(self, blocks: Sequence[TensorData]) -> None:
        rows = len(blocks[0].array)
        results = [
            TensorData(output.spec.dtype, buffer[:rows])
            for output, buffer in zip(self.outputs, self._buffers, strict=True)
        ]
        self._op.apply(self.action.params, blocks, results)
        for output, result in zip(self.outputs, results, strict=True):
            output.append(as_bytes(result.array))
        for index, values in self._figures.items():
            values += results[index].array.reshape(-1).tolist()

    def figures(self) -> Mapping[int, Sequence[float]]:
        """The numbers in the outputs that are figures."""
        return self._figures

    def finish(self) -> None:
        """Nothing was held back."""


class TransposedAction(_FlowingAction):
    """A transposed action applied to one block after another; holds its outputs until the end."""

    def __init__(
        self, action: Action, outputs: Sequence[RowOutput], flows: Mapping[str, Flow], rows: int
    ) -> None:
        super().__init__(action, outputs, flows, rows)
        self._first = 0
        self._results = [
            TensorData(item.spec.dtype, np.empty(item.spec.shape, NUMPY_NAME[item.spec.dtype]))
            for item in outputs
        ]

    def _work(self, blocks: Sequence[TensorData]) -> None:
        (rows,) = blocks
        self._op.apply_rows(self.action.params, self._first, rows, self._results)
        self._first += len(rows.array)

    def figures(self) -> Mapping[int, Sequence[float]]:
        """The numbers in the outputs that are figures."""
        indices = self.action.op.figures
        return {index: self._results[index].array.reshape(-1).tolist() for index in indices}

    def finish(self) -> None:
        """Give the outputs away."""
        for output, result in zip(self.outputs, self._results, strict=True):
            output.append(as_bytes(result.array))


StreamAction = RowAction | TransposedAction


def as_bytes(array: np.ndarray[Any, Any]) -> memoryview:
    """The array's memory, which must be contiguous."""
    return array.reshape(-1).view(np.uint8).data


def stream(
    flows: Sequence[Flow],
    actions: Sequence[StreamAction],
    rows: int,
    block: int,
    progress: Callable[[int], None],
) -> None:
    """Read the sources of `flows` once, feeding every block of rows to `actions`."""
    with open_together([flow.source for flow in flows]) as readers:
        for first in range(0, rows, block):
            count = min(block, rows - first)
            for flow, read in zip(flows, readers, strict=True):
                progress(flow.take(read, first, count))
            for action in actions:
                action.feed(count)
    for action in actions:
        action.finish()


def read_digest(source: SourceTensor) -> str:
    """Digest of a source tensor, read for it alone."""
    rows = plain_rows(source.spec)
    block = block_rows(rows, source.spec.nbytes)
    flow = Flow(source, rows, block, None, True)
    stream([flow], [], rows, block, lambda count: None)
    digest = flow.digest()
    assert digest is not None
    return digest


def refuse_non_finite(source: SourceTensor, data: TensorData, first_element: int = 0) -> None:
    """CheckpointError for NaN or infinity in weights that are passed on as they are."""
    if data.dtype in WIDE_FLOATS:
        index = non_finite_index(data.array, data.dtype)
        if index >= 0:
            raise not_finite(source, first_element + index)


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
