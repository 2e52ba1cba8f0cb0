"""Check `calls`: the model is asked to call functions, and its words are read as a server does.

What a template says is checked without a model by `chat`; whether the model does what the template
asks of it can only be seen by asking it.
Everything here but the answers themselves is computed without a model.

Two things fail, and both have to be more than chance would make of a sound folder (`CHANCE`, for
one folder among a hundred), because a few dozen answers are few:

- Calls in a form that the parser does not read: more than `FOREIGN` of all answers that should be
  calls, by the binomial's upper tail.
- Fewer than half of the readable calls that the source makes, task by task by the sign test.
  The source is asked through its own template, for the packaged one may be what is wrong.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from carnice_build.chat.files import template_files
from carnice_build.chat.parsers import (
    THINK,
    ToolCall,
    parse_hermes,
    parse_qwen3_xml,
    split_reasoning,
)
from carnice_build.chat.render import SpecialTokens, render
from carnice_build.chat.special_tokens import special_tokens
from carnice_build.chat.tool_format import Syntax, ToolFormat, knows_tools, tool_format
from carnice_build.verification.agent import Kind, Task
from carnice_build.verification.result import Check, count_error, judged

NAME = "calls"
TASKS = 20
CHANCE = 0.01
FOREIGN = 0.1
"""The share of calls in a form that is not read, up to which it may be a slip."""

_MORE_TOKENS = 32
"""How far an answer may go beyond the length of the right one."""
_THOUGHT_TOKENS = 96
"""How much further when it begins with a thought."""


@dataclass(frozen=True)
class Template:
    """A chat template that knows tools, where it stands, and what it makes a model write."""

    text: str
    where: str
    tokens: SpecialTokens
    format: ToolFormat

    @classmethod
    def of(cls, files: Mapping[str, bytes]) -> Template | None:
        """The template that counts among the small files of a folder; None where none has tools.

        CheckpointError when it cannot be used.
        """
        templates = template_files(files)
        if not templates:
            return None
        where, text = next(iter(templates.items()))
        tokens = special_tokens(files)
        found = tool_format(text, where, tokens)
        return cls(text, where, tokens, found) if knows_tools(text, found) else None


@dataclass(frozen=True)
class Asked:
    """What a model is to continue: `right` is a right answer, `more` tokens longer it may be."""

    prompt: str
    right: str
    more: int


def asked(tasks: Sequence[Task], template: Template) -> tuple[Asked, ...]:
    """The tasks through a template; CheckpointError when it does not render them."""
    chats = [chat for task in tasks for chat in (task.prompt, task.whole)]
    texts = render(template.text, chats, template.where, template.tokens)
    return tuple(
        Asked(
            prompt,
            whole.removeprefix(prompt),
            _MORE_TOKENS + (_THOUGHT_TOKENS if task.thinking else 0),
        )
        for task, prompt, whole in zip(tasks, texts[::2], texts[1::2], strict=True)
    )


@dataclass(frozen=True)
class Answer:
    """What became of one task.

    `calls` are those that were read, `closed` says that a thought came to its end and holds no
    marks; `foreign` is the form that could be read where the parser reads no call.
    """

    task: Task
    calls: tuple[ToolCall, ...]
    words: str
    closed: bool
    foreign: Syntax | None

    @property
    def named(self) -> bool:
        """True when the functions are the right ones."""
        return _alike(self.calls, self.task.calls, lambda call: call.name)

    @property
    def keyed(self) -> bool:
        """True when they are given the right parameters, too."""
        return _alike(self.calls, self.task.calls, lambda call: [call.name, sorted(call.arguments)])

    @property
    def right(self) -> bool:
        """True when every value is right: of calls, or in words without a call."""
        if self.task.calls:
            return _alike(self.calls, self.task.calls, lambda call: [call.name, call.arguments])
        held = (rf"(?<!\w){re.escape(value)}(?!\w)" for value in self.task.values)
        return not self.calls and all(re.search(value, self.words) for value in held)


def _alike(found: Sequence[ToolCall], right: Sequence[ToolCall], part: Any) -> bool:
    """True when a part of the calls is the same, in any order; as JSON, in which true is not 1."""
    spelled = (
        sorted(json.dumps(part(call), sort_keys=True) for call in side) for side in (found, right)
    )
    one, other = spelled
    return one == other


def read(task: Task, prompt: str, text: str, template: ToolFormat) -> Answer:
    """An answer as a server that is launched for the template reads it."""
    thinks = template.reasoning and (task.thinking or prompt.rstrip().endswith("<think>"))
    thought, answer = split_reasoning(text, thinking=thinks)
    left = any(tag in thought + answer for tag in THINK)
    closed = "</think>" in text and bool(thought.strip()) and not left
    found = {
        Syntax.HERMES: parse_hermes(answer),
        Syntax.QWEN3_XML: parse_qwen3_xml(answer, task.tools),
    }
    words, calls = found.get(template.syntax, (answer, []))
    others = [syntax for syntax, (_, written) in found.items() if written]
    foreign = others[0] if others and not calls else None
    return Answer(task, tuple(calls), words, closed, foreign)


@dataclass(frozen=True)
class Share:
    """`count` of `of`, which may be none."""

    count: int
    of: int

    @property
    def error(self) -> float:
        """The standard error of `count`, as a count, if tasks are independent."""
        return count_error(self.count, self.of)

    @property
    def rate(self) -> float:
        """The share as a number from 0 to 1; 0 of none."""
        return self.count / self.of if self.of else 0.0

    def __str__(self) -> str:
        return f"{self.count} of {self.of}"

    def as_json(self) -> dict[str, float]:
        """Figures for details."""
        return {"count": self.count, "of": self.of, "error": self.error}


@dataclass(frozen=True)
class Calls:
    """How a model does what agents must do.

    `parsed`, `named`, `keyed` and `exact` are of the tasks that ask for calls, `parallel` of those
    that ask for several: so many calls of the right functions.
    `closed` is of the tasks with thinking, `continued` of those that go on behind a tool's result:
    the right call, or the result in words.
    `foreign` counts answers with calls in other forms, by the name of the form.
    """

    parsed: Share
    named: Share
    keyed: Share
    exact: Share
    parallel: Share
    closed: Share
    continued: Share
    foreign: Mapping[str, int]

    def __str__(self) -> str:
        return (
            f"{self.parsed} calls are read, {self.named.count} have the right name, "
            f"{self.keyed.count} the right keys, {self.exact.count} are exact"
        )

    def as_json(self) -> dict[str, Any]:
        """Figures for details, by their names."""
        return {
            name: value.as_json() if isinstance(value, Share) else dict(value)
            for name, value in vars(self).items()
        }


def summarize(answers: Sequence[Answer]) -> Calls:
    """The figures of a model's answers."""

    def share(values: Sequence[bool]) -> Share:
        return Share(sum(values), len(values))

    calling = _calling(answers)
    return Calls(
        parsed=share([bool(answer.calls) for answer in calling]),
        named=share([answer.named for answer in calling]),
        keyed=share([answer.keyed for answer in calling]),
        exact=share([answer.right for answer in calling]),
        parallel=share([item.named for item in calling if item.task.kind is Kind.PARALLEL]),
        closed=share([answer.closed for answer in answers if answer.task.thinking]),
        continued=share(
            [item.right for item in answers if item.task.kind in (Kind.NEXT, Kind.ANSWER)]
        ),
        foreign=Counter(answer.foreign.value for answer in calling if answer.foreign),
    )


