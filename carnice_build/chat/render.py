"""Rendering of chat templates, which strangers write, in a process that can do no harm."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from carnice_build.errors import CheckpointError

MAX_TEMPLATE = 2**18
MAX_RENDERED = 10**6
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
    try:
        done = subprocess.run(
            command,
            input=request.encode(),
            capture_output=True,
            timeout=seconds + _PATIENCE,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise CheckpointError("takes too long to render", where=where) from None
    if done.returncode < 0:
        raise CheckpointError(
            "takes too long or too much memory to render",
            where=where,
            expected=f"at most {seconds} s and 512 MB",
        )
    if done.returncode:
        last = done.stderr.decode("utf-8", "replace").strip().rpartition("\n")[2]
        raise CheckpointError(f"cannot be rendered: {last}", where=where)
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer
