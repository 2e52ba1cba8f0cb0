"""Checkpoints on the Hugging Face hub, at one commit.

A plan fetches the list of files, config.json, the index and the shards' headers.
Weights are fetched when they are first read: a whole shard into the Hugging Face cache or, to
keep nothing on disk, the wanted ranges alone (see `http_file`).
"""

from __future__ import annotations

import errno
import hashlib
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import tqdm

from carnice_build.checkpoint.checkpoint import Checkpoint, assemble_checkpoint
from carnice_build.checkpoint.header import Header, read_header
from carnice_build.checkpoint.http_file import LIBRARY, RemoteFile, Repository
from carnice_build.checkpoint.hub_listing import Notes, find_listing
from carnice_build.checkpoint.patience import OFFLINE, Interruption, patiently
from carnice_build.checkpoint.source import LocalFile
from carnice_build.errors import BuildError, CheckpointError, nearest
from carnice_build.tensors import ByteSource, Reader
from carnice_build.version import __version__

_HEAD_BYTES = 1 << 16
_PARALLEL_HEADERS = 8
_DOWNLOADS = 3


def open_hub(model: str, revision: str, *, stream: bool) -> tuple[Checkpoint, str]:
    """The checkpoint of a repository, opened on its headers, and the commit of `revision`.

    With `stream`, weights that the Hugging Face cache does not hold are read by range and never
    put on disk; otherwise the first read of a shard downloads it.
    """
    notes = Notes(model)
    listing = find_listing(model, revision, notes)
    repository = Repository(constants.ENDPOINT, model, listing.commit)
    files: dict[str, ByteSource] = {
        name: HubFile(
            repository, name, size, content, notes, stream and name.endswith(".safetensors")
        )
        for name, (size, content) in sorted(listing.files.items())
    }
    try:
        checkpoint = assemble_checkpoint(
            str(repository), files, others=listing.others, read_headers=_read_headers
        )
    except CheckpointError as error:
        if listing.whole or error.expected:
            raise
        why = f"; {OFFLINE} is on" if constants.is_offline_mode() else ""
        raise CheckpointError(
            f"{error.what} from the Hugging Face cache{why}",
            where=error.where,
            expected="the rest of the repository there, or a network",
            problems=error.problems,
        ) from None
    return checkpoint, listing.commit


def open_hub_file(model: str, revision: str, file: str) -> ByteSource:
    """One file of a repository; CheckpointError where there is none of that name."""
    notes = Notes(model)
    listing = find_listing(model, revision, notes, file)
    repository = Repository(constants.ENDPOINT, model, listing.commit)
    if file not in listing.files:
        raise CheckpointError(
            f"has no file {file}",
            where=str(repository),
            nearest=nearest(file, (*listing.files, *listing.others)),
        )
    size, content = listing.files[file]
    return HubFile(repository, file, size, content, notes, stream=False)


def _read_headers(shards: Sequence[ByteSource]) -> Iterator[Header]:
    with ThreadPoolExecutor(_PARALLEL_HEADERS, thread_name_prefix="carnice-header") as pool:
        yield from pool.map(HubFile.header, shards)


