"""A server as long as it is needed: started, waited for, and ended with all that it started.

It runs in a process group of its own.
A guardian ends that group, and removes its log, when we are gone, whatever ended us.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from carnice_build.engines.engine import Engine, Start
from carnice_build.errors import EngineError

HOST = "127.0.0.1"

_GUARDIAN = """
import os, shutil, signal, sys
sys.stdin.read()
try:
    os.killpg(int(sys.argv[1]), signal.SIGKILL)
except OSError:
    pass
shutil.rmtree(sys.argv[2], ignore_errors=True)
"""
_POLL_SECONDS = 0.1
_END_SECONDS = 15
_MOST_LOG = 200_000
"""Bytes of a log's end in which the reason of a death is looked for."""


@dataclass(frozen=True)
class Patience:
    """Seconds to wait for a server to be ready, and for each of its answers."""

    start: float = 900
    answer: float = 180


@dataclass(frozen=True)
class Server:
    """A server that is up; `model` is what it calls the folder."""

    name: str
    url: str
    model: str
    log: Path
    process: subprocess.Popen[bytes]

    def check_alive(self) -> None:
        """EngineError with the server's last words when it has died."""
        if self.process.poll() is not None:
            words = last_words(self.log)
            raise EngineError(f"{self.name} died with code {self.process.returncode}: {words}")


@contextlib.contextmanager
def serve(
    engine: Engine, start: Start, executable: Path, port: int | None, patience: Patience
) -> Iterator[Server]:
    """A healthy server on `port` of this machine, on a free one by default.

    EngineError when the port is taken, when it dies before it is healthy, and when it is not by
    the end of our patience.
    """
    port = free_port(port)
    command = [*engine.command(executable), *start.arguments]
    command += ["--host", HOST, "--port", str(port)]
    with tempfile.TemporaryDirectory(prefix="carnice-engine-") as folder:
        log = Path(folder) / "log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=dict(start.environment),
                cwd=folder,
                start_new_session=True,
            )
        server = Server(engine.name, f"http://{HOST}:{port}", start.model, log, process)
        with _ended(process, folder):
            _wait(server, patience.start)
            yield server


def free_port(asked: int | None) -> int:
    """The port that was `asked` for, or a free one; EngineError when it is taken."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        # As servers do: what a connection of the last one left behind is no obstacle.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, asked or 0))
        except OSError as error:
            raise EngineError(
                f"port {asked} of {HOST} cannot be used: {error.strerror}",
                expected="a free port, or none to have one found",
            ) from None
        port: int = probe.getsockname()[1]
        return port


@contextlib.contextmanager
def _ended(process: subprocess.Popen[bytes], folder: str) -> Iterator[None]:
    """The process and its group are gone afterwards; if we die within, and the folder as well."""
    guardian = None
    try:
        guardian = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _GUARDIAN, str(process.pid), folder],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )
        yield
    finally:
        with contextlib.suppress(OSError):
            os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_END_SECONDS)
        # Whatever of it did not listen; its number is still the group's while any of it is there.
        with contextlib.suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if guardian is not None:
            guardian.kill()
            guardian.communicate()


def _wait(server: Server, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not _healthy(server.url, max(_POLL_SECONDS, end - time.monotonic())):
        server.check_alive()
        if time.monotonic() > end:
            words = last_words(server.log)
            raise EngineError(f"{server.name} is not ready after {seconds:g} s: {words}")
        time.sleep(_POLL_SECONDS)


def _healthy(url: str, seconds: float) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=min(seconds, 5)) as response:
            return bool(response.status == 200)
    except Exception:  # nobody there yet, or whatever http.client makes of what is no HTTP
        return False


_PREFIX = re.compile(r"^(\([^()]*pid=\d+\) )?([A-Z]+ \d\d-\d\d [\d:]+ \[[^\]]*\] )?")
_ESCAPE = re.compile(r"\x1b\[[0-9;]*m")
_ERROR = re.compile(r"^[\w.]*(Error|Exception|Exit|Interrupt): ?\S")
_ELSEWHERE = re.compile(r"See .*\broot cause")
_CONTINUED = re.compile(r"validation error|:$")


def last_words(log: Path) -> str:
    """The line of a log that says best why it ends: its last exception, or its last line.

    An exception that only says that there is another one does not count.
    One that announces its reasons is told with the first of them.
    """
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - _MOST_LOG))
        text = file.read().decode(errors="replace")
    lines = [_spoken(_ESCAPE.sub("", line)) for line in text.splitlines()]
    lines = [(speaker, line) for speaker, line in lines if line]
    for index in reversed(range(len(lines))):
        speaker, line = lines[index]
        if _ERROR.match(line) and not _ELSEWHERE.search(line):
            more = lines[index + 1 : index + 2] if _CONTINUED.search(line) else []
            return " ".join([line, *(text.strip() for by, text in more if by == speaker)])
    return lines[-1][1].strip() if lines else "it said nothing"


def _spoken(line: str) -> tuple[str, str]:
    """Which process says a line of a log, "" where that is not told, and what it says."""
    prefix = _PREFIX.match(line)
    assert prefix is not None
    return prefix.group(1) or "", line[prefix.end() :].rstrip()
