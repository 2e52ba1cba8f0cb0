"""GGUF folders in llama.cpp's own server, by the launches that they come with.

Where `llama-server` is on PATH; docs/gguf.md says how to build it.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY

from carnice_build.commands.build import build_variants
from carnice_build.commands.options import Options

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(shutil.which("llama-server") is None, reason="there is no llama-server"),
]

LAUNCHES = ("fitted", "whole-context", "drafting", "vision")

PATIENCE = 120
"""Seconds until a server must answer."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The demo in Q8_0, as one file and as several."""
    root = tmp_path_factory.mktemp("llama")
    options = Options(recipes=REPOSITORY / "recipes", cache=root / "cache")
    found = {}
    for name, overrides in {"whole": (), "split": ("package.shard=700kB",)}.items():
        out = root / name
        build_variants(
            ["gguf-q8_0"], Options(**{**vars(options), "out": out, "overrides": overrides})
        )
        found[name] = out / "gguf-q8_0"
    return found


class Server:
    """A server that answers."""

    def __init__(self, url: str) -> None:
        self._url = url

    def ask(self, path: str, **body: Any) -> Any:
        """What it answers to JSON, or to nothing."""
        data = json.dumps(body).encode() if body else None
        request = urllib.request.Request(
            self._url + path, data, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            return json.loads(answer.read())

    def continued(self) -> list[int]:
        """Tokens that it writes after a text, always the likeliest."""
        answer = self.ask(
            "/completion",
            prompt="The weather in Paris",
            n_predict=24,
            temperature=0,
            cache_prompt=False,
            return_tokens=True,
        )
        tokens: list[int] = answer["tokens"]
        return tokens


@contextmanager
def served(folder: Path, launch: str) -> Iterator[Server]:
    """The folder by one of its scripts."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [folder / "serve" / f"{launch}.sh", "--port", port, "--parallel", 1, "--threads", 1]
    log = folder.parent / "log"
    with log.open("wb") as file:
        process = subprocess.Popen(list(map(str, command)), stdout=file, stderr=file)
    server = Server(f"http://127.0.0.1:{port}")
    try:
        _await(server, process, log)
        yield server
    finally:
        process.terminate()
        process.wait(PATIENCE)


def _await(server: Server, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        try:
            server.ask("/health")
        except OSError:
            assert process.poll() is None, log.read_text(errors="replace")[-3000:]
            time.sleep(0.2)
        else:
            return
    raise AssertionError("it does not answer")


@pytest.mark.parametrize("launch", LAUNCHES)
def test_every_launch_serves_the_folder(folders: dict[str, Path], launch: str) -> None:
    """It starts with the options as they are, samples as the card says, and answers a chat."""
    with served(folders["whole"], launch) as server:
        properties = server.ask("/props")
        sampling = properties["default_generation_settings"]["params"]
        answer = server.ask(
            "/v1/chat/completions",
            messages=[{"role": "user", "content": "What is the weather in Paris?"}],
            max_tokens=24,
        )

    assert (0.6, 0.95, 20) == (
        round(sampling["temperature"], 6),
        round(sampling["top_p"], 6),
        sampling["top_k"],
    )
    assert (launch == "vision") == properties["modalities"]["vision"]
    assert answer["usage"]["completion_tokens"] > 0
    assert (launch == "drafting") == ("draft_n" in answer["timings"])


def test_split_files_are_the_same_model(folders: dict[str, Path]) -> None:
    """The server finds the others by the first one's name, and writes the same tokens."""
    with served(folders["whole"], "fitted") as server:
        expected = server.continued()
    with served(folders["split"], "fitted") as server:
        found = server.continued()

    assert len(list(folders["split"].glob("Carnice*.gguf"))) > 1
    assert 24 == len(expected)
    assert expected == found


def test_the_model_s_tools_are_called(folders: dict[str, Path]) -> None:
    """`request.sh` asks, and the server reads what the model writes by the file's own template."""
    script = (folders["whole"] / "serve" / "request.sh").read_text()
    body = json.loads(script.partition("<<'JSON'\n")[2].rpartition("JSON")[0])
    with served(folders["whole"], "fitted") as server:
        message = server.ask("/v1/chat/completions", **body)["choices"][0]["message"]

    assert {call["function"]["name"] for call in message.get("tool_calls", ())} <= {"get_weather"}
    assert "<tool_call>" not in (message["content"] or "")
    assert os.access(folders["whole"] / "serve" / "request.sh", os.X_OK)
