"""Templates to try, and conversations of every kind."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY

from carnice_build.chat.hermes import to_hermes
from carnice_build.chat.render import Chat
from carnice_build.chat.roundtrip import TOOLS

GOLDEN = Path(__file__).parent / "golden"
DEMO = REPOSITORY / "demo" / "qwen3.6-27b"
XML = {
    "demo": (DEMO / "chat_template.jinja").read_text(),
    "qwen": (GOLDEN / "qwen.jinja").read_text(),
}
"""Templates that write Qwen3's XML: the demo's, and one built as Qwen3.6's own."""


@cache
def hermes(name: str) -> str:
    """The template of that name, patched."""
    return to_hermes(XML[name])


both = pytest.mark.parametrize("name", ["demo", "qwen"])


def call(city: object, **more: Any) -> dict[str, Any]:
    arguments = {"city": city, **more}
    return {"type": "function", "function": {"name": "get_weather", "arguments": arguments}}


def assistant(content: str, thought: str = "", *calls: dict[str, Any]) -> dict[str, Any]:
    turn = {"role": "assistant", "content": content, "reasoning_content": thought}
    return {**turn, "tool_calls": list(calls)} if calls else turn


def result(content: str) -> dict[str, Any]:
    return {"role": "tool", "content": content}


SYSTEM = {"role": "system", "content": "Be brief."}
ASKED = {"role": "user", "content": "The weather in Tokyo and Paris?"}
THANKS = {"role": "user", "content": "Thank you. And in Rome?"}
ROUND = [
    ASKED,
    assistant("Let me look.", "Tokyo first.", call("Tokyo")),
    result('{"temp": 21}'),
    assistant("", "Now Paris.", call("Paris", days=2)),
    result('{"temp": 14}'),
    assistant("21 and 14 °C.", "Both are known."),
]
NESTED = call("Zürich", options={"units": ["°C", {"wind": "Bft 🌬", "gusts": None}]}, hourly=True)

CHATS = {
    "plain": Chat([ASKED], prompt=True),
    "system, no tools": Chat([SYSTEM, ASKED], prompt=True),
    "tools, no system": Chat([ASKED], TOOLS, prompt=True),
    "system and tools": Chat([SYSTEM, ASKED], TOOLS, prompt=True),
    "thinking off": Chat([ASKED], TOOLS, prompt=True, options={"enable_thinking": False}),
    "single call": Chat([ASKED, assistant("", "Tokyo.", call("Tokyo"))], TOOLS),
    "parallel calls": Chat([ASKED, assistant("", "", call("Tokyo"), call("Paris"))], TOOLS),
    "answer and calls": Chat([ASKED, assistant("Well.", "", call("Rome"), call("Oslo"))], TOOLS),
    "call without arguments": Chat(
        [ASKED, assistant("", "", {"function": {"name": "get_weather", "arguments": {}}})], TOOLS
    ),
    "several turns": Chat([SYSTEM, *ROUND], TOOLS),
    "next question": Chat([SYSTEM, *ROUND, THANKS], TOOLS, prompt=True),
    "results of parallel calls": Chat(
        [ASKED, assistant("", "", call("Tokyo"), call("Paris")), result("21"), result("14")],
        TOOLS,
        prompt=True,
    ),
    "nested and not ASCII": Chat([ASKED, assistant("", "Zürich!", NESTED)], TOOLS),
    "thoughts in the content": Chat(
        [ASKED, {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nSunny."}], TOOLS
    ),
}
