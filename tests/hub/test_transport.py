"""Bodies received straight into a buffer, over connections that are used again."""

from __future__ import annotations

import datetime
import ipaddress
import os
import resource
import socket
import ssl
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from huggingface_hub.utils import get_session

from carnice_build.checkpoint.patience import interruptions
from carnice_build.checkpoint.transport import Straight, client, receiver
from carnice_build.errors import CheckpointError

BODY = bytes(range(256)) * 4096


class Server(ThreadingHTTPServer):
    """Serves `BODY` at any path but those that say what goes wrong; counts its connections."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.accepted = 0
        self.ended = threading.Semaphore(0)
        self.scheme = "http"
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def url(self, path: str) -> str:
        return f"{self.scheme}://127.0.0.1:{self.server_port}/{path}"

    def handle_error(self, *_: object) -> None:
        """A client may hang up whenever it likes."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def setup(self) -> None:
        super().setup()
        self.server.accepted += 1

    def finish(self) -> None:
        super().finish()
        self.connection.close()
        self.server.ended.release()

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        self.close_connection = self.path == "/last"
        if self.path == "/garbage":
            self.wfile.write(b"what?\r\n\r\n")
        elif self.path == "/silence":
            threading.Event().wait(2)
        elif self.path == "/redirect":
            self._answer(302, b"elsewhere", Location="/whole")
        elif self.path == "/short":
            self._answer(200, BODY[:1000], count=len(BODY))
            self.close_connection = True
        elif self.path == "/chunked":
            self._answer(200, b"3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n", Transfer_Encoding="chunked")
        elif self.path == "/coded":
            self._answer(200, b"3\r\nabc\r\n0\r\n\r\n", Transfer_Encoding="gzip, chunked")
        elif self.path == "/hints":
            self.wfile.write(b"HTTP/1.1 103 Early Hints\r\nLink: </style.css>\r\n\r\n" * 2)
            self._answer(200, BODY)
        elif self.path == "/ftp":
            self._answer(302, b"elsewhere", Location=f"ftp://127.0.0.1:{self.server.server_port}/")
        else:
            self._answer(200, BODY)

    def _answer(self, status: int, body: bytes, count: int | None = None, **headers: str) -> None:
        self.send_response(status)
        if "Transfer_Encoding" not in headers:
            self.send_header("Content-Length", str(len(body) if count is None else count))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def straight() -> Iterator[httpx.Client]:
    with httpx.Client(transport=Straight(), follow_redirects=True, timeout=0.5) as asking:
        yield asking


def received(asking: httpx.Client, url: str, most: int = 1 << 30) -> bytes:
    """Up to `most` bytes of a body, taken into a buffer of a size that fits nothing."""
    got, buffer = bytearray(), memoryview(bytearray(70_001))
    with asking.stream("GET", url) as response:
        receive = receiver(response)
        while len(got) < most and (count := receive(buffer)):
            got += buffer[:count]
    return bytes(got)


def test_a_body_comes_whole_and_its_connection_is_used_again(
    server: Server, straight: httpx.Client
) -> None:
    assert [received(straight, server.url("whole")) for _ in range(3)] == [BODY] * 3
    assert server.accepted == 1


def test_what_was_read_in_part_takes_its_connection_with_it(
    server: Server, straight: httpx.Client
) -> None:
    assert BODY.startswith(received(straight, server.url("whole"), 1000))
    assert received(straight, server.url("whole")) == BODY
    assert server.accepted == 2


def test_a_connection_that_the_server_ended_is_not_used_again(
    server: Server, straight: httpx.Client
) -> None:
    assert received(straight, server.url("last")) == BODY
    assert server.ended.acquire(timeout=5)
    assert received(straight, server.url("whole")) == BODY
    assert server.accepted == 2


def test_httpx_reads_bodies_and_follows_redirects_as_with_its_own(
    server: Server, straight: httpx.Client
) -> None:
    assert straight.get(server.url("redirect")).content == BODY
    assert straight.get(server.url("chunked")).content == b"abcde"
    assert received(straight, server.url("chunked")) == b"abcde"


def test_a_body_that_ends_early_says_so_by_its_length(
    server: Server, straight: httpx.Client
) -> None:
    assert received(straight, server.url("short")) == BODY[:1000]


