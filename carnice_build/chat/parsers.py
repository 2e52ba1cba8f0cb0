"""What a server makes of a model's words: reasoning, answer and tool calls.

The rules are those of vLLM 0.32 for a finished answer: reasoning parser `qwen3`, tool-call
parsers `hermes` and `qwen3_xml` (`qwen3_coder` is another name of the latter there).
A text that a parser cannot read as calls is an answer, as it is there.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from carnice_build.chat.render import Tool

CALL, CALL_END = "<tool_call>", "</tool_call>"
THINK = ("<think>", "</think>")
_HERMES_CALL = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)
_XML_FUNCTION = re.compile(r"<function=([^<>]*)>(.*?)(?:</function>|\Z)", re.DOTALL)
_XML_PARAMETER = re.compile(
    r"<parameter=([^<>]*)>(.*?)(?:</parameter>|(?=<parameter=)|\Z)", re.DOTALL
)


@dataclass(frozen=True)
class ToolCall:
    """A call that a model asks for."""

    name: str
    arguments: Mapping[str, Any]


def split_reasoning(text: str, *, thinking: bool = True) -> tuple[str, str]:
    """Reasoning and the rest of an assistant's turn, each as it stands.

    The prompt has opened the block, so the turn begins inside it; a `<think>` of the model's own
    is skipped.
    `</think>` ends it, or a tool call without one; a turn with neither was cut off while thinking.
    With `thinking` off, the prompt has closed the block, and all is the answer.
    """
    if not thinking:
        return "", text
    text = text.partition("<think>")[2] if "<think>" in text else text
    end = re.search(r"</think>|(?=<tool_call>)", text)
    return (text[: end.start()], text[end.end() :]) if end else (text, "")


def parse_hermes(text: str) -> tuple[str, list[ToolCall]]:
    """The answer before the first call, and the calls: JSON objects between `<tool_call>` tags.

    All is the answer when one of them is no JSON object with `name` and `arguments`.
    """
    content, found, _ = text.partition(CALL)
    if not found:
        return text, []
    try:
        calls = [_hermes_call(body) for body in _HERMES_CALL.findall(text)]
    except (ValueError, KeyError, TypeError, RecursionError):
        return text, []
    return content, calls


def _hermes_call(body: str) -> ToolCall:
    value = json.loads(body)
    if not isinstance(value["arguments"], dict):
        raise TypeError
    return ToolCall(value["name"], value["arguments"])


def parse_qwen3_xml(text: str, tools: Sequence[Tool]) -> tuple[str, list[ToolCall]]:
    """The answer before the first call, and the calls: `<function=NAME>` with `<parameter=KEY>`.

    One newline after the opening and one before the closing tag of a parameter are layout.
    A value has the type that the tool's JSON schema gives it, and is a string by default.
    """
    start = re.search(r"<tool_call>|<function=", text)
    if start is None:
        return text, []
    calls = []
    for name, body in _XML_FUNCTION.findall(text, start.start()):
        schemas = _parameters(tools, name)
        arguments = {
            key: _typed(value.removeprefix("\n").removesuffix("\n"), schemas.get(key))
            for key, value in _XML_PARAMETER.findall(body)
        }
        calls.append(ToolCall(name, arguments))
    return text[: start.start()], calls


def _parameters(tools: Sequence[Tool], name: str) -> Mapping[str, Any]:
    for tool in tools:
        function = tool.get("function", tool)
        if function.get("name") == name:
            properties = (function.get("parameters") or {}).get("properties")
            return properties if isinstance(properties, dict) else {}
    return {}


_ALIASES = {
    **dict.fromkeys(("str", "text", "varchar", "char", "enum"), "string"),
    **dict.fromkeys(("int", "int32", "int64", "uint", "long", "short", "unsigned"), "integer"),
    **dict.fromkeys(("float", "float32", "float64", "double"), "number"),
    **dict.fromkeys(("bool",), "boolean"),
    **dict.fromkeys(("dict",), "object"),
    **dict.fromkeys(("list", "arr", "sequence"), "array"),
}


def _types(schema: object) -> Iterator[str]:
    """The type names that a JSON schema admits, from `type`, its values and its choices."""
    if not isinstance(schema, dict):
        return
    named = schema.get("type")
    for kind in named if isinstance(named, list) else [named]:
        if isinstance(kind, str):
            yield _ALIASES.get(kind.strip().lower(), kind.strip().lower())
    for value in [*schema.get("enum", ()), *([schema["const"]] if "const" in schema else [])]:
        yield _TYPE_OF[type(value)]
    for choices in ("anyOf", "oneOf", "allOf"):
        for choice in schema.get(choices, ()):
            yield from _types(choice)


_TYPE_OF = {
    type(None): "null",
    bool: "boolean",
    int: "integer",
    float: "number",
    str: "string",
    list: "array",
    dict: "object",
}


def _typed(text: str, schema: object) -> Any:
    """`text` as the first of the schema's types that it can be, in vLLM's order."""
    types = set(_types(schema)) or {"string"}
    for kind, read in _READERS.items():
        if kind in types:
            try:
                return read(text)
            except (ValueError, KeyError, OverflowError, RecursionError):
                continue
    try:
        return _finite_json(text)
    except (ValueError, RecursionError):
        return text


def _null(text: str) -> None:
    if text.lower() != "null":
        raise ValueError


def _number(text: str) -> int | float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError
    return int(value) if value == int(value) else value


def _boolean(text: str) -> bool:
    return {"true": True, "1": True, "false": False, "0": False}[text.lower().strip()]


def _finite_json(text: str) -> Any:
    def refuse(name: str) -> None:
        raise ValueError(name)

    return json.loads(text, parse_constant=refuse)


_READERS: Mapping[str, Any] = {
    "null": _null,
    "integer": int,
    "number": _number,
    "boolean": _boolean,
    "object": _finite_json,
    "array": _finite_json,
    "string": str,
}
