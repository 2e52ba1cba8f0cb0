"""A server in the place of mlx_lm's, which does what `FAKE_ENGINE` says: one file, no imports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

MODE = os.environ["FAKE_ENGINE"]
ARGUMENTS = dict(zip(sys.argv[1::2], sys.argv[2::2], strict=True))
MESSAGE = {"role": "assistant", "content": "Hi."}
NO_ANSWERS = {"prose": b"hello", "no choices": b'{"choices": []}', "no object": b'{"choices": 7}'}


COUNTERS = """\
vllm:spec_decode_num_drafts_total{engine="0"} {steps}.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",position="0"} {first}.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",position="1"} {second}.0
"""
LLAMA_COUNTERS = """\
llamacpp:spec_decode_num_drafts_total {steps}
llamacpp:spec_decode_num_accepted_tokens_per_pos_total{position="0"} {first}
llamacpp:spec_decode_num_accepted_tokens_per_pos_total{position="1"} {second}
"""


class Handler(BaseHTTPRequestHandler):
    """Healthy always; an answer is "Hi.", or none at all.

    A prompt's tokens have a probability of 1/e each.
    Of 10 steps of a prompt's continuation 8 accept a draft, 4 of these a second one.
    """

    written = 0

    def do_GET(self) -> None:
        """`/health`, or the counters of `/metrics`."""
        steps = 10 * Handler.written
        counts = {"steps": steps, "first": steps * 8 // 10, "second": steps * 4 // 10}
        text = LLAMA_COUNTERS if "FAKE_LLAMA" in os.environ else COUNTERS
        for name, count in counts.items():
            text = text.replace(f"{{{name}}}", str(count))
        self.send("text/plain", text.encode())

    def do_POST(self) -> None:
        """A chat request."""
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if MODE == "silent":
            time.sleep(60)
        elif MODE == "breaks off":
            print("MemoryError: out of memory", flush=True)
            os._exit(9)
        elif MODE == "refuses":
            self.send("application/json", b'{"error": {"message": "no such model"}}', 404)
        elif MODE in NO_ANSWERS:
            self.send("application/json", NO_ANSWERS[MODE])
        elif self.path == "/v1/completions":
            Handler.written += "ignore_eos" in asked
            scores = [None, *({str(token): {"logprob": -1.0}} for token in asked["prompt"][1:])]
            self.send("application/json", reply({"text": "", "prompt_logprobs": scores}))
        elif asked.get("stream"):
            self.send("text/event-stream", b"".join(map(chunk, ("H", "i."))) + b"data: [DONE]\n\n")
        else:
            self.send("application/json", reply({"message": MESSAGE}))

    def send(self, kind: str, body: bytes, status: int = 200) -> None:
        """A whole response."""
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def reply(choice: dict[str, Any]) -> bytes:
    """An object of the protocol with one choice."""
    return json.dumps({"id": "1", "choices": [{"index": 0, **choice}]}).encode()


def chunk(text: str) -> bytes:
    """A piece of a stream."""
    return b"data: " + reply({"delta": {"content": text}}) + b"\n\n"


def main() -> None:
    """Serve, or whatever else is to happen instead."""
    if MODE == "dies":
        print("loading\nValueError: no tensor of that name\nRuntimeError: See root cause above.")
        sys.exit(3)
    if MODE == "never ready":
        print("loading", flush=True)
        time.sleep(60)
    if "FAKE_PIDS" in os.environ:
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        Path(os.environ["FAKE_PIDS"]).write_text(f"{os.getpid()} {child.pid}")
    address = ARGUMENTS["--host"], int(ARGUMENTS["--port"])
    ThreadingHTTPServer(address, Handler).serve_forever()


main()
