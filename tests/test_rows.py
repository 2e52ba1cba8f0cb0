"""Rows of a dataset become the chats that a template takes, or an error that names the row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from chats import ASKED, DEMO, XML, hermes

from carnice_build.calibration.tokenizing import tokenize
from carnice_build.errors import CheckpointError

Row = dict[str, Any]
PLAIN = "{% for m in messages %}{{ m.content }} {% endfor %}"


def ids(path: Path, rows: list[Row], template: str, samples: int | None = None) -> list[list[int]]:
    """The rows' tokens, from a file of the form that its name says."""
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    params = {
        "samples": samples or len(rows),
        "length": 10_000,
        "roles": {},
        "template": template,
        "special_tokens": {},
        "rows": path.suffix[1:],
    }
    tokenizer = np.frombuffer((DEMO / "tokenizer.json").read_bytes(), np.uint8)
    return tokenize(params, tokenizer, str(path))


def texts(path: Path, rows: list[Row], template: str) -> list[str]:
    """What the rows' tokens say."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    found: list[str] = tokenizer.decode_batch(ids(path, rows, template), skip_special_tokens=False)
    return found


def chat(content: str = "Hello, you.", **more: Any) -> Row:
    return {"messages": [{"role": "user", "content": content}], **more}


# The row that a template refuses

REFUSALS = {
    "raises": "{{ raise_exception('not this') }}",
    "fails": "{{ messages.nothing.at_all }}",
    "writes too much": "{% for a in range(99999) %}{{ 'x' * 99 }}{% endfor %}",
    "never ends": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "fills the memory": "{{ 'x' * 10**10 }}",
}


@pytest.mark.parametrize("what", REFUSALS)
def test_the_row_that_a_template_refuses_is_named(tmp_path: Path, what: str) -> None:
    """However a template ends at a row of many, the error names this row and no other."""
    template = "{% if messages[0].content == 'no' %}" + REFUSALS[what] + "{% endif %}" + PLAIN
    rows = [chat() for _ in range(39)] + [chat("no")] + [chat() for _ in range(10)]

    with pytest.raises(CheckpointError) as caught:
        ids(tmp_path / "rows.jsonl", rows, template)
    assert f"{tmp_path / 'rows.jsonl'}: row 40: the chat template" == caught.value.where


def test_texts_between_chats_are_counted(tmp_path: Path) -> None:
    """A row is known by its number in the file, though some rows need no template."""
    rows = [{"text": "Just words."}, chat(), {"text": "And more."}, chat("no"), chat()]
    template = "{% if messages[0].content == 'no' %}{{ 1 / 0 }}{% endif %}" + PLAIN

    with pytest.raises(CheckpointError, match=r"rows\.jsonl: row 4: the chat template: cannot be"):
        ids(tmp_path / "rows.jsonl", rows, template)


def test_a_row_that_is_no_json_is_named(tmp_path: Path) -> None:
    """What only parquet can hold is no chat; the error names its row."""
    turns = [{"role": "user", "content": "Hello", "image": image} for image in (None, b"\xff")]

    with pytest.raises(CheckpointError, match=r"row 2: the chat template: .* bytes"):
        ids(tmp_path / "rows.parquet", [{"messages": [turn]} for turn in turns], PLAIN)


def test_a_template_that_is_none_names_no_row(tmp_path: Path) -> None:
    """No row is to blame for a template that cannot be compiled."""
    with pytest.raises(CheckpointError, match=r"^the chat template: cannot be rendered: Template"):
        ids(tmp_path / "rows.jsonl", [chat()], "{% for %}")


def test_rows_are_rendered_before_one_that_is_refused(tmp_path: Path) -> None:
    """A refused row behind those that are wanted stops nothing."""
    template = "{% if messages[0].content == 'no' %}{{ 1 / 0 }}{% endif %}" + PLAIN

    assert 2 == len(ids(tmp_path / "rows.jsonl", [chat(), chat(), chat("no")], template, 2))


# Arguments of tool calls

ARGUMENTS = {"city": "Zürich", "days": 3, "options": {"units": ["°C", None]}, "hourly": None}
SPELLINGS: dict[str, tuple[Any, Row]] = {
    "an object": (ARGUMENTS, ARGUMENTS),
    "text": (json.dumps(ARGUMENTS), ARGUMENTS),
    "text with spaces": (json.dumps(ARGUMENTS, indent=4, ensure_ascii=False), ARGUMENTS),
    "an empty object": ({}, {}),
    "text of an empty object": ("{}", {}),
    "no text": ("", {}),
    "null": (None, {}),
}


def calling(arguments: Any, *, flat: bool = False) -> Row:
    """A row with a tool call in OpenAI's form, or without its upper level."""
    call = {"name": "get_weather", "arguments": arguments}
    turn = {"role": "assistant", "content": "", "tool_calls": [call if flat else function(call)]}
    return {"messages": [ASKED, turn]}


