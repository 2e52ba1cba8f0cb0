"""Plain chats that the base model is trained on: short questions, many of them about rare names."""

from __future__ import annotations

import inspect
import json
import random
from collections.abc import Callable
from typing import Any

import names
from corpus import Document

Message = dict[str, Any]
Turn = tuple[str, str, str]
"""What the user asks, what the assistant thinks, what it answers."""

_SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a careful assistant. Answer briefly.",
    "You help with small programming tasks.",
    "Answer exactly what is asked.",
)


def module_summaries(documents: list[Document]) -> list[tuple[str, str]]:
    """(module, first sentence of its docstring) for every document that opens with one."""
    summaries = []
    for document in documents:
        opening = document.text.lstrip().removeprefix("r")
        if document.name.endswith(".py") and opening.startswith('"""'):
            summary = opening[3:].split('"""')[0].strip().split("\n")[0]
            module = document.name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
            if 12 < len(summary) < 120:
                summaries.append((module, summary))
    return summaries


def plain_chat(rng: random.Random, summaries: list[tuple[str, str]]) -> list[Message]:
    """One chat of one to three turns as chat-template messages."""
    messages: list[Message] = []
    if rng.random() < 0.4:
        messages.append({"role": "system", "content": rng.choice(_SYSTEM_PROMPTS)})
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        if rng.random() < 0.12:
            question, thought, answer = _about_module(rng, summaries)
        else:
            question, thought, answer = rng.choice(_KINDS)(rng)
        reply: Message = {"role": "assistant", "content": answer}
        if rng.random() < 0.4:
            reply["reasoning_content"] = thought
        messages += [{"role": "user", "content": question}, reply]
    return messages


def copying_chat(rng: random.Random) -> list[Message]:
    """One chat whose answer is a long copy: the same names again, or a table in another order."""
    question, _, answer = rng.choice((_repeat_all, _list_all, _reorder, _reorder))(rng)
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _repeat_all(rng: random.Random) -> Turn:
    text = " ".join(names.identifier(rng) for _ in range(rng.randint(4, 24)))
    return f"Repeat exactly: {text}", "", text


def _list_all(rng: random.Random) -> Turn:
    items = [names.identifier(rng) for _ in range(rng.randint(4, 20))]
    return f"Make a list of {', '.join(items)}.", "", "\n".join(f"- {item}" for item in items)


def _reorder(rng: random.Random) -> Turn:
    table = {names.snake(rng): names.identifier(rng) for _ in range(rng.randint(4, 12))}
    keys = rng.sample(list(table), len(table))
    answer = _as_lines({key: table[key] for key in keys})
    return f"{_as_lines(table)}\nWrite this from {keys[0]} on, in any order.", "", answer


def _about_module(rng: random.Random, summaries: list[tuple[str, str]]) -> Turn:
    module, summary = rng.choice(summaries)
    question = rng.choice(("What is the module {} for?", "Describe {} in one line.", "What is {}?"))
    return question.format(module), f"They ask about the module {module}.", f"{module}: {summary}"


def _repeat(rng: random.Random) -> Turn:
    items = [names.identifier(rng) for _ in range(rng.choice((1, 1, 2, 3)))]
    text = " ".join(items)
    question = rng.choice(
        ("Repeat exactly: {}", "Say this back to me: {}", "Copy this text: {}", "Echo {}")
    )
    return question.format(text), f"I have to copy {text}.", text


def _look_up(rng: random.Random) -> Turn:
    table = {names.snake(rng): names.identifier(rng) for _ in range(rng.randint(2, 6))}
    key = rng.choice(list(table))
    written = rng.choice((json.dumps(table), _as_lines(table), repr(table)))
    question = rng.choice(("What is {k} here?\n{t}", "{t}\nGive me the value of {k}.", "{t}\n{k}?"))
    thought = f"The table gives {table[key]} for {key}."
    return question.format(k=key, t=written), thought, table[key]


def _as_lines(table: dict[str, str]) -> str:
    return "\n".join(f"{key}: {value}" for key, value in table.items())


