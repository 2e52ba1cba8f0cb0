"""A hub on the loopback interface: folders served as repositories, with faults on demand.

It speaks what huggingface_hub asks for: a model's description with its files, and HEAD and GET of
files.  Files in LFS (safetensors and parquet here) redirect to a second host, the CDN.
Of datasets, which are kept as `datasets/owner/name`, it also lists folders, as `datasets` asks for.
`127.0.0.1` is the hub and `localhost` the CDN, so that they are two hosts to a client.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote

from fake_repo import Repo

TOKEN = "hf_thisTokenMustNeverBeSeen"
CARNICE = "kai-os/Carnice-V2-27b"
QWEN = "Qwen/Qwen3.6-27B"

MAX_REQUESTS = 20_000
_PIECE = 1 << 16
_PAGE = 3


@dataclass(frozen=True)
class Request:
    """What a client asked: `host` is "hub" or "cdn", `range` the first and last byte."""

    host: str
    method: str
    file: str
    range: tuple[int, int] | None
    token: str | None
    download: bool


@dataclass
class Answer:
    """What will be sent; a fault changes it."""

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: Path | bytes = b""
    first: int = 0
    count: int = 0
    cut: int | None = None
    stall: float = 0.0
    faulty: bool = False


Fault = Callable[[Request, Answer], Answer]


class FakeHub:
    """The server's state, for a test to set up and look into."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.requests: list[Request] = []
        self.sent: Counter[str] = Counter()
        self.connections: Counter[str] = Counter()
        self.gated: dict[str, str] = {}
        self.faults: list[Fault] = []
        self.pieces: Callable[[Answer, int], Iterator[bytes | memoryview]] = _pieces
        self.lock = threading.Lock()
        self.hub_url = ""
        self.cdn_url = ""

    def add(self, model: str, folder: Path, commit: str = "c" * 40, branch: str = "main") -> Repo:
        """Serve `folder` as `model`, or as a dataset when the name begins with `datasets/`."""
        self.repos[model] = Repo(folder, commit, {branch})
        return self.repos[model]

    def fail(
        self, matches: str, change: Callable[[Answer], Any], *, times: int = 1, host: str = "cdn"
    ) -> None:
        """Let `change` alter the next `times` answers of `host` about files that match.

        Of several faults, each answer gets the first that is not spent.
        """
        left = times

        def fault(request: Request, answer: Answer) -> Answer:
            nonlocal left
            meant = request.host == host and re.search(matches, request.file)
            if meant and left > 0 and not answer.faulty:
                left -= 1
                answer.faulty = True
                change(answer)
            return answer

        self.faults.append(fault)

    def forget(self) -> None:
        """Start counting anew."""
        with self.lock:
            self.requests.clear()
            self.sent.clear()
            self.connections.clear()

    @property
    def bytes_sent(self) -> int:
        """Bytes of all bodies."""
        return sum(self.sent.values())

    def ranges(self, matches: str = r"\.safetensors$") -> list[tuple[int, int]]:
        """Ranges that were asked of the CDN, in order."""
        return [
            request.range
            for request in self.requests
            if request.host == "cdn" and request.range and re.search(matches, request.file)
        ]


def status(code: int, **headers: str) -> Callable[[Answer], None]:
    """Answer with an error."""

    def change(answer: Answer) -> None:
        answer.status = code
        answer.headers = {name.replace("_", "-"): value for name, value in headers.items()}
        answer.body, answer.first, answer.count = b"no", 0, 2

    return change


def cut(count: int) -> Callable[[Answer], None]:
    """Close the connection after `count` bytes of the body."""
    return lambda answer: setattr(answer, "cut", count)


def stall(seconds: float) -> Callable[[Answer], None]:
    """Send half of the body, then nothing."""
    return lambda answer: setattr(answer, "stall", seconds)


def resized(count: int) -> Callable[[Answer], None]:
    """Send a body that is `count` bytes longer than the range, or shorter."""
    return lambda answer: setattr(answer, "count", answer.count + count)


def header(name: str, value: str) -> Callable[[Answer], None]:
    """Lie in one header."""
    return lambda answer: answer.headers.update({name: value})