@pytest.mark.parametrize(
    ("path", "error"),
    [
        ("garbage", httpx.RemoteProtocolError),
        ("silence", httpx.ReadTimeout),
        ("coded", httpx.RemoteProtocolError),
        ("ftp", httpx.UnsupportedProtocol),
    ],
)
def test_what_goes_wrong_is_what_httpx_calls_it(
    server: Server, straight: httpx.Client, path: str, error: type[Exception]
) -> None:
    with pytest.raises(error):
        straight.get(server.url(path))


def test_what_comes_before_an_answer_is_no_answer(server: Server, straight: httpx.Client) -> None:
    assert [received(straight, server.url("hints")) for _ in range(2)] == [BODY] * 2
    assert server.accepted == 1


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("http://[2001:db8::12]/", ("2001:db8::12", 80)),
        ("https://[2001:db8::abc]/", ("2001:db8::abc", 443)),
        ("http://[2001:db8::12]:8080/", ("2001:db8::12", 8080)),
        ("https://fa\N{LATIN SMALL LETTER SHARP S}.example/", ("xn--fa-hia.example", 443)),
    ],
)
def test_a_host_is_what_its_url_says(
    straight: httpx.Client, monkeypatch: pytest.MonkeyPatch, url: str, address: tuple[str, int]
) -> None:
    asked = []

    def connect(address: tuple[str, int], *_: object) -> socket.socket:
        asked.append(address)
        raise ConnectionRefusedError

    monkeypatch.setattr(socket, "create_connection", connect)
    with pytest.raises(httpx.ConnectError):
        straight.get(url)
    assert asked == [address]


def test_connections_are_used_again_where_a_thousand_files_are_open(
    server: Server, straight: httpx.Client
) -> None:
    """More than `select` can tell of."""
    if resource.getrlimit(resource.RLIMIT_NOFILE)[0] < 1200:
        pytest.skip("so many files may not be open here")
    files = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    try:
        assert [received(straight, server.url("whole")) for _ in range(2)] == [BODY] * 2
    finally:
        for file in files:
            os.close(file)
    assert server.accepted == 1


def test_a_server_that_is_not_there(straight: httpx.Client) -> None:
    with pytest.raises(httpx.ConnectError):
        straight.get("http://127.0.0.1:9/")


def test_a_header_that_cannot_be_sent_is_not_repeated(
    server: Server, straight: httpx.Client
) -> None:
    with pytest.raises(httpx.LocalProtocolError) as error:
        straight.get(server.url("whole"), headers={"Authorization": "Bearer secret\nmore"})
    assert "secret" not in str(error.value)


def test_certificates_are_checked_against_those_of_the_environment(
    server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = encrypt(server, tmp_path)
    with httpx.Client(transport=Straight()) as asking, pytest.raises(httpx.ConnectError):
        asking.get(server.url("whole"))
    monkeypatch.setenv("SSL_CERT_FILE", str(path))
    with httpx.Client(transport=Straight()) as asking:
        assert received(asking, server.url("whole")) == BODY


@pytest.mark.parametrize("transport", [Straight, httpx.HTTPTransport])
def test_a_certificate_that_is_not_trusted_is_called_that(
    server: Server, tmp_path: Path, transport: type[httpx.BaseTransport]
) -> None:
    """And not waited for; by the client for large bodies and by that of the hub."""
    encrypt(server, tmp_path)
    with (
        httpx.Client(transport=transport()) as asking,
        pytest.raises(CheckpointError, match=r"certificate is not trusted.*SSL_CERT_FILE"),
        interruptions("model", lambda _: CheckpointError("refused")),
    ):
        asking.get(server.url("whole"))


def encrypt(server: Server, folder: Path) -> Path:
    """Have the server speak TLS, with a certificate in the file that is returned."""
    path = certificate(folder)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    server.scheme = "https"
    return path


def certificate(folder: Path) -> Path:
    """A file with a key and a certificate for 127.0.0.1 that it signed itself."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "tests")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), 1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False
        )
        .add_extension(x509.BasicConstraints(True, None), True)
        .sign(key, hashes.SHA256())
    )
    path = folder / "server.pem"
    pem = serialization.Encoding.PEM
    path.write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        + made.public_bytes(pem)
    )
    return path


def test_with_a_proxy_the_client_is_that_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("NO_PROXY", "localhost")
    assert client() is not get_session()
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy.invalid:3128")
    assert client() is get_session()
