"""Tool-call dialogues in the Hermes form, and their translation to chat-template messages.

A dialogue is `{"conversations": [{"from": ..., "value": ...}], "tools": [...]}` with the speakers
`system`, `human`, `gpt` and `tool`; calls stand in `<tool_call>` as JSON.
"""

from __future__ import annotations

import json
import random
import re
from typing import Any

from carnice_build.verification.tools import TOOLS, Tool, Use, made_up_tool

Dialogue = dict[str, Any]
Turn = dict[str, str]

_SYSTEM_PROMPTS = (
    "You are a function calling assistant. Call functions when they help to answer.",
    "You are an agent. Use the functions you are given; never invent an argument.",
    "You may call one or more functions to help with the user's query.",
    "Help the user. Call a function only when it is needed.",
)


def tool_dialogue(rng: random.Random, made_up: float) -> Dialogue:
    """One dialogue; `made_up` is the share of dialogues whose functions are invented for them."""
    if rng.random() < made_up:
        tools = [made_up_tool(rng) for _ in range(rng.randint(1, 3))]
    else:
        tools = rng.sample(TOOLS, rng.randint(1, 4))
    turns = [{"from": "system", "value": rng.choice(_SYSTEM_PROMPTS)}] if rng.random() < 0.6 else []
    thinking = rng.random() < 0.5
    for _ in range(rng.choice((1, 1, 2))):
        exchange = rng.choice((_single, _single, _single, _parallel, _parallel, _in_turn, _no_call))
        turns += exchange(rng, tools, thinking)
    return {"conversations": turns, "tools": [tool.schema() for tool in tools]}


def _single(rng: random.Random, tools: list[Tool], thinking: bool) -> list[Turn]:
    use = Use.draw(rng, rng.choice(tools))
    return _calls([use], thinking)


def _parallel(rng: random.Random, tools: list[Tool], thinking: bool) -> list[Turn]:
    uses = [Use.draw(rng, rng.choice(tools)) for _ in range(rng.choice((2, 2, 3)))]
    return _calls(uses, thinking)


def _in_turn(rng: random.Random, tools: list[Tool], thinking: bool) -> list[Turn]:
    """Two calls, the second when the first has been answered."""
    first, second = (Use.draw(rng, rng.choice(tools)) for _ in range(2))
    return [
        {"from": "human", "value": f"{first.question} After that: {second.question}"},
        _calling([first], thinking, f"First {first.tool.name}, then {second.tool.name}."),
        _responding([first]),
        _calling([second], thinking, f"Now {second.tool.name}."),
        _responding([second]),
        _answering([first, second], thinking),
    ]


def _no_call(rng: random.Random, tools: list[Tool], thinking: bool) -> list[Turn]:
    listed = ", ".join(tool.name for tool in tools)
    question = rng.choice(("What can you do?", "Which functions do you have?"))
    thought = _thought("This needs no function.", thinking)
    return [
        {"from": "human", "value": question},
        {"from": "gpt", "value": f"{thought}I can call {listed}."},
    ]


def _calls(uses: list[Use], thinking: bool) -> list[Turn]:
    names = " and ".join(use.tool.name for use in uses)
    return [
        {"from": "human", "value": " ".join(use.question for use in uses)},
        _calling(uses, thinking, f"I need {names}."),
        _responding(uses),
        _answering(uses, thinking),
    ]


def _calling(uses: list[Use], thinking: bool, thought: str) -> Turn:
    calls = (
        _tagged("tool_call", json.dumps({"name": use.tool.name, "arguments": use.arguments}))
        for use in uses
    )
    return {"from": "gpt", "value": _thought(thought, thinking) + "\n".join(calls)}


def _responding(uses: list[Use]) -> Turn:
    responses = (_tagged("tool_response", json.dumps(use.results)) for use in uses)
    return {"from": "tool", "value": "\n".join(responses)}


def _answering(uses: list[Use], thinking: bool) -> Turn:
    answers = " ".join(use.answer for use in uses)
    return {"from": "gpt", "value": _thought("Now I can answer.", thinking) + answers}


def _tagged(tag: str, value: str) -> str:
    return f"<{tag}>\n{value}\n</{tag}>"


def _thought(thought: str, thinking: bool) -> str:
    return f"<think>\n{thought}\n</think>\n" if thinking else ""


def to_messages(dialogue: Dialogue) -> list[dict[str, Any]]:
    """A Hermes dialogue as chat-template messages."""
    messages: list[dict[str, Any]] = []
    for turn in dialogue["conversations"]:
        speaker, value = turn["from"], turn["value"]
        if speaker == "tool":
            messages += [
                {"role": "tool", "content": text} for text in _inside("tool_response", value)
            ]
        elif speaker == "gpt":
            messages.append(_assistant_message(value))
        else:
            messages.append({"role": "user" if speaker == "human" else speaker, "content": value})
    return messages


def _assistant_message(value: str) -> dict[str, Any]:
    calls = [json.loads(text) for text in _inside("tool_call", value)]
    message: dict[str, Any] = {
        "role": "assistant",
        "content": value.split("<tool_call>")[0].strip(),
    }
    if calls:
        message["tool_calls"] = [{"type": "function", "function": call} for call in calls]
    return message


def _inside(tag: str, value: str) -> list[str]:
    return re.findall(rf"<{tag}>\n(.*?)\n</{tag}>", value, flags=re.DOTALL)