def whole(answer: Answer) -> None:
    """Ignore the Range header."""
    assert isinstance(answer.body, Path)
    answer.status, answer.first, answer.count = 200, 0, answer.body.stat().st_size
    answer.headers.pop("Content-Range", None)


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    """A running hub."""
    hub = FakeHub()
    servers = []
    for kind, host in (("hub", "127.0.0.1"), ("cdn", "localhost")):
        handler = type("Handler", (_Handler,), {"hub": hub, "kind": kind})
        server = _Server(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        servers.append(server)
        setattr(hub, f"{kind}_url", f"http://{host}:{server.server_port}")
    try:
        yield hub
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """A client may hang up whenever it likes."""


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    kind: str
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def setup(self) -> None:
        """Count the connection."""
        super().setup()
        with self.hub.lock:
            self.hub.connections[self.kind] += 1

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        self._serve()

    def do_GET(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self.form = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
        self._serve()

    def _serve(self) -> None:
        path, _, query = self.path.partition("?")
        request = Request(
            host=self.kind,
            method=self.command,
            file=unquote(path),
            range=self._range(),
            token=self.headers.get("Authorization"),
            download="X-HF-Download-Counter" in self.headers,
        )
        with self.hub.lock:
            self.hub.requests.append(request)
            assert len(self.hub.requests) <= MAX_REQUESTS
        answer = self._answer(request, query)
        with self.hub.lock:
            for fault in self.hub.faults:
                answer = fault(request, answer)
        self._send(request, answer)

    def _range(self) -> tuple[int, int] | None:
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        return (int(found[1]), int(found[2] or 2**60)) if found else None

    def _answer(self, request: Request, query: str) -> Answer:
        first, *parts = request.file.removeprefix("/").split("/")
        if first == "api":
            kind, owner, name, ask, revision, *path = parts
            repo = f"{owner}/{name}" if kind == "models" else f"{kind}/{owner}/{name}"
            if refused := self._refused(repo, revision):
                return refused
            return getattr(self, f"_{ask.replace('-', '_')}")(repo, "/".join(path), query)
        if first == "datasets":
            first = f"{first}/{parts.pop(0)}"
        repo = f"{first}/{parts.pop(0)}"
        if self.kind == "cdn":
            return self._file(request, repo, "/".join(parts))
        return self._resolve(request, repo, parts[1], "/".join(parts[2:]))

    def _error(self, code: int, name: str) -> Answer:
        return Answer(code, {"X-Error-Code": name, "X-Error-Message": f"{name}: {self.headers}"})

    def _denied(self, model: str) -> Answer | None:
        wanted = self.hub.gated.get(model)
        given = self.headers.get("Authorization")
        if wanted is None or given == f"Bearer {wanted}":
            return None
        return self._error(403 if given else 401, "GatedRepo")

    def _refused(self, model: str, revision: str) -> Answer | None:
        if model not in self.hub.repos:
            return self._error(401, "RepoNotFound")
        if denied := self._denied(model):
            return denied
        repo = self.hub.repos[model]
        known = revision in repo.branches | {repo.commit}
        return None if known else self._error(404, "RevisionNotFound")

    def _revision(self, model: str, path: str, query: str) -> Answer:
        repo = self.hub.repos[model]
        assert "blobs=" in query or model.startswith("datasets/")
        return _json({"id": model, "sha": repo.commit, "siblings": repo.siblings()})

    def _tree(self, model: str, path: str, query: str) -> Answer:
        """What is in a folder, in pages of three entries."""
        repo = self.hub.repos[model]
        asked = parse_qs(query)
        if not (repo.folder / path).is_dir():
            return self._error(404, "EntryNotFound")
        start = int(asked.get("cursor", ["0"])[0])
        entries = repo.entries(path, asked["recursive"] == ["true"])
        answer = _json(entries[start : start + _PAGE])
        if start + _PAGE < len(entries):
            page = self.path.partition("?")[0]
            rest = f"recursive={asked['recursive'][0]}&cursor={start + _PAGE}"
            answer.headers["Link"] = f'<{self.hub.hub_url}{page}?{rest}>; rel="next"'
        return answer

    def _paths_info(self, model: str, path: str, query: str) -> Answer:
        repo = self.hub.repos[model]
        files = (name for name in self.form["paths"] if (repo.folder / name).exists())
        return _json([repo.entry(file) for file in files])

    def _resolve(self, request: Request, model: str, revision: str, file: str) -> Answer:
        if refused := self._refused(model, revision):
            return refused
        repo = self.hub.repos[model]
        if not (repo.folder / file).is_file():
            return self._error(404, "EntryNotFound")
        content = repo.content_id(file)
        headers = {"X-Repo-Commit": repo.commit}
        if len(content) == 40:
            answer = self._file(request, model, file)
            answer.headers |= headers | {"ETag": f'"{content}"'}
            return answer
        headers |= {
            "Location": f"{self.hub.cdn_url}/{model}/{file}?signed=1",
            "X-Linked-Etag": f'"{content}"',
            "X-Linked-Size": str((repo.folder / file).stat().st_size),
        }
        return Answer(302, headers)

    def _file(self, request: Request, model: str, file: str) -> Answer:
        path = self.hub.repos[model].folder / file
        size = path.stat().st_size
        headers = {"ETag": f'"cdn-{file}"', "Accept-Ranges": "bytes"}
        if request.range is None:
            return Answer(200, headers, path, 0, size)
        first, last = request.range[0], min(request.range[1], size - 1)
        if first > last:
            return Answer(416, {"Content-Range": f"bytes */{size}"})
        headers["Content-Range"] = f"bytes {first}-{last}/{size}"
        return Answer(206, headers, path, first, last - first + 1)

    def _send(self, request: Request, answer: Answer) -> None:
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, " ".join(value.split()))
        self.send_header("Content-Length", str(answer.count))
        self.end_headers()
        if request.method == "HEAD":
            return
        limit = answer.count if answer.cut is None else min(answer.cut, answer.count)
        if answer.stall:
            limit //= 2
        sent = 0
        try:
            for piece in self.hub.pieces(answer, limit):
                self.wfile.write(piece)
                sent += len(piece)
            time.sleep(answer.stall)
        except OSError:
            self.close_connection = True
        with self.hub.lock:
            self.hub.sent[request.file] += sent
        if limit < answer.count:
            self.close_connection = True


def _json(content: Any) -> Answer:
    body = json.dumps(content).encode()
    return Answer(200, {"Content-Type": "application/json"}, body, 0, len(body))


def _pieces(answer: Answer, limit: int) -> Iterator[bytes]:
    """The first `limit` bytes of a body; a benchmark has bytes of its own."""
    if isinstance(answer.body, bytes):
        yield answer.body[:limit]
        return
    with answer.body.open("rb") as file:
        file.seek(answer.first)
        while limit > 0:
            piece = file.read(min(_PIECE, limit))
            if not piece:
                return
            limit -= len(piece)
            yield piece
