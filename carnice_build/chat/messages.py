"""Messages of a dataset's row, made into what chat templates take."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from carnice_build.chat.render import Message
from carnice_build.errors import CheckpointError


def with_parsed_calls(message: Message, where: str) -> Message:
    """`message` with the arguments of each tool call as a mapping, which templates iterate over.

    OpenAI's API has them as JSON text; no arguments, null and "" are an empty mapping.
    vLLM parses them for every template before it renders, so a served model sees no others.
    CheckpointError naming `where` for text that is no JSON object.
    """
    calls = message.get("tool_calls")
    if not isinstance(calls, list):
        return message
    return {**message, "tool_calls": [_parsed(call, where) for call in calls]}


def _parsed(call: Any, where: str) -> Any:
    if not isinstance(call, dict):
        raise CheckpointError("has a tool call that is no object", where=where)
    if "function" in call:  # in OpenAI's form the name and the arguments are one level down
        return {**call, "function": _parsed(call["function"], where)}
    arguments = call.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            arguments = None
    if not isinstance(arguments, dict):
        raise CheckpointError(
            f"calls {str(call.get('name'))!r} with arguments that are no JSON object", where=where
        )
    return {**call, "arguments": arguments}


def without_nulls(value: Any) -> Any:
    """`value` without the keys of mappings, at any depth, whose value is None.

    Arrow gives every struct of a column the keys of all of them, null where a row has none, so a
    null that a row did state cannot be told from one that another row's keys brought.
    Nulls in lists stay.
    """
    if isinstance(value, Mapping):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value
