"""A file of a hub repository read over HTTP by range: every answer checked, nothing put on disk.

The hub is asked once where a file is; its answer also says what the file is (X-Linked-Etag, the
SHA-256 of a large file).  Ranges then come from that place, often a CDN, which never sees the
token.
Whatever fails on the way is tried again from the byte it reached; whatever is wrong is an error.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from urllib.parse import urlsplit

import httpx
from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
from huggingface_hub.utils import build_hf_headers

from carnice_build.checkpoint.patience import (
    BROKEN,
    Interruption,
    Patience,
    interruptions,
    judge,
    refused,
)
from carnice_build.checkpoint.transport import Receive, client, receiver
from carnice_build.errors import CheckpointError
from carnice_build.tensors import Reader
from carnice_build.version import __version__

LIBRARY = "carnice-build"

_EXPIRED = (401, 403, 404, 410)
_PROGRESS = 1 << 20
"""Bytes after which earlier failures of a range are forgiven."""


@dataclass(frozen=True, slots=True)
class Repository:
    """A model repository at one commit."""

    endpoint: str
    model: str
    commit: str

    def __str__(self) -> str:
        return f"{self.model}@{self.commit[:7]}"


class RemoteFile:
    """A file that is read where it is; see `ByteSource`."""

    local = False
    in_files = False
    random_access = False

    def __init__(self, repository: Repository, file: str, size: int, content: str) -> None:
        """`content` is the hub's id of the content: its SHA-256 for a file in LFS or Xet."""
        self.name = f"{repository}/{file}"
        self.size = size
        self.identity = f"hub|{repository.model}|{content}"
        self._repository = repository
        self._content = content
        self._url = hf_hub_url(
            repository.model, file, revision=repository.commit, endpoint=repository.endpoint
        )
        self._lock = threading.Lock()
        self._location: str | None = None
        self._tags: dict[str, str] = {}

    def path(self) -> None:
        """See `ByteSource.path`."""
        return

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """See `Readable.read_into`: one request."""
        with self.open_range(offset, len(buffer)) as read:
            read(buffer)

    @contextmanager
    def open_range(self, offset: int, count: int) -> Iterator[Reader]:
        """See `ByteSource.open_range`: one request for the whole range, read as it comes."""
        if offset + count > self.size:
            raise CheckpointError(f"ends at byte {self.size}, inside a tensor", where=self.name)
        with closing(_Range(self, offset, count)) as stream:
            yield stream.read

    def refusal(self, response: httpx.Response) -> CheckpointError:
        """What a final answer of 4xx means."""
        repository = self._repository
        return refused(
            response, self.name, repository.endpoint, repository.model, repository.commit
        )

    def _changed(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"is not the file that was planned: {what}", where=self.name, expected="plan again"
        )

    def locate(self) -> tuple[str, bool]:
        """The address of the bytes, and whether the hub has just named it."""
        with self._lock:
            if self._location is not None:
                return self._location, False
            self._location = self._ask_hub()
            return self._location, True

    def forget_location(self) -> None:
        """Ask the hub again next time: signed addresses expire, and mirrors go away."""
        with self._lock:
            self._location = None

    def _ask_hub(self) -> str:
        metadata = get_hf_file_metadata(
            self._url,
            timeout=constants.HF_HUB_ETAG_TIMEOUT,
            endpoint=self._repository.endpoint,
            library_name=LIBRARY,
            library_version=__version__,
        )
        if metadata.commit_hash not in (None, self._repository.commit):
            raise self._changed("the hub answers for another commit")
        if metadata.etag != self._content:
            raise self._changed(f"its ETag is {str(metadata.etag)[:80]!r}, not {self._content!r}")
        if metadata.size not in (None, self.size):
            raise self._changed(f"it has {metadata.size} bytes, not {self.size}")
        self._check_scheme(metadata.location)
        return metadata.location

    def _check_scheme(self, url: str) -> None:
        """Refuse plain HTTP, in which anybody on the way may put other bytes, but of such a hub."""
        schemes = ("https", urlsplit(self._repository.endpoint).scheme)
        if urlsplit(url).scheme not in schemes:
            raise CheckpointError("the hub redirects to no safe address", where=self.name)

    def request(self, first: int, last: int) -> httpx.Response:
        """An open answer, checked, with bytes `first` to `last`."""
        location, fresh = self.locate()
        at_hub = _origin(location) == _origin(self._repository.endpoint)
        headers = build_hf_headers(
            token=None if at_hub else False, library_name=LIBRARY, library_version=__version__
        )
        headers |= {"Range": f"bytes={first}-{last}", "Accept-Encoding": "identity"}
        asking = client()
        request = asking.build_request(
            "GET", location, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT
        )
        # A redirect to another origin loses the Authorization header in httpx.
        response = asking.send(request, stream=True, follow_redirects=True)
        try:
            self._check(response, first, last, fresh)
        except BaseException:
            response.close()
            raise
        return response

    def _check(self, response: httpx.Response, first: int, last: int, fresh: bool) -> None:
        if not fresh and response.status_code in _EXPIRED:
            raise Interruption("the address expired", wait=0)
        if response.status_code >= 300:
            raise judge(response, self.refusal)
        headers = response.headers
        if response.status_code != 206:
            raise CheckpointError(
                f"the server answered {response.status_code} to a request for a range",
                where=self.name,
                expected="a server that serves ranges; without --stream, none is needed",
            )
        wanted = f"bytes {first}-{last}/{self.size}"
        if headers.get("Content-Range") != wanted:
            given = headers.get("Content-Range", "an unknown range")[:80]
            raise self._changed(f"the server sent {given!r} for {wanted!r}")
        self._check_scheme(str(response.url))
        if headers.get("Content-Encoding", "identity") != "identity":
            raise CheckpointError("the server sent an encoded range", where=self.name)
        if int(headers.get("Content-Length", "0")) > last - first + 1:
            raise CheckpointError("the server sent more than asked", where=self.name)
        self._check_tag(response)

    def _check_tag(self, response: httpx.Response) -> None:
        """Compare the ETag with the planned one, or, from a CDN, with the one it sent first.

        A CDN's own ETag may be an MD5 or a hash of its storage; the hub's answer that named the
        address vouched for the content, so here it only must not change.
        """
        origin = _origin(str(response.url))
        tag = _tag(response)
        expected = self._content if origin == _origin(self._repository.endpoint) else tag
        with self._lock:
            first = self._tags.setdefault(origin, expected)
        if tag != first:
            raise self._changed(f"the ETag of a part is {tag[:80]!r}, not {first[:80]!r}")


