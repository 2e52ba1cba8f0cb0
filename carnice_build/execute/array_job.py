"""Running one job: read, digest, look up, compute only what nobody has, write, remember.

The life of an action here:
*waiting* for the content of its inputs -> *found* (its key is in the cache and its outputs can be
copied) or *missing* -> *made*.
For a source that was never read, a sample of it foretells its content: actions that would be
found under that content are not computed while it is read; should the full digest then differ,
they are made in a second pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from carnice_build.dtypes import NUMPY_NAME, TensorSpec
from carnice_build.errors import CheckpointError
from carnice_build.execute.jobs import Job
from carnice_build.execute.streaming import (
    RowAction,
    RowOutput,
    StreamAction,
    TransposedAction,
    as_bytes,
    block_rows,
    refuse_non_finite,
    sample_digest,
    stream,
)
from carnice_build.execute.workbench import Found, JobResult, Workbench
from carnice_build.graph import Action, ArrayOp, BadInput, NonFiniteValue, TensorData, TensorRef
from carnice_build.store.digests import digest_bytes
from carnice_build.store.store import read_location
from carnice_build.tensors import SourceTensor


class ArrayJob:
    """A job of array ops while it runs."""

    def __init__(self, bench: Workbench, job: Job) -> None:
        self._bench = bench
        self._records = bench.store.records
        self._job = job
        self._result = JobResult(settled=job.actions)

    def run(self) -> JobResult:
        """Do all of the job and remember what it made; other builds wait and then find it."""
        with self._bench.store.lease(self._job.identity):
            if self._job.streams:
                self._run_streaming()
            else:
                self._run_whole()
        return self._result

    # --- one source, rows flow ---------------------------------------------------------------

    def _run_streaming(self) -> None:
        source = self._job.sources[0]
        known = self._bench.digests.get(source.identity)
        # Another build may have read it since this one was planned.
        known = known or self._records.source_digest(source.identity)
        if known is not None:
            self._bench.digests[source.identity] = known
            self._stream_known(source, known)
            return
        sample = sample_digest(source)
        with self._bench.lock(sample):
            self._stream_unread(source, sample)

    def _stream_known(self, source: SourceTensor, digest: str) -> None:
        found = self._lookup(self._job.actions, digest)
        missing = [action for action in self._job.actions if action.identity not in found]
        self._stream_through(source, missing, digest)
        self._take_found(found)

    def _stream_unread(self, source: SourceTensor, sample: str) -> None:
        actions = self._job.actions
        expected = self._records.sampled_digest(sample)
        found = self._lookup(actions, expected) if expected else {}
        missing = [action for action in actions if action.identity not in found]
        digest = self._stream_through(source, missing, None, sample)
        if digest != expected and found:
            # The sample deceived us: the actions that looked found have other keys.
            unmade = [action for action in actions if action.identity in found]
            found = self._lookup(unmade, digest)
            rest = [action for action in unmade if action.identity not in found]
            self._stream_through(source, rest, digest, copy=False)
        self._take_found(found)

    def _stream_through(
        self,
        source: SourceTensor,
        actions: Sequence[Action],
        digest: str | None,
        sample: str | None = None,
        copy: bool = True,
    ) -> str:
        """Read `source` once for `actions` and for the places that want it as it is.

        What is learnt is remembered in one transaction: an action's outputs without the
        source's digest would not be found again.
        """
        sinks = self._job.sinks.get(source.identity, ()) if copy else ()
        if digest is not None and not actions and not sinks:
            return digest
        passed = RowOutput(source.spec, sinks, self._bench.packs) if sinks else None
        block = block_rows(source.spec)
        rows = [self._stream_action(action, block) for action in actions]
        try:
            read = stream(source, rows, passed, digest is None, self._bench.progress)
        except NonFiniteValue as error:
            raise _non_finite(source, error.index) from None
        except BadInput as error:
            raise _bad_input(source, error) from None
        digest = digest or read
        assert digest is not None
        self._result.read_bytes += source.spec.nbytes
        self._bench.digests[source.identity] = digest
        with self._records.together():
            if sample is not None:
                self._records.set_source_digest(source.identity, digest)
                self._records.set_sampled_digest(sample, digest)
            self._bench.fill(sinks, source.spec, digest, self._result)
            for row in rows:
                self._bench.remember(
                    self._job, row.action, [output.digest() for output in row.outputs], self._result
                )
        return digest

    # --- several sources, or ops that need whole tensors --------------------------------------

    def _run_whole(self) -> None:
        arrays = {source.identity: self._load_source(source) for source in self._job.sources}
        for action in self._job.actions:
            digests = [self._bench.digest_of(ref) for ref in action.inputs]
            # Equal tensors of several sources meet here: one is computed, the others find it.
            with self._bench.lock(action.key(digests)):
                found = self._bench.find(action, digests)
                if found is not None:
                    self._bench.take(self._job, action, found, self._result)
                    continue
                inputs = [self._operand(ref, arrays) for ref in action.inputs]
                assert isinstance(action.op, ArrayOp)
                passes = action.op.passes(digests)
                outputs = self._apply(action, inputs, passes)
                self._write_outputs(action, outputs, ran=passes is None)
            for index, output in enumerate(outputs):
                arrays[f"{action.identity}|{index}"] = output

    def _load_source(self, source: SourceTensor) -> TensorData:
        assert source.file is not None
        data = _allocate(source.spec)
        view = as_bytes(data.array)
        source.file.read_into(source.offset, view)
        self._bench.progress(len(view))
        self._result.read_bytes += len(view)
        digest = self._bench.digests.get(source.identity) or digest_bytes(view)
        self._bench.digests[source.identity] = digest
        sinks = self._job.sinks.get(source.identity, ())
        if sinks:
            _refuse(source, data)
        for sink in sinks:
            self._bench.packs[sink.layout].write(sink.offset, view)
        with self._records.together():
            self._records.set_source_digest(source.identity, digest)
            self._bench.fill(sinks, source.spec, digest, self._result)
        return data

    def _operand(self, ref: TensorRef, arrays: Mapping[str, TensorData]) -> TensorData:
        data = arrays.get(ref.identity)
        if data is None:
            data = _allocate(ref.spec)
            location = self._bench.store.locate(self._bench.digest_of(ref), ref.spec.nbytes)
            assert location is not None, "an input that was planned as cached is gone"
            read_location(location, as_bytes(data.array))
        return TensorData(ref.spec.dtype, data.array.reshape(ref.spec.shape))

    def _apply(
        self, action: Action, inputs: list[TensorData], passes: Sequence[int | None] | None
    ) -> list[TensorData]:
        """The outputs: computed, or for an action that `passes`, inputs and zeros."""
        assert isinstance(action.op, ArrayOp)
        try:
            if passes is not None:
                action.op.check(action.params, inputs)
                pairs = zip(passes, action.outputs, strict=True)
                return [_zeros(spec) if i is None else inputs[i] for i, spec in pairs]
            outputs = [_allocate(spec) for spec in action.outputs]
            action.op.apply(action.params, inputs, outputs)
            return outputs
        except NonFiniteValue as error:
            raise non_finite(action, error) from None
        except BadInput as error:
            raise bad_input(action, error) from None

    def _write_outputs(self, action: Action, outputs: Sequence[TensorData], *, ran: bool) -> None:
        digests = [
            self._write_output(action, index, output) for index, output in enumerate(outputs)
        ]
        with self._records.together():
            for index in action.op.figures:
                self._records.set_figure(digests[index], outputs[index].array.reshape(-1).tolist())
            self._bench.remember(self._job, action, digests, self._result, ran=ran)

    def _write_output(self, action: Action, index: int, output: TensorData) -> str:
        view = as_bytes(output.array)
        if self._job.keeps(action, index):
            self._bench.store.put_blob(view)
        for sink in self._job.sinks_of(action, index):
            self._bench.packs[sink.layout].write(sink.offset, view)
        return digest_bytes(view)

    # --- the cache ----------------------------------------------------------------------------

    def _lookup(self, actions: Sequence[Action], digest: str) -> dict[str, tuple[Action, Found]]:
        """The actions on a source of this content whose outputs are all in the store."""
        found = {}
        for action in actions:
            outputs = self._bench.find(action, [digest])
            if outputs is not None:
                found[action.identity] = (action, outputs)
        return found

    def _take_found(self, found: Mapping[str, tuple[Action, Found]]) -> None:
        for action, outputs in found.values():
            self._bench.take(self._job, action, outputs, self._result)

    def _stream_action(self, action: Action, block: int) -> StreamAction:
        assert isinstance(action.op, ArrayOp)
        outputs = self._row_outputs(action)
        if action.op.transposed:
            return TransposedAction(action, outputs)
        return RowAction(action, outputs, block)

    def _row_outputs(self, action: Action) -> list[RowOutput]:
        return [
            RowOutput(spec, self._job.sinks_of(action, index), self._bench.packs)
            for index, spec in enumerate(action.outputs)
        ]


def _allocate(spec: TensorSpec) -> TensorData:
    return TensorData(spec.dtype, np.empty(spec.shape, NUMPY_NAME[spec.dtype]))


def _zeros(spec: TensorSpec) -> TensorData:
    return TensorData(spec.dtype, np.zeros(spec.shape, NUMPY_NAME[spec.dtype]))


def _refuse(source: SourceTensor, data: TensorData) -> None:
    try:
        refuse_non_finite(data)
    except NonFiniteValue as error:
        raise _non_finite(source, error.index) from None


def non_finite(action: Action, error: NonFiniteValue) -> CheckpointError:
    """The error for NaN or infinity in an input of `action`."""
    origin = action.inputs[error.operand].origin
    if isinstance(origin, SourceTensor):
        return _non_finite(origin, error.index)
    return CheckpointError(f"{action.op.name} met NaN or infinity")


def bad_input(action: Action, error: BadInput) -> CheckpointError:
    """The error for an input of `action` that its op refuses."""
    origin = action.inputs[error.operand].origin
    if isinstance(origin, SourceTensor):
        return _bad_input(origin, error)
    return CheckpointError(f"{action.op.name} {error.what}", expected=error.expected)


def _bad_input(source: SourceTensor, error: BadInput) -> CheckpointError:
    return CheckpointError(
        f"tensor {source.name!r} {error.what}",
        where=source.file.name if source.file else None,
        expected=error.expected,
    )


def _non_finite(source: SourceTensor, index: int) -> CheckpointError:
    return CheckpointError(
        f"tensor {source.name!r} holds NaN or infinity at element {index}",
        where=source.file.name if source.file else None,
        expected="finite weights, or, where the format has it, `nonfinite: zero` under `quantize`",
    )