class HubFile:
    """A file of a repository: read from the Hugging Face cache, or where it is."""

    local = False

    def __init__(
        self,
        repository: Repository,
        file: str,
        size: int,
        content: str,
        notes: Notes,
        stream: bool,
    ) -> None:
        self._remote = RemoteFile(repository, file, size, content)
        self._repository = repository
        self._file = file
        self._content = content
        self._notes = notes
        self._stream = stream
        self._lock = threading.Lock()
        self._source: ByteSource | None = None
        self.name = self._remote.name
        self.size = size
        self.identity = self._remote.identity
        self.random_access = not stream

    @property
    def in_files(self) -> bool:
        """True unless it is streamed."""
        return not self._stream or self._cached() is not None

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """See `Readable.read_into`; the first read may download the file."""
        self._place().read_into(offset, buffer)

    def open_range(self, offset: int, count: int) -> AbstractContextManager[Reader]:
        """See `ByteSource.open_range`; the first read may download the file."""
        return self._place().open_range(offset, count)

    def path(self) -> Path | None:
        """See `ByteSource.path`; may download the file."""
        return self._place().path()

    def header(self) -> Header:
        """The header of a shard, by range and without its weights; remembered."""
        known = self._notes.read("header", self._content)
        head = _Head(self._cached() or self._remote, self.name, known)
        header = read_header(head)
        if not known:
            self._notes.write("header", self._content, head.content)
        return header

    def _place(self) -> ByteSource:
        with self._lock:
            if self._source is None:
                self._source = self._cached() or (self._remote if self._stream else self._fetch())
            return self._source

    def _cached(self) -> LocalFile | None:
        repository = self._repository
        path = try_to_load_from_cache(
            repository.model,
            self._file,
            cache_dir=constants.HF_HUB_CACHE,
            revision=repository.commit,
        )
        return self._open(Path(path)) if isinstance(path, str) else None

    def _open(self, path: Path) -> LocalFile:
        file = LocalFile(path)
        if file.size != self.size:
            raise CheckpointError(
                f"has {file.size} bytes in the Hugging Face cache, {self.size} on the hub",
                where=self.name,
                expected=f"the same; remove {path}",
            )
        return file

    def _fetch(self) -> LocalFile:
        path = patiently(self._download, self.name, self._remote.refusal, _DOWNLOADS)
        if _content_id(path, len(self._content)) != self._content:
            # What cannot be trusted must not be found again.
            path.resolve().unlink(missing_ok=True)
            path.unlink(missing_ok=True)
            raise CheckpointError(
                "what was downloaded has another hash than the hub's list says", where=self.name
            )
        return self._open(path)

    def _download(self) -> Path:
        repository = self._repository
        quiet: Any = partial(tqdm, disable=True)
        try:
            path = hf_hub_download(
                repository.model,
                self._file,
                revision=repository.commit,
                cache_dir=constants.HF_HUB_CACHE,
                endpoint=repository.endpoint,
                library_name=LIBRARY,
                library_version=__version__,
                tqdm_class=quiet,
            )
        except RuntimeError:  # hf_xet has no error class of its own
            raise Interruption("the download from Xet broke off") from None
        except OSError as error:
            raise self._reason(error) from None
        return Path(path)

    def _reason(self, error: OSError) -> Exception:
        """The HTTP error behind what the library raised, or words for an error of the disk."""
        if isinstance(error, HfHubHTTPError | OfflineModeIsEnabled):
            return error
        if isinstance(error.__cause__, HfHubHTTPError | OfflineModeIsEnabled):
            return error.__cause__
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return BuildError(
                f"the disk is full: {self.name} does not fit",
                where=constants.HF_HUB_CACHE,
                expected=f"{self.size} bytes free, another HF_HOME, or --stream",
            )
        if error.errno is not None:
            return BuildError(
                f"cannot download {self.name}: {error.strerror}", where=constants.HF_HUB_CACHE
            )
        return Interruption(f"the download broke off ({type(error).__name__})")


def _content_id(path: Path, length: int) -> str:
    """SHA-256 for a file in LFS or Xet, git's hash of a blob for one in git itself."""
    with path.open("rb") as file:
        if length == 64:
            return hashlib.file_digest(file, "sha256").hexdigest()
        blob = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
        return hashlib.file_digest(file, lambda: blob).hexdigest()


class _Head:
    """The beginning of a shard, fetched in one or two requests, for `read_header`."""

    def __init__(self, source: ByteSource, name: str, known: bytes) -> None:
        self._source = source
        self._bytes = known
        self.name = name
        self.size = source.size

    @property
    def content(self) -> bytes:
        """The header with its length field, once it was read."""
        return self._bytes[: 8 + int.from_bytes(self._bytes[:8], "little")]

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """See `Readable.read_into`."""
        end = offset + len(buffer)
        start = len(self._bytes)
        if end > start:
            wanted = bytearray(min(max(end, _HEAD_BYTES), self.size) - start)
            self._source.read_into(start, memoryview(wanted))
            self._bytes += bytes(wanted)
        buffer[:] = self._bytes[offset:end]
