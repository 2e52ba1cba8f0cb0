"""Running one job: read, digest, look up, compute only what nobody has, write, remember.

The life of an action here:
*waiting* for the content of its inputs -> *found* (its key is in the cache and its outputs can be
copied) or *missing* -> *made*.
For a source that was never read, a sample of it foretells its content: actions that would be
found under that content are not computed while it is read; should the full digest then differ,
they are made in a second pass.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from carnice_build.checkpoint.together import read_together, together
from carnice_build.dtypes import NUMPY_NAME, TensorSpec
from carnice_build.execute.blame import bad_input, non_finite
from carnice_build.execute.jobs import Job, Sink
from carnice_build.execute.streaming import (
    Flow,
    RowAction,
    RowOutput,
    StreamAction,
    TransposedAction,
    as_bytes,
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

    # --- rows flow ----------------------------------------------------------------------------

    def _run_streaming(self) -> None:
        samples: dict[str, str] = {}
        for source in self._job.sources:
            known = self._bench.digests.get(source.identity)
            # Another build may have read it since this one was planned.
            known = known or self._records.source_digest(source.identity)
            if known is not None:
                self._bench.digests[source.identity] = known
            else:
                samples[source.identity] = sample_digest(source)
        with ExitStack() as locks:
            # In one order, or jobs on tensors that look alike would wait for each other.
            for sample in sorted(set(samples.values())):
                locks.enter_context(self._bench.lock(sample))
            self._stream(samples)

    def _stream(self, samples: Mapping[str, str]) -> None:
        """Do the work; `samples` are those of the sources that were never read, by identity."""
        foretold = {
            identity: expected
            for identity, sample in samples.items()
            if (expected := self._records.sampled_digest(sample))
        }
        found = self._lookup(self._job.actions, {**foretold, **self._known(samples)})
        missing = [action for action in self._job.actions if action.identity not in found]
        self._stream_through(missing, samples)
        deceived = {name for name in foretold if self._bench.digests[name] != foretold[name]}
        # A sample deceived us: the actions that looked found have other keys.
        unmade = [
            action
            for action, _ in found.values()
            if any(ref.identity in deceived for ref in action.inputs)
        ]
        if unmade:
            again = self._lookup(unmade, self._bench.digests)
            found = {name: item for name, item in found.items() if item[0] not in unmade} | again
            rest = [action for action in unmade if action.identity not in again]
            self._stream_through(rest, {}, copy=False)
        self._take_found(found)

    def _known(self, samples: Container[str]) -> dict[str, str]:
        """Digests of the sources that were read before."""
        names = (source.identity for source in self._job.sources)
        return {name: self._bench.digests[name] for name in names if name not in samples}

    def _stream_through(
        self, actions: Sequence[Action], samples: Mapping[str, str], *, copy: bool = True
    ) -> None:
        """Read sources once, for `actions`, for their digests where these are not known, and for
        the places that want them as they are.

        What is learnt is remembered in one transaction: an action's outputs without the
        sources' digests would not be found again.
        """
        job, bench = self._job, self._bench
        sinks = {s.identity: job.sinks.get(s.identity, ()) if copy else () for s in job.sources}
        read = {ref.identity for action in actions for ref in action.inputs}
        read |= {name for name, places in sinks.items() if places} | set(samples)
        rows, block = job.rows, job.block_rows
        assert rows is not None
        flows = {
            name: Flow(
                source,
                rows,
                block,
                RowOutput(source.spec, sinks[name], bench.packs) if sinks[name] else None,
                name in samples,
            )
            for source in job.sources
            if (name := source.identity) in read
        }
        if not flows:
            return
        flowing = [self._stream_action(action, flows, rows, block) for action in actions]
        stream(list(flows.values()), flowing, rows, block, bench.progress)
        with self._records.together():
            for name, flow in flows.items():
                self._note_read(flow, sinks[name], samples.get(name))
            for item in flowing:
                self._note_made(item)

    def _note_read(self, flow: Flow, sinks: Sequence[Sink], sample: str | None) -> None:
        source, digest = flow.source, flow.digest()
        self._result.read_bytes += source.stored_bytes
        if sample is not None:
            assert digest is not None
            self._bench.digests[source.identity] = digest
            self._records.set_source_digest(source.identity, digest)
            self._records.set_sampled_digest(sample, digest)
        self._bench.fill(sinks, source.spec, self._bench.digests[source.identity], self._result)

    def _note_made(self, item: StreamAction) -> None:
        digests = [output.digest() for output in item.outputs]
        for output, digest in zip(item.outputs, digests, strict=True):
            if output.own is not None:
                self._bench.store.adopt_blob(output.own, digest, durable=True)
        for index, values in item.figures().items():
            self._records.set_figure(digests[index], values)
        self._bench.remember(self._job, item.action, digests, self._result)

    # --- ops that need whole tensors ----------------------------------------------------------

    def _run_whole(self) -> None:
        arrays = {
            source.identity: self._loaded(source, data)
            for group in together(self._job.sources)
            for source, data in zip(group, _loaded_together(group), strict=True)
        }
        for action in self._job.actions:
            digests = [self._bench.digest_of(ref) for ref in action.inputs]
            # Equal tensors of several sources meet here: one is computed, the others find it.
            with self._bench.lock(action.key(digests)):
                found = self._bench.find(self._job, action, digests)
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

    def _loaded(self, source: SourceTensor, data: TensorData) -> TensorData:
        """The content of a source that was read, digested and written where it is wanted."""
        view = as_bytes(data.array)
        self._bench.progress(source.stored_bytes)
        self._result.read_bytes += source.stored_bytes
        digest = self._bench.digests.get(source.identity) or digest_bytes(view)
        self._bench.digests[source.identity] = digest
        sinks = self._job.sinks.get(source.identity, ())
        if sinks:
            refuse_non_finite(source, data)
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

    def _lookup(
        self, actions: Sequence[Action], digests: Mapping[str, str]
    ) -> dict[str, tuple[Action, Found]]:
        """The actions on sources of this content whose outputs are all in the store."""
        found = {}
        for action in actions:
            known = [digests[ref.identity] for ref in action.inputs if ref.identity in digests]
            complete = len(known) == len(action.inputs)
            outputs = self._bench.find(self._job, action, known) if complete else None
            if outputs is not None:
                found[action.identity] = (action, outputs)
        return found

    def _take_found(self, found: Mapping[str, tuple[Action, Found]]) -> None:
        for action, outputs in found.values():
            self._bench.take(self._job, action, outputs, self._result)

    def _stream_action(
        self, action: Action, flows: Mapping[str, Flow], rows: int, block: int
    ) -> StreamAction:
        assert isinstance(action.op, ArrayOp)
        outputs = [
            RowOutput(
                spec, self._job.sinks_of(action, index), self._bench.packs, self._own(action, index)
            )
            for index, spec in enumerate(action.outputs)
        ]
        if action.op.transposed:
            return TransposedAction(action, outputs, flows, rows)
        return RowAction(action, outputs, flows, rows, block)

    def _own(self, action: Action, index: int) -> Path | None:
        """Where an output grows that another job reads and no pack keeps."""
        keeps = self._job.keeps(action, index)
        return self._bench.scratch / f"{action.identity}-{index}" if keeps else None


def _loaded_together(group: Sequence[SourceTensor]) -> list[TensorData]:
    """The contents of sources for which the same bytes are read."""
    loaded = [_allocate(source.spec) for source in group]
    read_together(group, [as_bytes(data.array) for data in loaded])
    return loaded


def _allocate(spec: TensorSpec) -> TensorData:
    return TensorData(spec.dtype, np.empty(spec.shape, NUMPY_NAME[spec.dtype]))


def _zeros(spec: TensorSpec) -> TensorData:
    return TensorData(spec.dtype, np.zeros(spec.shape, NUMPY_NAME[spec.dtype]))
