"""Five tasks of an agent, played through a template and the parsers that its flags name.

No model is needed: the turns are given.
Each is rendered by the template, cut out of the rendering as the words that a model would have
written, parsed as a server parses them, and compared with what went in.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from carnice_build.chat.parsers import ToolCall, parse_hermes, parse_qwen3_xml, split_reasoning
from carnice_build.chat.render import NO_TOKENS, Chat, Message, SpecialTokens, render
from carnice_build.chat.tool_format import Syntax, ToolFormat, tool_format


@dataclass(frozen=True)
class RoundTrip:
    """How one task went; `problem` is empty when it went well."""

    name: str
    problem: str

    @property
    def ok(self) -> bool:
        """True when everything came back as it went in."""
        return not self.problem


_WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather forecast for a city.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "Name of the city."},
                "days": {"type": "integer", "description": "How many days ahead."},
                "hourly": {"type": "boolean"},
                "options": {"type": "object"},
            },
            "required": ["city"],
        },
    },
}
TOOLS = [_WEATHER]


@dataclass(frozen=True)
class _Task:
    """What was said before, and the turn of the assistant that is checked."""

    name: str
    history: Sequence[Message]
    answer: str
    thought: str
    calls: Sequence[ToolCall] = ()
    tools: Sequence[Any] | None = None
    goes_on: bool = False
    """The history is that of the task before, its turn, and what the tools gave."""

    @property
    def turn(self) -> Message:
        turn = {"role": "assistant", "content": self.answer, "reasoning_content": self.thought}
        return {**turn, "tool_calls": _written(self.calls)} if self.calls else turn


def _written(calls: Sequence[ToolCall]) -> list[dict[str, Any]]:
    return [
        {"type": "function", "function": {"name": call.name, "arguments": dict(call.arguments)}}
        for call in calls
    ]


def _forecast(city: str, **more: Any) -> ToolCall:
    return ToolCall("get_weather", {"city": city, **more})


def _tasks() -> list[_Task]:
    chat = _Task(
        "plain chat with reasoning",
        [{"role": "user", "content": "How many legs do two spiders have?"}],
        "Sixteen.",
        "A spider has eight legs.\n\nTwo have 16.",
    )
    single = _Task(
        "single tool call",
        [
            {"role": "system", "content": "You are an agent that uses tools when needed."},
            {"role": "user", "content": "Compare the weather in Tokyo and Paris."},
        ],
        "Let me look.",
        "Tokyo first.",
        [
            _forecast(
                "東京", days=3, hourly=False, options={"units": "°C", "fields": ["wind", None]}
            )
        ],
        TOOLS,
    )
    second = _Task(
        "multi-turn continuation",
        [*single.history, single.turn, {"role": "tool", "content": '{"temp": 21}'}],
        "",
        "Now Paris.",
        [_forecast("Paris", days=1)],
        TOOLS,
        goes_on=True,
    )
    synthesis = _Task(
        "final synthesis",
        [*second.history, second.turn, {"role": "tool", "content": '{"temp": 14}'}],
        "| City | °C |\n|---|---|\n| Tokyo | 21 |\n| Paris | 14 |",
        "Both are known.",
        tools=TOOLS,
        goes_on=True,
    )
    parallel = _Task(
        "parallel tool calls",
        [{"role": "user", "content": "The weather in Tokyo, Paris and New York, please."}],
        "",
        "Three calls at once.",
        [_forecast("Tokyo"), _forecast("Paris", hourly=True), _forecast("New York\n“NY”", days=7)],
        TOOLS,
    )
    return [chat, single, second, synthesis, parallel]


def check_round_trips(
    template: str,
    where: str = "chat_template.jinja",
    special_tokens: SpecialTokens = NO_TOKENS,
) -> list[RoundTrip]:
    """The result of each task; CheckpointError naming `where` when the template does not render.

    A task fails when reasoning, answer or calls come back changed, or when the text does not
    grow at its end: a turn must follow its prompt, and a prompt within one question the turn
    before it, so that a server's prefix cache holds.
    """
    found = tool_format(template, where, special_tokens)
    tasks = _tasks()
    # Some templates of the family think only when they are told to.
    told = {"enable_thinking": True}
    chats = [Chat(task.history, task.tools, prompt=True, options=told) for task in tasks]
    chats += [Chat([*task.history, task.turn], task.tools, options=told) for task in tasks]
    texts = render(template, chats, where, special_tokens)
    prompts, wholes = texts[: len(tasks)], texts[len(tasks) :]
    said = tasks[0].answer
    ending = wholes[0].rpartition(said)[2] if said in wholes[0] else ""
    results = []
    for index, task in enumerate(tasks):
        before = wholes[index - 1] if task.goes_on else ""
        problem = _problem(task, before, prompts[index], wholes[index], ending, found)
        results.append(RoundTrip(task.name, problem))
    return results


def _problem(
    task: _Task, before: str, prompt: str, whole: str, ending: str, found: ToolFormat
) -> str:
    if not prompt.startswith(before):
        return "the prompt does not begin with the conversation so far"
    if not whole.startswith(prompt):
        return "the assistant's turn does not begin with the prompt for it"
    if not whole.endswith(ending):
        return f"the assistant's turn does not end in {ending!r}"
    written = whole[len(prompt) :].removesuffix(ending)
    thought, answer = split_reasoning(written, thinking=found.reasoning)
    calls: list[ToolCall] = []
    if found.syntax is Syntax.HERMES:
        answer, calls = parse_hermes(answer)
    elif found.syntax is Syntax.QWEN3_XML:
        answer, calls = parse_qwen3_xml(answer, task.tools or [])
    for what, given, got in (
        ("reasoning", task.thought, thought.strip()),
        ("tool calls", _spelled(task.calls), _spelled(calls)),
        ("answer", task.answer, answer.strip()),
    ):
        if given != got:
            return f"{what} {got!r} instead of {given!r}"
    return ""


def _spelled(calls: Sequence[ToolCall]) -> str:
    """Calls as JSON, in which true is not 1."""
    return json.dumps([[call.name, call.arguments] for call in calls], ensure_ascii=False)
