"""Rendering of chat templates, which strangers write, in a process that can do no harm."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from carnice_build.errors import CheckpointError

MAX_TEMPLATE = 2**18
MAX_RENDERED = 10**6
MAX_MEMORY = 512 * 2**20
_LIMITED = sys.platform != "darwin" and hasattr(resource, "RLIMIT_AS")
"""True where the system itself keeps a process from taking more: macOS takes note and no more."""

_LOOK = 0.02
_PATIENCE = 60
"""Seconds more than the processor time at which the child is stopped: a busy machine's share."""

Message = Mapping[str, Any]
Tool = Mapping[str, Any]


@dataclass(frozen=True)
class Chat:
    """A conversation as `apply_chat_template` takes it.

    `options` are further variables of the template, such as `enable_thinking`.
    """

    messages: Sequence[Message]
    tools: Sequence[Tool] | None = None
    prompt: bool = False
    """True to end with what opens the assistant's turn."""
    options: Mapping[str, Any] = field(default_factory=dict)

    def variables(self) -> dict[str, Any]:
        """What the template sees; special tokens that it may ask for are empty."""
        return {
            "bos_token": "",
            "eos_token": "",
            "documents": None,
            "messages": self.messages,
            "tools": self.tools,
            "add_generation_prompt": self.prompt,
            **self.options,
        }


def render(template: str, chats: Sequence[Chat], where: str) -> list[str]:
    """The text of each chat, as transformers' `apply_chat_template` gives it.

    CheckpointError naming `where` when the template cannot be rendered: it is not a template,
    raises, wants out of the sandbox, or takes more than 512 MB, `MAX_RENDERED` characters for a
    chat, or 2 s of processor time and 1 s for every 8 chats; or when a chat is no JSON.
    """
    if len(template) > MAX_TEMPLATE:
        raise CheckpointError(f"has more than {MAX_TEMPLATE} characters", where=where)
    request: dict[str, Any] = {
        "template": template,
        "conversations": [chat.variables() for chat in chats],
        "most": MAX_RENDERED,
        "seconds": 2 + len(chats) // 8,
        "memory": MAX_MEMORY if _LIMITED else None,
    }
    try:
        text = json.dumps(request)
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"cannot render a chat that is no JSON: {error}", where=where
        ) from None
    answer = _ask(text, request["seconds"], where)
    if "error" in answer:
        raise CheckpointError(f"cannot be rendered: {answer['error']}", where=where)
    texts: list[str] = answer["texts"]
    return texts


@lru_cache(maxsize=16)
def _ask(request: str, seconds: int, where: str) -> dict[str, Any]:
    # -P keeps this folder out of the child's path, where its modules could pass for others.
    command = [sys.executable, "-P", str(Path(__file__).with_name("sandbox.py"))]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe) as child:
        if not _LIMITED:
            threading.Thread(target=_watch, args=(child,), daemon=True).start()
        try:
            out, err = child.communicate(request.encode(), timeout=seconds + _PATIENCE)
        except subprocess.TimeoutExpired:
            child.kill()
            raise CheckpointError("takes too long to render", where=where) from None
    if child.returncode < 0:
        raise CheckpointError(
            "takes too long or too much memory to render",
            where=where,
            expected=f"at most {seconds} s and {MAX_MEMORY // 2**20} MB",
        )
    if child.returncode:
        last = err.decode("utf-8", "replace").strip().rpartition("\n")[2]
        raise CheckpointError(f"cannot be rendered: {last}", where=where)
    answer: dict[str, Any] = json.loads(out)
    return answer


def _watch(child: subprocess.Popen[bytes]) -> None:
    """End a child that takes more than `MAX_MEMORY`."""
    while child.poll() is None:
        answer = subprocess.run(
            ["ps", "-o", "rss=", "-p", str(child.pid)], capture_output=True, check=False
        )
        if int(answer.stdout.strip() or 0) * 1024 > MAX_MEMORY:
            child.kill()
        time.sleep(_LOOK)
