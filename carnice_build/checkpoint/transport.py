"""HTTP whose bodies are received straight into the buffer of who reads them.

httpx gives a body in pieces of 64 kB or less, each made anew and copied on its way; at the rate of
a fast line that takes as long as digesting the bytes does.
Here its transport is the standard library's `http.client`, which receives into a buffer; httpx goes
on to do all else: redirects, who is shown the token, time limits, certificates.
"""

from __future__ import annotations

import http.client
import select
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import NoReturn
from urllib.request import getproxies

import httpx
from huggingface_hub.utils import get_session

Receive = Callable[[memoryview], int]
"""Puts the next bytes of a body into a buffer; returns how many, 0 at its end."""

PIECE_BYTES = 1 << 18
"""Most bytes received in one go: what had come of a piece is asked for again after a failure."""

_RECEIVE = "carnice.receive"
_IDLE = 16
"""Most connections to one place that are kept for later."""

_PORTS = {"http": 80, "https": 443}

_Origin = tuple[str, str, int]


def client() -> httpx.Client:
    """The client for large bodies; where a proxy is configured, that of huggingface_hub."""
    proxies = getproxies().keys() - {"no"}
    return get_session() if proxies else _client()


@lru_cache(maxsize=1)
def _client() -> httpx.Client:
    return httpx.Client(transport=Straight(), follow_redirects=True)


def receiver(response: httpx.Response) -> Receive:
    """What receives the body of a response that streams, whichever client it is of."""
    receive: Receive | None = response.extensions.get(_RECEIVE)
    return receive or _Pieces(response.iter_raw()).receive


