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
SpecialTokens = Mapping[str, str]
"""What a template sees of its tokenizer, as `chat.special_tokens` reads it."""

NO_TOKENS: SpecialTokens = {}


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
    name: str = ""
    """What an error calls it, if it is one of many."""

    def variables(self) -> dict[str, Any]:
        """What the template sees beside the special tokens."""
        return {
            "documents": None,
            "messages": self.messages,
            "tools": self.tools,
            "add_generation_prompt": self.prompt,
            **self.options,
        }


def render(
    template: str,
    chats: Sequence[Chat],
    where: str,
    special_tokens: SpecialTokens = NO_TOKENS,
) -> list[str]:
    """The text of each chat, as transformers' `apply_chat_template` gives it.

    A token that is not among `special_tokens` is undefined, as any name is that nobody defines:
    nothing where it is written, an error where it is worked with.
    CheckpointError naming `where`, and the chat if it has a name, when the template cannot be
    rendered: it is not a template, raises, wants out of the sandbox, or takes more than 512 MB,
    `MAX_RENDERED` characters for a chat, or 2 s of processor time and 1 s for every 8 chats; or
    when a chat is no JSON.
    """
    if len(template) > MAX_TEMPLATE:
        raise CheckpointError(f"has more than {MAX_TEMPLATE} characters", where=where)
    seconds = 2 + len(chats) // 8
    request = {
        "template": template,
        "most": MAX_RENDERED,
        "seconds": seconds,
        "memory": MAX_MEMORY if _LIMITED else None,
    }
    lines = [json.dumps(request)]
    for chat in chats:
        try:
            lines.append(json.dumps({**special_tokens, **chat.variables()}))
        except (TypeError, ValueError, RecursionError) as error:
            raise CheckpointError(
                f"cannot render a chat that is no JSON: {error}", where=_place(where, chat.name)
            ) from None
    answer = _ask("\n".join(lines), seconds)
    if len(answer.texts) < len(chats):
        # What fails before the first chat is the template's own fault.
        failed = chats[len(answer.texts)].name if answer.compiled else ""
        raise CheckpointError(answer.problem, where=_place(where, failed))
    return list(answer.texts)


def _place(where: str, chat: str) -> str:
    return f"{chat}: {where}" if chat else where


@dataclass(frozen=True)
class _Answer:
    """What the child said: the texts until `problem`, which is empty when nothing went wrong."""

    compiled: bool
    texts: tuple[str, ...]
    problem: str


@lru_cache(maxsize=16)
def _ask(request: str, seconds: int) -> _Answer:
    # -P keeps this folder out of the child's path, where its modules could pass for others.
    command = [sys.executable, "-P", str(Path(__file__).with_name("sandbox.py"))]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe) as child:
        if not _LIMITED:
            threading.Thread(target=_watch, args=(child,), daemon=True).start()
        try:
            output, errors = child.communicate(request.encode(), timeout=seconds + _PATIENCE)
        except subprocess.TimeoutExpired:
            child.kill()
            return _answer(child.communicate()[0], "takes too long to render")
    problem = ""
    if child.returncode < 0:
        most = f"over {seconds} s or {MAX_MEMORY // 2**20} MB"
        problem = f"takes too long or too much memory to render: {most}"
    elif child.returncode:
        last = errors.decode("utf-8", "replace").strip().rpartition("\n")[2]
        problem = f"cannot be rendered: {last}"
    return _answer(output, problem)


def _watch(child: subprocess.Popen[bytes]) -> None:
    """End a child that takes more than `MAX_MEMORY`."""
    while child.poll() is None:
        answer = subprocess.run(
            ["ps", "-o", "rss=", "-p", str(child.pid)], capture_output=True, check=False
        )
        if int(answer.stdout.strip() or 0) * 1024 > MAX_MEMORY:
            child.kill()
        time.sleep(_LOOK)


def _answer(output: bytes, problem: str) -> _Answer:
    # What stands behind the last line break is half a line.
    lines = [json.loads(line) for line in output.split(b"\n")[:-1]]
    said = {key: [line[key] for line in lines if key in line] for key in ("text", "error")}
    if said["error"]:
        problem = f"cannot be rendered: {said['error'][0]}"
    return _Answer({"compiled": True} in lines, tuple(said["text"]), problem)