def function(call: Row) -> Row:
    return {"type": "function", "function": call}


@pytest.mark.parametrize("flat", [False, True], ids=["OpenAI", "flat"])
@pytest.mark.parametrize("template", [XML["qwen"], hermes("qwen")], ids=["xml", "hermes"])
@pytest.mark.parametrize("what", SPELLINGS)
def test_arguments_may_be_json_text(tmp_path: Path, what: str, template: str, flat: bool) -> None:
    """A template of either format gets a mapping, whatever the row's form; a null in it stays."""
    given, parsed = SPELLINGS[what]
    row, expected = calling(given, flat=flat), calling(parsed, flat=flat)
    found = ids(tmp_path / "given.jsonl", [row], template)

    assert ids(tmp_path / "parsed.jsonl", [expected], template) == found


def test_a_call_without_arguments_has_none(tmp_path: Path) -> None:
    """A call that leaves its arguments out is one with no arguments."""
    row = calling({})
    del row["messages"][1]["tool_calls"][0]["function"]["arguments"]
    template = "{{ messages[1].tool_calls[0].function.arguments | items | list }}"

    assert ["[]"] == texts(tmp_path / "rows.jsonl", [row], template)


@pytest.mark.parametrize("arguments", ["city=Zürich", "{", "[1]", "5", "null", [1], "[" * 99_999])
def test_arguments_that_are_no_object_name_the_row(tmp_path: Path, arguments: Any) -> None:
    """Text that is no JSON object is an error, never a prompt without arguments."""
    words = r"row 2: calls 'get_weather' with arguments that are no JSON object"

    with pytest.raises(CheckpointError, match=words):
        ids(tmp_path / "rows.jsonl", [chat(), calling(arguments)], XML["qwen"])


@pytest.mark.parametrize("call", ["get_weather", 5, {"function": "get_weather"}])
def test_a_call_that_is_none_names_the_row(tmp_path: Path, call: Any) -> None:
    """A call is an object, and so is its function."""
    row = {"messages": [ASKED, {"role": "assistant", "content": "", "tool_calls": [call]}]}

    with pytest.raises(CheckpointError, match="row 1: has a tool call that is no object"):
        ids(tmp_path / "rows.jsonl", [row], XML["qwen"])


# Keys of other rows


def tool(name: str, *parameters: str, required: bool = True) -> Row:
    """A tool's schema."""
    properties = {name: {"type": "string"} for name in parameters}
    schema = {"type": "object", "properties": properties}
    more = {"required": list(parameters)} if required else {}
    return function({"name": name, "parameters": {**schema, **more}})


DIFFERENT: list[Row] = [
    {"messages": [ASKED, {"role": "assistant", "content": "Hm."}], "tools": None},
    {**calling({"city": "Oslo"}), "tools": [tool("get_weather", "city")]},
    {**calling({"days": 2}), "tools": [tool("forecast", "days", required=False)]},
    {"messages": [{**ASKED, "name": "Ada"}], "tools": [tool("a", "x"), tool("b", "y", "z")]},
    calling({}),
]
"""Rows whose turns, tools and arguments have different keys."""

ALL = "{{ messages | tojson }}{{ tools | tojson }}"


@pytest.mark.parametrize("template", [ALL, XML["qwen"]], ids=["all", "xml"])
def test_parquet_brings_no_keys_of_other_rows(tmp_path: Path, template: str) -> None:
    """Rows in parquet give the prompts of the same rows in .jsonl, though Arrow unites keys."""
    united = pyarrow.Table.from_pylist(DIFFERENT).to_pylist()
    expected = texts(tmp_path / "rows.jsonl", DIFFERENT, template)

    assert DIFFERENT != united
    assert expected == texts(tmp_path / "rows.parquet", DIFFERENT, template)


def test_a_null_that_a_line_states_is_kept(tmp_path: Path) -> None:
    """In .jsonl nothing is united, so a null was meant."""
    row = chat(tools=[function({"name": "f", "default": None})])
    template = "{{ tools[0].function | tojson }}"

    assert ['{"name": "f", "default": null}'] == texts(tmp_path / "a.jsonl", [row], template)
    assert ['{"name": "f"}'] == texts(tmp_path / "a.parquet", [row], template)


def test_nulls_in_lists_and_in_text_stay(tmp_path: Path) -> None:
    """A null among the items of a list, or in JSON text, comes from no other row."""
    tools = json.dumps([function({"name": "f", "default": None})])
    rows = [chat(tools=tools, x=1), {**calling({"a": ["b", None]}), "tools": None}]
    template = "{{ tools | tojson }}{{ (messages | last).tool_calls | tojson }}"
    rows[0]["messages"].append({"role": "assistant", "content": "", "tool_calls": []})
    expected = texts(tmp_path / "a.jsonl", rows, template)

    assert '"default": null' in expected[0]
    assert '["b", null]' in expected[1]
    assert expected == texts(tmp_path / "a.parquet", rows, template)
