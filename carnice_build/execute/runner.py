"""Running one job: read, digest, look up, compute only what nobody has, write, remember.

The life of an action here:
*waiting* for the content of its inputs -> *found* (its key is in the cache and its outputs can be
copied) or *missing* -> *made*.
For a source that was never read, a sample of it foretells its content: actions that would be
found under that content are not computed while it is read; should the full digest then differ,
they are made in a second pass.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import numpy as np

from carnice_build.checkpoint.checkpoint import SourceTensor
from carnice_build.checkpoint.dtypes import NUMPY_NAME, TensorSpec
from carnice_build.errors import CheckpointError
from carnice_build.execute.isolated import Workers
from carnice_build.execute.jobs import Job, Placement, Sink
from carnice_build.execute.streaming import (
    RowAction,
    RowOutput,
    as_bytes,
    block_rows,
    refuse_non_finite,
    sample_digest,
    stream,
)
from carnice_build.graph import Action, NonFiniteValue, TensorData, TensorRef
from carnice_build.store.digests import digest_bytes
from carnice_build.store.packs import Location, PartialPack
from carnice_build.store.store import Store, read_location


@dataclass
class JobResult:
    """What a job did: filled places by layout, and the actions that it ran."""

    filled: list[tuple[Sink, str]] = field(default_factory=list)
    made: list[Action] = field(default_factory=list)
    read_bytes: int = 0
    written_bytes: int = 0


class Runner:
    """Runs jobs of one build; used by several threads at once."""

    def __init__(
        self,
        store: Store,
        packs: Mapping[str, PartialPack],
        workers: Workers,
        progress: Callable[[int], None],
        digests: Mapping[str, str],
    ) -> None:
        """`digests` holds what the plan knew of refs' content, by identity."""
        self._store = store
        self._packs = packs
        self._workers = workers
        self._progress = progress
        self._digests = dict(digests)
        self._locks: dict[str, threading.Lock] = {}
        self._locks_guard = threading.Lock()

    def place(self, placement: Placement) -> JobResult:
        """Copy a tensor from one file of the cache into a pack."""
        result = JobResult()
        self._copy(placement.location, placement.sink, placement.count, placement.digest, result)
        return result

    def run(self, job: Job) -> JobResult:
        """Do all of `job` and remember what it made; other builds wait and then find it."""
        with self._store.lease(job.identity):
            return _JobRun(self, job).run()

    def _copy(
        self, location: Location, sink: Sink, count: int, digest: str, result: JobResult
    ) -> None:
        pack = self._packs[sink.layout]
        # A resumed pack may hold these very bytes already.
        if location != Location(pack.path, sink.offset):
            pack.copy_from(location, sink.offset, count)
            result.written_bytes += count
        self._store.records.set_place(digest, sink.layout, sink.offset)
        result.filled.append((sink, digest))

    def lock(self, name: str) -> AbstractContextManager[object]:
        """A lock that all jobs of this build share under `name`."""
        with self._locks_guard:
            return self._locks.setdefault(name, threading.Lock())


