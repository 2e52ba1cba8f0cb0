"""Running one action of a `ProcessOp`: look it up, give a worker files, take over what it wrote.

An action whose lasting outputs the store has is settled without its transient ones.  Should
another action turn out to need one of those after all, it is made again, and all before it that
have gone: for that action, and for those of this build that will ask for the same.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from carnice_build.dtypes import TensorSpec
from carnice_build.errors import StoreError
from carnice_build.execute.blame import bad_input, non_finite
from carnice_build.execute.jobs import Job
from carnice_build.execute.source_files import SourceFiles, own_folder
from carnice_build.execute.transients import own_link
from carnice_build.execute.workbench import JobResult, Workbench
from carnice_build.graph import (
    ActionOutput,
    BadInput,
    NonFiniteValue,
    ProcessOp,
    TensorRef,
    kept_unasked,
)
from carnice_build.store.files import hold_range
from carnice_build.store.packs import Location, digest_range
from carnice_build.tensor_file import TensorFile
from carnice_build.tensors import SourceTensor


class ProcessJob:
    """A job of one process op while it runs."""

    def __init__(self, bench: Workbench, job: Job) -> None:
        self._bench = bench
        self._job = job
        self._action = job.actions[0]
        assert isinstance(self._action.op, ProcessOp)
        self._op = self._action.op
        self._result = JobResult(settled=job.actions)
        self._sources = SourceFiles(bench, self._result)

    def run(self) -> JobResult:
        """Do the job and remember what it made; whoever wants the same waits and then finds it."""
        folder = own_folder(self._bench.scratch, self._action)
        folder.mkdir(exist_ok=True)
        try:
            digests = [self._learn(index, folder) for index in range(len(self._action.inputs))]
            with self._bench.store.lease(self._action.key(digests), "long"):
                if not self._is_settled(digests):
                    self._make(folder)
        finally:
            shutil.rmtree(folder)
        return self._result

    def _is_settled(self, digests: Sequence[str]) -> bool:
        """Use what the store has of the outputs; False when it lacks one that is to last."""
        action = self._action
        outputs = self._bench.store.lookup(action.key(digests), action.outputs)
        if outputs is None:
            return False
        places: dict[int, Location] = {}
        for index in range(len(action.outputs)):
            wanted = self._job.keeps(action, index) or self._job.sinks_of(action, index)
            place = outputs.locate(index) if wanted else None
            if place is not None:
                places[index] = place
            elif wanted and index not in self._op.transient:
                return False
        for index, digest in enumerate(outputs.digests):
            self._bench.digests[f"{action.identity}|{index}"] = digest
        for index, place in places.items():
            with suppress(FileNotFoundError):  # another build has just dropped it
                self._hold(index, place.path)
            count, digest = action.outputs[index].nbytes, outputs.digests[index]
            for sink in self._job.sinks_of(action, index):
                self._bench.copy(place, sink, count, digest, self._result)
        return True

    def _hold(self, index: int, path: Path) -> None:
        """Keep a transient output for its readers in this build, whoever else drops it."""
        if index in self._op.transient and self._job.keeps(self._action, index):
            own = own_link(self._bench.scratch, f"{self._action.identity}|{index}")
            own.unlink(missing_ok=True)
            hold_range(path, 0, self._action.outputs[index].nbytes, own)

    def _learn(self, index: int, folder: Path) -> str:
        """Digest of input `index`; a source that lies in no file may come into one of `folder`."""
        ref = self._action.inputs[index]
        if isinstance(ref.origin, SourceTensor):
            self._sources.learn(ref.origin, folder / f"in-{index}")
        return self._bench.digest_of(ref)

    def _place(self, ref: TensorRef) -> Location | None:
        own = own_link(self._bench.scratch, ref.identity)
        if own.exists():
            return Location(own, 0)
        return self._bench.store.locate(self._bench.digest_of(ref), ref.spec.nbytes)

    def _make(self, folder: Path) -> None:
        action = self._action
        outputs = self._compute(folder)
        figures = {index: outputs[index].read() for index in self._op.figures}
        digests = [self._take_over(index, file) for index, file in enumerate(outputs)]
        with self._bench.store.records.together():
            for index, figure in figures.items():
                self._bench.store.records.set_figure(digests[index], figure.reshape(-1).tolist())
            self._bench.remember(self._job, action, digests, self._result)

    def _compute(self, folder: Path) -> list[TensorFile]:
        """The outputs, as files in `folder`."""
        action = self._action
        outputs = [
            _empty_file(folder / f"out-{index}", spec) for index, spec in enumerate(action.outputs)
        ]
        inputs = [
            self._input(ref, folder / f"in-{index}") for index, ref in enumerate(action.inputs)
        ]
        try:
            self._bench.runner.run(action, inputs, outputs)
        except NonFiniteValue as error:
            raise non_finite(action, error) from None
        except BadInput as error:
            raise bad_input(action, error) from None
        return outputs

    def _input(self, ref: TensorRef, own: Path) -> TensorFile:
        """The input in a file that stays while the job runs; a new one is called `own`."""
        source = ref.origin
        if isinstance(source, SourceTensor):
            # The op sees the shape that the plan gives the bytes, not the checkpoint's.
            return replace(self._sources.file(source, own), spec=ref.spec)
        # Whoever needs what is gone waits for the first who makes it again.
        with self._bench.lock(f"outputs of {source.action.identity}"):
            place = self._place(ref)
            try:
                if place is not None:
                    # Another build may drop it meanwhile; a link of our own keeps the bytes.
                    offset = hold_range(place.path, place.offset, ref.spec.nbytes, own)
                    return TensorFile(ref.spec, str(own), offset)
            except FileNotFoundError:
                pass
            self._make_again(source, own)
        return TensorFile(ref.spec, str(own))

    def _make_again(self, output: ActionOutput, own: Path) -> None:
        """Put a transient tensor that is gone into the file `own`."""
        if not isinstance(output.action.op, ProcessOp):
            raise StoreError(
                f"what {self._op.name} reads was removed while this build ran",
                where=str(self._bench.store.root),
            )
        producer = ProcessJob(self._bench, Job([], [output.action], {}, frozenset()))
        with TemporaryDirectory(dir=self._bench.scratch) as folder:
            files = producer._compute(Path(folder))
            for index in producer._op.transient:
                identity = f"{output.action.identity}|{index}"
                if self._bench.awaited(identity):
                    held = own_link(self._bench.scratch, identity)
                    held.unlink(missing_ok=True)
                    hold_range(Path(files[index].path), 0, files[index].spec.nbytes, held)
            Path(files[output.index].path).rename(own)

    def _take_over(self, index: int, file: TensorFile) -> str:
        """Digest an output and put it where it is wanted."""
        action, path = self._action, Path(file.path)
        digest = digest_range(path, 0, file.spec.nbytes)
        assert digest is not None, f"{action.op.name} cut its output short"
        for sink in self._job.sinks_of(action, index):
            self._bench.packs[sink.layout].copy_from(
                Location(path, 0), sink.offset, file.spec.nbytes
            )
        transient = index in self._op.transient
        unasked = not transient and file.spec.nbytes <= kept_unasked(action)
        if unasked or self._job.keeps(action, index):
            self._hold(index, path)
            self._bench.store.adopt_blob(path, digest, durable=not transient)
        return digest


def _empty_file(path: Path, spec: TensorSpec) -> TensorFile:
    """A file of zeros that takes no disk yet."""
    with path.open("xb") as file:
        file.truncate(spec.nbytes)
    return TensorFile(spec, str(path))
