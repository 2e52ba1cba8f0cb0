"""Tasks of an agent with right answers: functions to call, and results to tell in words.

All values are drawn from a seed, so that no model can have seen them.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from carnice_build.chat.parsers import ToolCall
from carnice_build.chat.render import Chat, Message
from carnice_build.verification.tools import TOOLS, Tool, Use, made_up_tool

SEED = 1


class Kind(StrEnum):
    """What a task asks for."""

    SINGLE = "a call"
    """Of one of up to four functions that agents are given."""
    MADE_UP = "a call of a made-up function"
    PARALLEL = "parallel calls"
    """Two or three at once."""
    NEXT = "a call after a result"
    ANSWER = "an answer in words"
    """To a question whose call has been answered."""


@dataclass(frozen=True)
class Task:
    """A conversation up to the assistant's turn, and what is right there.

    Right are the `calls`, or without any, words that hold the `values`.
    `turn` is such a turn as chat templates take it; with `thinking` it begins with a thought.
    """

    kind: Kind
    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...]
    thinking: bool
    calls: tuple[ToolCall, ...]
    values: tuple[str, ...]
    turn: Message

    @property
    def prompt(self) -> Chat:
        """What the model is to continue."""
        return Chat(self.messages, self.tools, prompt=True, options=self._options)

    @property
    def whole(self) -> Chat:
        """The same with the right turn behind it."""
        return Chat([*self.messages, self.turn], self.tools, options=self._options)

    @property
    def _options(self) -> Mapping[str, Any]:
        return {"enable_thinking": self.thinking}


def tasks(count: int, seed: int = SEED) -> list[Task]:
    """`count` tasks, of each kind alike and half of them with thinking; the same for a seed."""
    rng = random.Random(seed)
    kinds = list(Kind)
    return [
        _task(rng, kinds[index % len(kinds)], thinking=bool(index // len(kinds) % 2))
        for index in range(count)
    ]


def _task(rng: random.Random, kind: Kind, *, thinking: bool) -> Task:
    made_up = kind is Kind.MADE_UP or (kind is not Kind.SINGLE and rng.random() < 0.5)
    if made_up:
        tools = [made_up_tool(rng) for _ in range(rng.randint(1, 3))]
    else:
        tools = rng.sample(TOOLS, rng.randint(1, 4))
    if kind is Kind.PARALLEL:
        uses = [Use.draw(rng, rng.choice(tools)) for _ in range(rng.choice((2, 3)))]
        asked = " ".join(use.question for use in uses)
        return _made(kind, tools, thinking, [_said(asked)], uses)
    first = Use.draw(rng, rng.choice(tools))
    if kind is Kind.NEXT:
        second = Use.draw(rng, rng.choice(tools))
        asked = f"{first.question} After that: {second.question}"
        thought = f"First {first.tool.name}, then {second.tool.name}." if thinking else ""
        messages = [_said(asked), _calling([first], thought), _responding(first)]
        return _made(kind, tools, thinking, messages, [second])
    if kind is Kind.ANSWER:
        thought = f"I need {first.tool.name}." if thinking else ""
        messages = [_said(first.question), _calling([first], thought), _responding(first)]
        values = tuple(str(value) for value in first.results.values())
        turn = _turn("Now I can answer." if thinking else "", first.answer)
        return Task(kind, tuple(messages), _schemas(tools), thinking, (), values, turn)
    return _made(kind, tools, thinking, [_said(first.question)], [first])


def _made(
    kind: Kind,
    tools: Sequence[Tool],
    thinking: bool,
    messages: Sequence[Message],
    uses: Sequence[Use],
) -> Task:
    """A task whose right turn is to use functions."""
    thought = f"I need {' and '.join(use.tool.name for use in uses)}." if thinking else ""
    calls = tuple(ToolCall(use.tool.name, use.arguments) for use in uses)
    turn = _calling(uses, thought)
    return Task(kind, tuple(messages), _schemas(tools), thinking, calls, (), turn)


def _schemas(tools: Sequence[Tool]) -> tuple[Mapping[str, Any], ...]:
    return tuple(tool.schema() for tool in tools)


def _said(question: str) -> Message:
    return {"role": "user", "content": question}


def _turn(thought: str, answer: str) -> dict[str, Any]:
    turn = {"role": "assistant", "content": answer}
    return {**turn, "reasoning_content": thought} if thought else turn


def _calling(uses: Sequence[Use], thought: str) -> Message:
    functions = [{"name": use.tool.name, "arguments": use.arguments} for use in uses]
    calls = [{"type": "function", "function": function} for function in functions]
    return {**_turn(thought, ""), "tool_calls": calls}


def _responding(use: Use) -> Message:
    return {"role": "tool", "content": json.dumps(use.results)}