class _JobRun:
    """The state of one job while it runs."""

    def __init__(self, runner: Runner, job: Job) -> None:
        self._runner = runner
        self._store = runner._store
        self._job = job
        self._result = JobResult()
        self._learned: dict[str, str] = {}

    def run(self) -> JobResult:
        if self._job.streams:
            self._run_streaming()
        else:
            self._run_whole()
        return self._result

    def _digest_of(self, ref: TensorRef) -> str:
        return self._learned.get(ref.identity) or self._runner._digests[ref.identity]

    # --- one source, rows flow ---------------------------------------------------------------

    def _run_streaming(self) -> None:
        source = self._job.sources[0]
        known = self._runner._digests.get(source.identity)
        # Another build may have read it since this one was planned.
        known = known or self._store.records.source_digest(source.identity)
        if known is not None:
            self._learned[source.identity] = known
            self._stream_known(source, known)
            return
        sample = sample_digest(source)
        with self._runner.lock(sample):
            self._stream_unread(source, sample)

    def _stream_known(self, source: SourceTensor, digest: str) -> None:
        found = self._lookup(self._job.actions, digest)
        missing = [action for action in self._job.actions if action.identity not in found]
        self._stream_through(source, missing, digest)
        self._take_found(found)

    def _stream_unread(self, source: SourceTensor, sample: str) -> None:
        actions = self._job.actions
        expected = self._store.records.sampled_digest(sample)
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
        passed = RowOutput(source.spec, sinks, self._runner._packs) if sinks else None
        block = block_rows(source.spec)
        rows = [RowAction(action, self._row_outputs(action), block) for action in actions]
        try:
            read = stream(source, rows, passed, digest is None, self._runner._progress)
        except NonFiniteValue as error:
            raise _non_finite(source, error.index) from None
        digest = digest or read
        assert digest is not None
        self._result.read_bytes += source.spec.nbytes
        self._learned[source.identity] = digest
        with self._store.records.together():
            if sample is not None:
                self._store.records.set_source_digest(source.identity, digest)
                self._store.records.set_sampled_digest(sample, digest)
            self._fill(sinks, source.spec, digest)
            for row in rows:
                self._remember(row.action, [output.digest() for output in row.outputs])
        return digest

    def _row_outputs(self, action: Action) -> list[RowOutput]:
        return [
            RowOutput(spec, self._output_sinks(action, index), self._runner._packs)
            for index, spec in enumerate(action.outputs)
        ]

    # --- several sources, or ops that need whole tensors --------------------------------------

    def _run_whole(self) -> None:
        arrays = {source.identity: self._load_source(source) for source in self._job.sources}
        for action in self._job.actions:
            digests = [self._digest_of(ref) for ref in action.inputs]
            found = self._lookup_one(action, digests)
            if found is not None:
                self._take_found({action.identity: (action, found)})
                continue
            inputs = [self._operand(ref, arrays) for ref in action.inputs]
            outputs = self._apply(action, inputs)
            self._write_outputs(action, outputs)
            for index, output in enumerate(outputs):
                arrays[f"{action.identity}|{index}"] = output

    def _load_source(self, source: SourceTensor) -> TensorData:
        assert source.file is not None
        data = _allocate(source.spec)
        view = as_bytes(data.array)
        source.file.read_into(source.offset, view)
        self._runner._progress(len(view))
        self._result.read_bytes += len(view)
        digest = self._runner._digests.get(source.identity) or digest_bytes(view)
        self._learned[source.identity] = digest
        sinks = self._job.sinks.get(source.identity, ())
        if sinks:
            _refuse(source, data)
        for sink in sinks:
            self._runner._packs[sink.layout].write(sink.offset, view)
        with self._store.records.together():
            self._store.records.set_source_digest(source.identity, digest)
            self._fill(sinks, source.spec, digest)
        return data

    def _operand(self, ref: TensorRef, arrays: Mapping[str, TensorData]) -> TensorData:
        data = arrays.get(ref.identity)
        if data is None:
            data = _allocate(ref.spec)
            location = self._store.locate(self._digest_of(ref), ref.spec.nbytes)
            assert location is not None, "an input that was planned as cached is gone"
            read_location(location, as_bytes(data.array))
        return TensorData(ref.spec.dtype, data.array.reshape(ref.spec.shape))

    def _apply(self, action: Action, inputs: list[TensorData]) -> list[TensorData]:
        try:
            if action.op.isolated:
                return self._runner._workers.apply(action, inputs)
            outputs = [_allocate(spec) for spec in action.outputs]
            action.op.apply(action.params, inputs, outputs)
            return outputs
        except NonFiniteValue as error:
            origin = action.inputs[0].origin
            if isinstance(origin, SourceTensor):
                raise _non_finite(origin, error.index) from None
            raise CheckpointError(f"{action.op.name} met NaN or infinity") from None

    def _write_outputs(self, action: Action, outputs: Sequence[TensorData]) -> None:
        digests = []
        for index, output in enumerate(outputs):
            view = as_bytes(output.array)
            if f"{action.identity}|{index}" in self._job.blobs:
                self._store.put_blob(view)
            for sink in self._output_sinks(action, index):
                self._runner._packs[sink.layout].write(sink.offset, view)
            digests.append(digest_bytes(view))
        with self._store.records.together():
            self._remember(action, digests)

    # --- the cache ----------------------------------------------------------------------------

    def _lookup(
        self, actions: Sequence[Action], digest: str
    ) -> dict[str, tuple[Action, list[tuple[str, Location]]]]:
        """The actions on a source of this content whose outputs are all in the store."""
        found = {}
        for action in actions:
            outputs = self._lookup_one(action, [digest])
            if outputs is not None:
                found[action.identity] = (action, outputs)
        return found

    def _lookup_one(
        self, action: Action, digests: Sequence[str]
    ) -> list[tuple[str, Location]] | None:
        outputs = self._store.records.outputs(action.key(digests), len(action.outputs))
        if outputs is None:
            return None
        places = []
        for digest, spec in zip(outputs, action.outputs, strict=True):
            location = self._store.locate(digest, spec.nbytes)
            if location is None:
                return None
            places.append((digest, location))
        return places

    def _take_found(
        self, found: Mapping[str, tuple[Action, Sequence[tuple[str, Location]]]]
    ) -> None:
        for action, outputs in found.values():
            for index, (digest, location) in enumerate(outputs):
                identity = f"{action.identity}|{index}"
                self._learned[identity] = self._runner._digests[identity] = digest
                for sink in self._output_sinks(action, index):
                    count = action.outputs[index].nbytes
                    self._runner._copy(location, sink, count, digest, self._result)

    def _remember(self, action: Action, digests: Sequence[str]) -> None:
        inputs = [self._digest_of(ref) for ref in action.inputs]
        self._store.records.set_outputs(action.key(inputs), digests)
        for index, digest in enumerate(digests):
            identity = f"{action.identity}|{index}"
            self._learned[identity] = self._runner._digests[identity] = digest
            self._fill(self._output_sinks(action, index), action.outputs[index], digest)
        self._result.made.append(action)

    def _output_sinks(self, action: Action, index: int) -> Sequence[Sink]:
        return self._job.sinks.get(f"{action.identity}|{index}", ())

    def _fill(self, sinks: Sequence[Sink], spec: TensorSpec, digest: str) -> None:
        for sink in sinks:
            self._store.records.set_place(digest, sink.layout, sink.offset)
            self._result.filled.append((sink, digest))
            self._result.written_bytes += spec.nbytes


def _allocate(spec: TensorSpec) -> TensorData:
    return TensorData(spec.dtype, np.empty(spec.shape, NUMPY_NAME[spec.dtype]))


def _refuse(source: SourceTensor, data: TensorData) -> None:
    try:
        refuse_non_finite(data)
    except NonFiniteValue as error:
        raise _non_finite(source, error.index) from None


def _non_finite(source: SourceTensor, index: int) -> CheckpointError:
    return CheckpointError(
        f"tensor {source.name!r} holds NaN or infinity at element {index}",
        where=source.file.name if source.file else None,
        expected="finite weights, or `nonfinite: zero` under `quantize`",
    )