class _Pieces:
    """A body that comes in pieces, of which one is held."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._rest = memoryview(b"")

    def receive(self, buffer: memoryview) -> int:
        """See `Receive`."""
        if not self._rest:
            self._rest = memoryview(next(self._pieces, b""))
        count = min(len(self._rest), len(buffer))
        buffer[:count], self._rest = self._rest[:count], self._rest[count:]
        return count


class Straight(httpx.BaseTransport):
    """A transport over HTTP/1.1 with connections that are used again; safe from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idle: dict[_Origin, list[http.client.HTTPConnection]] = {}
        self._tls: ssl.SSLContext | None = None

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request, and give the answer as soon as its headers are there."""
        origin = _origin(request.url)
        limits = request.extensions.get("timeout", {})
        connection = self._reused(origin) or self._made(origin, limits.get("connect"))
        try:
            with _translated():
                if connection.sock is None:
                    connection.connect()
                connection.sock.settimeout(limits.get("read"))
                _send(connection, request)
                answer = connection.getresponse()
                _check_coding(answer)
            body = _Body(answer, connection, lambda: self._keep(origin, connection))
            headers = [
                (name.encode("latin-1"), value.encode("latin-1"))
                for name, value in answer.getheaders()
            ]
        except BaseException:
            connection.close()
            raise
        extensions = {_RECEIVE: body.receive}
        return httpx.Response(answer.status, headers=headers, stream=body, extensions=extensions)

    def _reused(self, origin: _Origin) -> http.client.HTTPConnection | None:
        """A connection that waits, and that the server has not ended meanwhile."""
        while True:
            with self._lock:
                waiting = self._idle.get(origin)
                if not waiting:
                    return None
                connection = waiting.pop()
            if not _has_ended(connection):
                return connection
            connection.close()

    def _keep(self, origin: _Origin, connection: http.client.HTTPConnection) -> None:
        with self._lock:
            waiting = self._idle.setdefault(origin, [])
            if len(waiting) < _IDLE:
                waiting.append(connection)
                return
        connection.close()

    def _made(self, origin: _Origin, limit: float | None) -> http.client.HTTPConnection:
        scheme, host, port = origin
        if scheme == "http":
            connection = http.client.HTTPConnection(host, port, timeout=limit)
        else:
            with self._lock:
                self._tls = self._tls or httpx.create_ssl_context()
            connection = http.client.HTTPSConnection(host, port, timeout=limit, context=self._tls)
        connection.response_class = _Answer
        return connection

    def close(self) -> None:
        """Close the connections that wait."""
        with self._lock:
            idle, self._idle = self._idle, {}
        for connection in (item for waiting in idle.values() for item in waiting):
            connection.close()


def _origin(url: httpx.URL) -> _Origin:
    """Where to connect to: with a port always, for http.client would look for one in the host."""
    if url.scheme not in _PORTS:
        raise httpx.UnsupportedProtocol("neither http nor https")
    return url.scheme, url.raw_host.decode("ascii"), url.port or _PORTS[url.scheme]


def _has_ended(connection: http.client.HTTPConnection) -> bool:
    """True when something has come of a connection that waits: its end, or what nobody asked for.

    Unlike `select`, `poll` takes any descriptor of a process that has thousands of files open.
    """
    waiting = select.poll()
    waiting.register(connection.sock, select.POLLIN)
    return bool(waiting.poll(0))


class _Answer(http.client.HTTPResponse):
    """An answer without those of 1xx that may come before it; http.client knows only 100."""

    def _read_status(self) -> tuple[str, int, str]:
        while True:
            found: tuple[str, int, str] = super()._read_status()  # type: ignore[misc]
            if not 100 <= found[1] < 200:
                return found
            http.client.parse_headers(self.fp)


def _check_coding(answer: http.client.HTTPResponse) -> None:
    """Refuse a body that http.client would give as it comes, with sizes of chunks in it."""
    if answer.getheader("Transfer-Encoding") is not None and not answer.chunked:
        raise http.client.UnknownTransferEncoding


def _send(connection: http.client.HTTPConnection, request: httpx.Request) -> None:
    connection.putrequest(
        request.method,
        request.url.raw_path.decode("ascii"),
        skip_host=True,
        skip_accept_encoding=True,
    )
    for name, value in request.headers.raw:
        connection.putheader(name, value)
    connection.endheaders(request.read() or None)


class _Body(httpx.SyncByteStream):
    """The body of an answer."""

    def __init__(
        self,
        answer: http.client.HTTPResponse,
        connection: http.client.HTTPConnection,
        keep: Callable[[], None],
    ) -> None:
        """`keep` takes the connection when the whole body was read."""
        self._answer = answer
        self._connection = connection
        self._keep = keep

    def receive(self, buffer: memoryview) -> int:
        """See `Receive`."""
        with _translated():
            return self._answer.readinto(buffer[:PIECE_BYTES])

    def __iter__(self) -> Iterator[bytes]:
        while piece := self._piece():
            yield piece

    def _piece(self) -> bytes:
        with _translated():
            return self._answer.read(PIECE_BYTES)

    def close(self) -> None:
        """End the answer: a body that was not read to its end takes its connection with it."""
        whole = self._answer.isclosed() and not self._answer.will_close
        self._answer.close()
        if whole:
            self._keep()
        else:
            self._connection.close()


@contextmanager
def _translated() -> Iterator[None]:
    """Raise errors of the standard library as those of httpx."""
    try:
        yield
    except TimeoutError as error:
        _raise(httpx.ReadTimeout, error)
    except http.client.IncompleteRead as error:
        _raise(httpx.RemoteProtocolError, error)
    except http.client.InvalidURL as error:
        _raise(httpx.LocalProtocolError, error)
    except http.client.HTTPException as error:
        _raise(httpx.RemoteProtocolError, error)
    except (socket.gaierror, ConnectionRefusedError, ssl.SSLError) as error:
        _raise(httpx.ConnectError, error)
    except OSError as error:
        _raise(httpx.ReadError, error)
    except ValueError as error:  # of a header that no request can have
        _raise(httpx.LocalProtocolError, error)


def _raise(kind: type[httpx.TransportError], error: Exception) -> NoReturn:
    # Nothing of what was said: a library's error may repeat a token.
    raise kind(type(error).__name__) from error