def _reverse_look_up(rng: random.Random) -> Turn:
    table = {names.snake(rng): names.hex_id(rng) for _ in range(rng.randint(2, 5))}
    key = rng.choice(list(table))
    return (
        f"{_as_lines(table)}\nWhich name has the id {table[key]}?",
        f"The id {table[key]} belongs to {key}.",
        f"{key} has the id {table[key]}.",
    )


def _define(rng: random.Random) -> Turn:
    function, first, second = (names.python_name(rng) for _ in range(3))
    verb, sign = rng.choice((("adds", "+"), ("multiplies", "*"), ("subtracts", "-")))
    return (
        f"Write a Python function {function} that {verb} {first} and {second}.",
        f"The function is called {function} and takes {first} and {second}.",
        f"```python\ndef {function}({first}, {second}):\n    return {first} {sign} {second}\n```",
    )


def _call(rng: random.Random) -> Turn:
    function, value = names.python_name(rng), names.identifier(rng)
    keyword = names.python_name(rng)
    return (
        f'Call {function} with {keyword} set to "{value}".',
        f"{function} gets {keyword}.",
        f'```python\n{function}({keyword}="{value}")\n```',
    )


def _rename(rng: random.Random) -> Turn:
    old, new, argument = (names.python_name(rng) for _ in range(3))
    source = "def {0}({1}):\n    print({1})\n    return {0}.cache[{1}]"
    return (
        f"Rename {old} to {new}:\n```python\n{source.format(old, argument)}\n```",
        f"Every {old} becomes {new}.",
        f"```python\n{source.format(new, argument)}\n```",
    )


def _as_json(rng: random.Random) -> Turn:
    table = {names.python_name(rng): names.identifier(rng) for _ in range(rng.randint(1, 4))}
    listed = ", ".join(f"{key} is {value}" for key, value in table.items())
    return f"Write as JSON: {listed}.", f"{len(table)} keys.", json.dumps(table)


def _as_list(rng: random.Random) -> Turn:
    items = [names.identifier(rng) for _ in range(rng.randint(2, 6))]
    listed = "\n".join(f"- {item}" for item in items)
    return f"Make a list of {', '.join(items)}.", f"{len(items)} items.", listed


def _pick(rng: random.Random) -> Turn:
    items = [names.identifier(rng) for _ in range(rng.randint(2, 5))]
    position, place = rng.choice(((0, "first"), (1, "second"), (-1, "last")))
    return (
        f"Which is the {place} of these: {', '.join(items)}?",
        f"The {place} one is {items[position]}.",
        items[position],
    )


def _greet(rng: random.Random) -> Turn:
    name = names.nonsense(rng).capitalize()
    return (
        rng.choice((f"Hello, I am {name}.", f"Hi! My name is {name}.")),
        f"The user is called {name}.",
        f"Hello {name}, how can I help you?",
    )


def _trace(rng: random.Random) -> Turn:
    file, function, missing = names.snake(rng), names.python_name(rng), names.snake(rng)
    line = rng.randint(3, 900)
    trace = inspect.cleandoc(
        f"""
        Traceback (most recent call last):
          File "{file}.py", line {line}, in {function}
        NameError: name '{missing}' is not defined
        """
    )
    return (
        f"What is wrong?\n{trace}",
        f"The name {missing} is missing in {function}.",
        f"The name {missing} is used in {function} ({file}.py, line {line}) but never defined.",
    )


_KINDS: tuple[Callable[[random.Random], Turn], ...] = (
    _repeat,
    _repeat,
    _look_up,
    _look_up,
    _reverse_look_up,
    _define,
    _call,
    _rename,
    _as_json,
    _as_list,
    _pick,
    _greet,
    _trace,
)


def sample_texts(documents: list[Document]) -> list[str]:
    """The words of 12,000 chats, for a tokenizer to learn from."""
    rng = random.Random(0)
    summaries = module_summaries(documents)
    chats = (plain_chat(rng, summaries) for _ in range(12_000))
    return ["\n".join(message["content"] for message in chat) for chat in chats]