def _tag(response: httpx.Response) -> str:
    """The ETag of an answer without its quotes, "" when there is none."""
    tag = response.headers.get("X-Linked-Etag") or response.headers.get("ETag", "")
    return str(tag).removeprefix("W/").strip('"')


def _origin(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}"


class _Range:
    """A range read in order as one long answer, which is asked for again where it broke off."""

    def __init__(self, file: RemoteFile, offset: int, count: int) -> None:
        self._file = file
        self._position = offset
        self._end = offset + count
        self._patience = Patience(file.name)
        self._trusted_until = offset
        self._response: httpx.Response | None = None
        self._receive: Receive | None = None

    def read(self, buffer: memoryview) -> None:
        """Fill `buffer` with what follows."""
        assert len(buffer) <= self._end - self._position, "read past the opened range"
        while buffer:
            count = self._received(buffer)
            self._position += count
            buffer = buffer[count:]

    def _received(self, buffer: memoryview) -> int:
        """Put what comes next into `buffer`; returns how many bytes that is."""
        while True:
            try:
                with interruptions(self._file.name, self._file.refusal):
                    return self._ask(buffer)
            except Interruption as failure:
                self._drop()
                self._file.forget_location()
                if self._position - self._trusted_until >= _PROGRESS:
                    self._patience.renew()
                    self._trusted_until = self._position
                self._patience.wait(failure)

    def _ask(self, buffer: memoryview) -> int:
        if self._receive is None:
            self._response = self._file.request(self._position, self._end - 1)
            self._receive = receiver(self._response)
        count = self._receive(buffer)
        if not count:
            raise Interruption("the answer ended early")
        return count

    def _drop(self) -> None:
        if self._response is not None:
            self._response.close()
            self._response = self._receive = None

    def close(self) -> None:
        """End the answer; its connection is used again when all of it was read."""
        if self._position == self._end and self._receive is not None:
            with suppress(*BROKEN):
                self._receive(memoryview(bytearray(1)))
        self._drop()
