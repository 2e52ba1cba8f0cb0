"""What a process is given of sources: the files in which they lie, or copies of what is in none.

A copy is made once for all jobs that have the source at the same time.
Those of a layer may come while the one before it is computed (see `look_ahead`).
"""

from __future__ import annotations

from pathlib import Path

from blake3 import blake3

from carnice_build.execute.jobs import PIECE_BYTES
from carnice_build.execute.streaming import read_digest
from carnice_build.execute.workbench import JobResult, Workbench
from carnice_build.graph import Action
from carnice_build.planning.scratch import transient_inputs
from carnice_build.planning.status import Contents
from carnice_build.store.files import hold_range
from carnice_build.system import will_read
from carnice_build.tensor_file import TensorFile
from carnice_build.tensors import SourceTensor, places


def own_folder(scratch: Path, action: Action) -> Path:
    """Where a build keeps the files of an action that a process is to run, and of no other."""
    return scratch / action.identity


def fetch_ahead(bench: Workbench, action: Action) -> JobResult:
    """Have the sources of `action` here when it begins, unless that is about to happen.

    Once its other inputs are there nothing is computed meanwhile; and where the store knows what
    they will be, it may have what is made of them.
    """
    result = JobResult()
    contents = Contents(bench.store, dict(bench.digests))
    if any(contents.digest(ref) is None for ref in transient_inputs(action)):
        files = SourceFiles(bench, result)
        folder = own_folder(bench.scratch, action)
        folder.mkdir()
        for index, ref in enumerate(action.inputs):
            if bench.failed.is_set():
                break
            if isinstance(ref.origin, SourceTensor):
                files.expect(ref.origin, folder / f"in-{index}")
    return result


class SourceFiles:
    """Gives sources to jobs of `bench`; what is read for them is counted in `result`."""

    def __init__(self, bench: Workbench, result: JobResult) -> None:
        self._bench = bench
        self._result = result

    def expect(self, source: SourceTensor, own: Path) -> None:
        """Do what can be done for it before it is asked for, with the same arguments."""
        self.learn(source, own)
        for place in places(source) or ():
            will_read(*place)
        self.file(source, own)

    def learn(self, source: SourceTensor, own: Path) -> None:
        """Find out the digest; a source that nobody has read yet is read for it.

        One that lies in no file comes into the new file `own` on the way.
        """
        if source.identity in self._bench.digests:
            return
        records = self._bench.store.records
        # Parts of a calibration begin a layer together.
        with self._bench.lock(f"digest of {source.identity}"):
            digest = records.source_digest(source.identity)
            if digest is None:
                if places(source):
                    digest = read_digest(source)
                    self._result.read_bytes += source.stored_bytes
                else:
                    with self._bench.lock(f"copy of {source.identity}"):
                        digest = self._fetch(source, own)
                records.set_source_digest(source.identity, digest)
            self._bench.digests[source.identity] = digest

    def file(self, source: SourceTensor, own: Path) -> TensorFile:
        """The source in files that stay while the job runs: its own, or `own`, a copy."""
        found = places(source)
        if found:
            path, offset, _ = found[0]
            ranges = tuple(found) if len(found) > 1 else ()
            return TensorFile(source.spec, str(path), offset, source.name, ranges)
        if not own.exists():
            self._copy(source, own)
        return TensorFile(source.spec, str(own), 0, source.name)

    def _copy(self, source: SourceTensor, own: Path) -> None:
        """Put the source into `own`; from a job that has it, if there is one."""
        copies = self._bench.copies
        with self._bench.lock(f"copy of {source.identity}"):
            try:
                hold_range(copies[source.identity], 0, source.spec.nbytes, own)
                copies[source.identity] = own
            except (KeyError, FileNotFoundError):
                self._fetch(source, own)

    def _fetch(self, source: SourceTensor, own: Path) -> str:
        """Read the source into `own`, for all jobs; returns its digest."""
        digest = _download(source, own)
        self._result.read_bytes += source.stored_bytes
        self._bench.copies[source.identity] = own
        return digest


def _download(source: SourceTensor, path: Path) -> str:
    """Put the source into a new file; returns its digest."""
    assert source.file is not None
    buffer = bytearray(min(PIECE_BYTES, source.spec.nbytes))
    hasher = blake3()
    with source.file.open_range(source.offset, source.spec.nbytes) as read, path.open("xb") as out:
        left = source.spec.nbytes
        while left:
            block = memoryview(buffer)[: min(left, len(buffer))]
            read(block)
            hasher.update(block)
            out.write(block)
            left -= len(block)
    return hasher.hexdigest()