def _calling(answers: Sequence[Answer]) -> list[Answer]:
    return [answer for answer in answers if answer.task.calls]


@dataclass(frozen=True)
class Row:
    """A model's answers, and what the table calls it."""

    name: str
    answers: Sequence[Answer]


def judge_calls(
    served: Row, parser: str | None, same: Row | None = None, own: Row | None = None
) -> Check:
    """The check's result for the folder, whose launches name `parser`.

    `same` is the source through the packaged template, `own` through its own where that is another.
    """
    rows = [row for row in (same, own, served) if row is not None]
    figures = {row.name: summarize(row.answers) for row in rows}
    found, reference = figures[served.name], own or same
    problems = list(_foreign(served.name, found, parser))
    if reference is not None and not problems and _lost(served, reference):
        there = figures[reference.name].parsed
        text = f"{served.name} makes readable calls in {found.parsed} answers"
        text += f", {reference.name} in {there}"
        if same is not None and same is not reference:
            # The source through both templates tells whose fault it is.
            fault = "the packaged template" if _lost(same, reference) else "its weights"
            text += f"; what lost them is {fault}"
        problems.append(text)
    summary = "; ".join(f"{name}: {item}" for name, item in figures.items())
    if reference is not None and not _enough(figures[reference.name].parsed.count):
        summary = f"{reference.name} itself makes next to no calls, so none can be lost; {summary}"
    details = {name: item.as_json() for name, item in figures.items()}
    return judged(NAME, problems, summary, details)


def _foreign(name: str, found: Calls, parser: str | None) -> list[str]:
    """Forms in which so many calls are written that it is no slip."""
    reader = f"parser {parser} does not read" if parser else "no parser of its launches reads"
    asked = found.parsed.of
    return [
        f"{name} writes tool calls as {syntax} in {count} of {asked} answers, which {reader}"
        for syntax, count in found.foreign.items()
        if _tail(count, asked, FOREIGN) < CHANCE
    ]


def _lost(row: Row, reference: Row) -> bool:
    """True when fewer than half of the calls of `reference` are left, and not by chance."""
    pairs = [
        (bool(one.calls), bool(other.calls))
        for one, other in zip(_calling(row.answers), _calling(reference.answers), strict=True)
    ]
    lost, gained = pairs.count((False, True)), pairs.count((True, False))
    left, there = (sum(side) for side in zip(*pairs, strict=True))
    return 2 * left < there and _tail(lost, lost + gained, 0.5) < CHANCE


def _enough(calls: int) -> bool:
    """True when to lose all of as many calls is more than chance."""
    return _tail(calls, calls, 0.5) < CHANCE


def _tail(count: int, of: int, share: float) -> float:
    """How probable `count` or more of `of` are, when each comes with probability `share`."""
    return math.fsum(
        math.comb(of, many) * share**many * (1 - share) ** (of - many)
        for many in range(count, of + 1)
    )
