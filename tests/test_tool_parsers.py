"""What servers read out of a turn: parsers alone, and the way through template and parser."""

from __future__ import annotations

import json
from typing import Any

import pytest
from chats import ASKED, NESTED, XML, assistant, both, call, hermes
from hypothesis import given, settings
from hypothesis import strategies as st

from carnice_build.chat.parsers import ToolCall, parse_hermes, parse_qwen3_xml, split_reasoning
from carnice_build.chat.render import Chat, render
from carnice_build.chat.roundtrip import TOOLS, check_round_trips

# Round trips


@both
@pytest.mark.parametrize("patched", [False, True])
def test_the_five_tasks_pass(name: str, patched: bool) -> None:
    """Reasoning, calls and answers come back from either format as they went in."""
    assert {
        "plain chat with reasoning": "",
        "single tool call": "",
        "multi-turn continuation": "",
        "final synthesis": "",
        "parallel tool calls": "",
    } == {
        item.name: item.problem
        for item in check_round_trips(hermes(name) if patched else XML[name])
    }


@pytest.mark.parametrize(
    ("old", "new", "failing", "problem"),
    [
        ("reasoning_content + '\\n</think>", "'\\n</think>", 5, "reasoning ''"),
        ("+ '\\n</think>\\n\\n' + content", "+ '\\n</think>\\n\\n'", 3, "answer '"),
        ("'<think>\\n\\n</think>\\n\\n'", "'<think>'", 0, ""),
        ("{{- '<think>\\n' }}", "", 0, ""),
        ("'</function>\\n</tool_call>'", "'</function>'", 0, ""),
        ("args_value is string else args_value | tojson", "true else 0", 1, "tool calls"),
        (" (loop.index0 > ns.last_query_index)", " loop.last", 2, "conversation so far"),
    ],
)
def test_a_broken_template_fails_its_tasks(old: str, new: str, failing: int, problem: str) -> None:
    """Each way to lose words or the prefix is a problem of the tasks that it touches."""
    template = XML["qwen"].replace(old, new)
    problems = [item.problem for item in check_round_trips(template) if not item.ok]

    assert template != XML["qwen"]
    assert failing == len(problems)
    assert all(problem in item for item in problems)


def test_a_template_that_thinks_when_told_passes() -> None:
    """Thinking is switched on for the tasks, as in the small Qwen3.5 models it must be."""
    off = "enable_thinking is defined and enable_thinking is false"
    template = XML["qwen"].replace(off, "enable_thinking is not defined or not enable_thinking")

    assert template != XML["qwen"]
    assert all(item.ok for item in check_round_trips(template))


def test_arguments_of_another_type_are_a_problem() -> None:
    """A server that reads 1 where true was said is found out."""
    template = hermes("qwen").replace(
        "else arguments | tojson", "else arguments | tojson | replace('true', '1')"
    )
    problems = {item.name: item.problem for item in check_round_trips(template)}

    assert "1" in problems["parallel tool calls"]


TAGS = ("tool_call>", "parameter", "function", "think>", "\r")
texts = st.text(st.characters(exclude_categories=["Cs", "Cc"], include_characters="\n\t"))
texts = texts.filter(lambda text: not any(tag in text for tag in TAGS))
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**15), 10**15) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)
turns = st.lists(
    st.fixed_dictionaries(
        {"city": texts},
        optional={
            "days": st.integers(-(10**9), 10**9),
            "hourly": st.booleans(),
            "options": st.dictionaries(texts, values, max_size=3),
        },
    ),
    min_size=1,
    max_size=3,
)


@settings(max_examples=6)
@given(st.lists(turns, min_size=10, max_size=15))
@pytest.mark.parametrize("syntax", ["hermes", "qwen3_xml"])
def test_any_arguments_come_back(syntax: str, batch: list[list[dict[str, Any]]]) -> None:
    """Whatever a call holds, the parser gives back what the template was given."""
    template = hermes("qwen") if syntax == "hermes" else XML["qwen"]
    chats = [
        Chat([ASKED, assistant("So.", "Hm.", *(call(**item) for item in turn))], TOOLS)
        for turn in batch
    ]
    parsed = []
    for text in render(template, chats, "a template"):
        turn = text.partition("assistant\n<think>\n")[2].removesuffix("<|im_end|>\n")
        thought, answer = split_reasoning(turn)
        content, calls = (
            parse_hermes(answer) if syntax == "hermes" else parse_qwen3_xml(answer, TOOLS)
        )
        parsed.append((thought.strip(), content.strip(), calls))

    assert [
        ("Hm.", "So.", [ToolCall("get_weather", item) for item in turn]) for turn in batch
    ] == parsed


# Parsers, by the behaviour of vLLM 0.32


@pytest.mark.parametrize(
    ("text", "thought", "answer"),
    [
        ("A thought.\n</think>\n\nAn answer.", "A thought.\n", "\n\nAn answer."),
        ("<think>\nA thought.</think>An answer.", "\nA thought.", "An answer."),
        ("Cut off while", "Cut off while", ""),
        ("Hm.\n<tool_call>\n{}", "Hm.\n", "<tool_call>\n{}"),
        ("</think>a</think>b", "", "a</think>b"),
    ],
)
def test_reasoning_is_split_from_the_answer(text: str, thought: str, answer: str) -> None:
    """`</think>` or a tool call ends the reasoning; nothing is trimmed."""
    assert (thought, answer) == split_reasoning(text)


