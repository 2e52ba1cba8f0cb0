"""What a served model is asked, and what of its answers is right: as in check `calls`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from carnice_build.chat.parsers import CALL, THINK
from carnice_build.engines import client
from carnice_build.engines.client import Client
from carnice_build.verification import calls
from carnice_build.verification.agent import Task, tasks

STREAMED = 10
"""Tasks that are asked as a stream too: two of each kind, one of them with thinking."""


@dataclass(frozen=True)
class Turns:
    """A server's answers to tasks, with what only a server can get wrong.

    `leaked` answers hold a tag that belongs to reasoning, or one of calls beside calls that were
    read; `unasked` came with reasoning where thinking is off.
    `changed` of `streamed` differ when they are put together from a stream.
    """

    answers: Sequence[calls.Answer]
    leaked: int
    unasked: int
    streamed: int
    changed: int

    @property
    def figures(self) -> calls.Calls:
        """The counts of check `calls`, here of what the server itself has read."""
        return calls.summarize(self.answers)

    def as_json(self) -> dict[str, Any]:
        """All counts by their names."""
        figures = self.figures.as_json()
        del figures["foreign"]  # a server does not say
        own = {name: value for name, value in vars(self).items() if isinstance(value, int)}
        return {**figures, **own}


def engine_tasks() -> Sequence[Task]:
    """What is asked: the tasks of check `calls`."""
    return tasks(calls.TASKS)


def ask_all(asking: Client, asked: Sequence[Task]) -> Turns:
    """Ask everything, and the first tasks once more as a stream."""
    whole = [_ask(asking, task, stream=False) for task in asked]
    streamed = [_ask(asking, task, stream=True) for task in asked[:STREAMED]]
    # Of a call that turns out to be none, a stream has sent the beginning already.
    again = [
        (one, other)
        for one, other in zip(whole, streamed, strict=False)
        if other.calls is not None and CALL not in one.content
    ]
    return Turns(
        [_read(task, answer) for task, answer in zip(asked, whole, strict=True)],
        sum(map(_leaks, whole)),
        sum(
            bool(answer.thought.strip()) and not task.thinking
            for task, answer in zip(asked, whole, strict=True)
        ),
        len(again),
        sum(_without_layout(one) != _without_layout(other) for one, other in again),
    )


def _ask(asking: Client, task: Task, *, stream: bool) -> client.Answer:
    return asking.ask(task.messages, task.tools, thinking=task.thinking, stream=stream)


def _read(task: Task, answer: client.Answer) -> calls.Answer:
    closed = bool(answer.thought.strip()) and not _leaks(answer)
    return calls.Answer(task, answer.calls or (), answer.content, closed, None)


def _leaks(answer: client.Answer) -> bool:
    # A call that could not be read stays in the answer, and is counted as not parsed.
    tags = (*THINK, CALL) if answer.calls else THINK
    return any(tag in answer.content for tag in tags)


def _without_layout(answer: client.Answer) -> client.Answer:
    """The answer but for space around its content, which vLLM keeps in streams alone."""
    return replace(answer, content=answer.content.strip())
