"""Tasks that can only be done by copying a name that no text contains, and how answers are judged.

A model that knows a name can guess the rest of it; one that has never seen it must carry every
token over, which is what coarse weights spoil first.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from carnice_build.errors import CheckpointError

SEED = 1
MOST_EDITS = 0.5
"""Edits to a name, by its length, up to which a word is the name with typos and not another."""

_WORD_LIST = (
    "amber anchor badge basin beacon branch cargo cedar cipher cobalt coral digest ember falcon "
    "flint gate glacier harbor index ivory kernel lantern ledger magnet marble meadow nickel onyx "
    "orbit panel pepper pilot prism quartz raven ribbon saddle shard signal socket spruce summit "
    "tango timber topaz tunnel velvet walnut yarrow zephyr"
)
_WORDS = _WORD_LIST.split()
_WORD = re.compile(r"[\w-]+")


@dataclass(frozen=True)
class Task:
    """A question to answer with `name`, which stands nowhere but in the question.

    `answer` is the assistant's message as chat templates take it.
    """

    kind: str
    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Mapping[str, Any], ...]
    answer: Mapping[str, Any]
    name: str


@dataclass(frozen=True)
class Rendered:
    """A task as a model reads it: the prompt, the right answer, and where the name is in that."""

    task: Task
    prompt: str
    answer: str
    start: int

    @property
    def stop(self) -> int:
        """Where the name ends in the answer."""
        return self.start + len(self.task.name)


class Verdict(StrEnum):
    """What became of the name in an answer."""

    EXACT = "exact"
    TYPO = "typo"
    MISS = "miss"


def tasks(count: int, seed: int = SEED) -> list[Task]:
    """`count` tasks, of each kind alike; the same ones for the same seed."""
    rng = random.Random(seed)
    kinds = (_repeat, _look_up, _call)
    return [kinds[index % len(kinds)](rng) for index in range(count)]


def render(task: Task, template: Callable[..., str]) -> Rendered:
    """The task through `template`, the `apply_chat_template` of a tokenizer of transformers.

    CheckpointError when the template does not write the answer behind its own prompt.
    """
    options = {"tools": list(task.tools) or None, "tokenize": False, "enable_thinking": False}
    messages = [dict(message) for message in task.messages]
    prompt = template(messages, add_generation_prompt=True, **options)
    whole = template([*messages, dict(task.answer)], **options)
    answer = whole.removeprefix(prompt)
    if answer == whole or task.name not in answer:
        raise CheckpointError(
            f"the chat template does not write {task.kind} behind its own prompt",
            expected="an answer with the name that was asked for",
        )
    return Rendered(task, prompt, answer, answer.rindex(task.name))


def written(answer: str, name: str) -> str | None:
    """The word of an answer that is nearest to `name`, the first of several; None if none is."""
    words: list[str] = _WORD.findall(answer)
    return min(words, key=lambda word: edits(word, name), default=None)


def judge(answer: str, name: str) -> Verdict:
    """Whether `name` stands in an answer as it is, with typos, or not at all."""
    word = written(answer, name)
    distance = len(name) if word is None else edits(word, name)
    if distance == 0:
        return Verdict.EXACT
    return Verdict.TYPO if distance <= MOST_EDITS * len(name) else Verdict.MISS


def edits(one: str, other: str) -> int:
    """Characters to insert, delete or replace between two words, after Levenshtein."""
    row = list(range(len(other) + 1))
    for index, letter in enumerate(one, 1):
        diagonal, row[0] = row[0], index
        for place, wanted in enumerate(other, 1):
            best = min(row[place] + 1, row[place - 1] + 1, diagonal + (letter != wanted))
            diagonal, row[place] = row[place], best
    return row[-1]


def _repeat(rng: random.Random) -> Task:
    name = _name(rng)
    return _chat("an answer", f"Repeat exactly: {name}", name)


def _look_up(rng: random.Random) -> Task:
    table = {_snake(rng): _name(rng) for _ in range(3)}
    key = rng.choice(list(table))
    lines = "\n".join(f"{name}: {value}" for name, value in table.items())
    return _chat("a value", f"{lines}\nGive me the value of {key}.", table[key])


def _chat(kind: str, question: str, name: str) -> Task:
    asked = {"role": "user", "content": question}
    return Task(kind, (asked,), (), {"role": "assistant", "content": name}, name)


def _call(rng: random.Random) -> Task:
    function, parameter, name = _snake(rng), _snake(rng), _name(rng)
    schema = {
        "type": "object",
        "properties": {parameter: {"type": "string"}},
        "required": [parameter],
    }
    described = {"name": function, "description": f"Function {function}.", "parameters": schema}
    asked = {"role": "user", "content": f"Call {function} with {parameter} = {name}."}
    call = {"type": "function", "function": {"name": function, "arguments": {parameter: name}}}
    answer = {"role": "assistant", "content": "", "tool_calls": [call]}
    tools = ({"type": "function", "function": described},)
    return Task("a tool call", (asked,), tools, answer, name)


def _name(rng: random.Random) -> str:
    return rng.choice((_snake, _camel, _hexadecimal, _code))(rng)


def _snake(rng: random.Random) -> str:
    return "_".join([*_chosen(rng), str(rng.randint(2, 999))])


def _camel(rng: random.Random) -> str:
    first, *rest = _chosen(rng)
    return first + "".join(word.capitalize() for word in rest)


def _chosen(rng: random.Random) -> Iterator[str]:
    return (rng.choice(_WORDS) for _ in range(rng.randint(2, 3)))


def _hexadecimal(rng: random.Random) -> str:
    return "".join(rng.choices("0123456789abcdef", k=rng.randint(8, 16)))


def _code(rng: random.Random) -> str:
    letters = "".join(rng.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZ", k=3))
    return f"{letters}-{rng.randint(1000, 99999)}"