def test_all_is_the_answer_when_the_prompt_closed_the_thoughts() -> None:
    """With thinking off, nothing is taken for reasoning."""
    assert ("", "An answer.") == split_reasoning("An answer.", thinking=False)


HERMES_CALL = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'


@pytest.mark.parametrize(
    ("text", "content", "arguments"),
    [
        ("No call.", "No call.", []),
        (f"Well.\n{HERMES_CALL}", "Well.\n", [{"a": 1}]),
        (f"{HERMES_CALL}\n{HERMES_CALL}", "", [{"a": 1}] * 2),
        (HERMES_CALL.removesuffix("\n</tool_call>"), "", [{"a": 1}]),
        ("<tool_call>{'a'}</tool_call>", "<tool_call>{'a'}</tool_call>", []),
        ('<tool_call>{"name": "f"}</tool_call>', '<tool_call>{"name": "f"}</tool_call>', []),
        ("<tool_call>[1]</tool_call>", "<tool_call>[1]</tool_call>", []),
        ("<tool_call>" + "[" * 10**5, "<tool_call>" + "[" * 10**5, []),
    ],
)
def test_hermes_calls(text: str, content: str, arguments: list[dict[str, Any]]) -> None:
    """Calls are read between tags or to the end; one that is no JSON makes all the answer."""
    assert (content, [ToolCall("f", item) for item in arguments]) == parse_hermes(text)


def xml(body: str) -> str:
    return f"<tool_call>\n<function=f>\n{body}</function>\n</tool_call>"


def schema(**properties: Any) -> list[dict[str, Any]]:
    return [
        {"type": "function", "function": {"name": "f", "parameters": {"properties": properties}}}
    ]


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        ({"type": "string"}, "12", "12"),
        ({"type": "string"}, "null", "null"),
        ({"type": "string"}, "two\nlines\n", "two\nlines\n"),
        ({"type": "string"}, "", ""),
        ({"type": "integer"}, "12", 12),
        ({"type": "integer"}, "twelve", "twelve"),
        ({"type": "number"}, "1.5", 1.5),
        ({"type": "number"}, "2.0", 2),
        ({"type": "number"}, "inf", "inf"),
        ({"type": "boolean"}, "True", True),
        ({"type": "boolean"}, "false", False),
        ({"type": "boolean"}, "perhaps", "perhaps"),
        ({"type": "object"}, '{"a": [1, "é", null]}', {"a": [1, "é", None]}),
        ({"type": "array"}, "[1, 2]", [1, 2]),
        ({"type": "array"}, "[1, NaN]", "[1, NaN]"),
        ({"type": "array"}, "[" * 10**5, "[" * 10**5),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, "null", None),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, "text", "text"),
        ({"type": ["integer", "null"]}, "3", 3),
        ({"enum": ["1", "2"]}, "1", "1"),
        ({"const": 3}, "3", 3),
        ({"type": "int32"}, "3", 3),
        ({}, "3", "3"),
        (7, "3", "3"),
    ],
)
def test_xml_values_have_the_type_of_the_schema(kind: Any, text: str, value: Any) -> None:
    """A parameter becomes what the tool's JSON schema says, or stays a string."""
    parsed = parse_qwen3_xml(xml(f"<parameter=a>\n{text}\n</parameter>\n"), schema(a=kind))

    assert json.dumps([ToolCall("f", {"a": value}).arguments]) == json.dumps(
        [item.arguments for item in parsed[1]]
    )


@pytest.mark.parametrize(
    ("text", "content", "arguments"),
    [
        ("No call.", "No call.", []),
        (f"Well.\n\n{xml('')}", "Well.\n\n", [{}]),
        (xml("<parameter=a>1</parameter>") * 2, "", [{"a": "1"}] * 2),
        (xml("<parameter=a>1<parameter=b>2</parameter>"), "", [{"a": "1", "b": "2"}]),
        ("<tool_call>\n<function=f>\n<parameter=a>\nTok", "", [{"a": "Tok"}]),
        ("<function=f></function>", "", [{}]),
        ("<tool_call></tool_call>", "", []),
    ],
)
def test_xml_calls(text: str, content: str, arguments: list[dict[str, Any]]) -> None:
    """Calls are read with or without closing tags."""
    assert (content, [ToolCall("f", item) for item in arguments]) == parse_qwen3_xml(text, [])


def test_parsers_agree_with_those_of_mlx_lm() -> None:
    """mlx-lm's parsers read the same calls out of what the templates render."""
    from mlx_lm.tool_parsers import json_tools, qwen3_coder

    turn = assistant("", "", call("Zürich\n", days=3, hourly=True), NESTED)
    for template, library in ((hermes("demo"), json_tools), (XML["demo"], qwen3_coder)):
        text = render(template, [Chat([ASKED, turn], TOOLS)], "")[0].partition("<think>")[2]
        _, ours = parse_hermes(text) if library is json_tools else parse_qwen3_xml(text, TOOLS)
        bodies = [part.partition("</tool_call>")[0] for part in text.split("<tool_call>")[1:]]
        theirs = [library.parse_tool_call(body.strip(), TOOLS) for body in bodies]

        assert theirs == [{"name": item.name, "arguments": item.arguments} for item in ours]
