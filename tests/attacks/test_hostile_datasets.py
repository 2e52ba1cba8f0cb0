"""Hostile calibration data: rows, files, templates and tokenizers that a stranger wrote."""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attacking import Attack, check_named
from calibrating import BASE, QUICK
from conftest import Project
from tiny import read_json, write_json

pytest_plugins = ["attacking", "calibrating"]

CHAT = {"messages": [{"role": "user", "content": "Hello, you."}]}
TEXT = {"text": "Some words, and then some more."}


@pytest.fixture
def project(small: Project) -> Project:
    """The demo's tokenizer, template and two of its layers, under the name that `attack` uses."""
    return small


def build(attack: Attack, dataset: str, *changes: str) -> Any:
    """Build on a dataset, as quickly as can be."""
    overrides = (*QUICK, f"calibration.dataset={dataset}", *changes)
    settings = [part for item in overrides for part in ("--set", item)]
    return attack("build", BASE, *settings)


def lines(*rows: object) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


ROWS: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "is empty; expected rows of text"),
    "a row less": (lines(TEXT), "gives 1 samples; expected 2, or fewer `samples`"),
    "empty lines": (b"\n\n\n", "gives 0 samples"),
    "no UTF-8": (b'{"text": "\xff\xfe"}\n' * 2, "is not text in UTF-8"),
    "UTF-16": (json.dumps(TEXT).encode("utf-16"), "is not text in UTF-8"),
    "no JSON": (lines(TEXT) + b"Some words.\n", "line 2 is not a JSON object"),
    "a list": (lines([TEXT], TEXT), "line 1 is not a JSON object"),
    "a row without text": (lines(TEXT, {"prompt": "Hello"}), "row 2: holds no text"),
    "a text that is a number": (lines(TEXT, {"text": 5}), "row 2: holds no text"),
    "turns that are text": (lines({"messages": "Hello"}, TEXT), "row 1: holds no text"),
    "a turn without a role": (
        lines({"messages": [{"content": "Hello"}]}, TEXT),
        "row 1: has a turn without a role or text",
    ),
    "a turn whose text is a number": (
        lines({"messages": [{"role": "user", "content": 5}]}, TEXT),
        "row 1: has a turn without a role or text",
    ),
    "tools that are no JSON": (
        lines({**CHAT, "tools": "[{"}, TEXT),
        "row 1: has `tools` that are not JSON",
    ),
    "tools that are nested": (
        lines({**CHAT, "tools": "[" * 100_000}, TEXT),
        "row 1: has `tools` that are not JSON",
    ),
    "rows of one token": (lines({"text": "a"}, TEXT), "row 1 is too short: 1 tokens"),
    "rows of no token": (lines({"text": ""}, TEXT), "row 1 is too short: 0 tokens"),
    "100,000 brackets": (b"[" * 100_000 + b"\n", "line 1 is not a JSON object"),
    "a number of 100,000 digits": (b'{"text": ' + b"9" * 100_000 + b"}\n", "line 1 is not"),
    "half a surrogate pair": (b'{"text": "a \\ud800 b"}\n' * 2, "row 1 is not tokenized"),
    "half a surrogate pair in a turn": (
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}\n' * 2,
        "row 1 is not tokenized",
    ),
    "a line without an end": (b"x" * (1 << 25), "line 1 has 4194304 characters or more"),
    "a role that the template refuses": (
        lines({"messages": [{"role": "nobody", "content": "Hello"}]}, TEXT),
        "row 1: the chat template: cannot be rendered",
    ),
    "100,000 turns": (
        lines({"messages": [{"role": "user", "content": "Hi"}] * 100_000}, TEXT),
        "row 1: the chat template: ",
    ),
}


@pytest.mark.parametrize("what", ROWS)
def test_a_hostile_row_is_named(attack: Attack, project: Project, what: str) -> None:
    """The line names the file and the row, or the batch that a template was given."""
    content, words = ROWS[what]
    (project.root / "rows.jsonl").write_bytes(content)

    check_named(build(attack, "rows.jsonl"), "rows.jsonl", words)


def test_text_is_never_code(project: Project) -> None:
    """Template code, control characters and reversed text in a row are only text."""
    from tokenizers import Tokenizer

    from carnice_build.calibration.tokenizing import tokenize

    evil = "{{ 1/0 }}{% raw %}\0\x1b[31m\u202e"
    dataset, tokenizer = project.root / "rows.jsonl", project.base / "tokenizer.json"
    dataset.write_bytes(lines({"text": evil}, {"messages": [{"role": "user", "content": evil}]}))
    params = {
        "samples": 2,
        "length": 100,
        "roles": {},
        "template": "{{ messages[0].content }}",
        "special_tokens": {},
        "rows": "jsonl",
    }
    found = tokenize(params, np.frombuffer(tokenizer.read_bytes(), np.uint8), str(dataset))

    assert [evil, evil] == Tokenizer.from_file(str(tokenizer)).decode_batch(found)


def parquet(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    import pyarrow
    from pyarrow import parquet as format_

    format_.write_table(pyarrow.Table.from_pylist(list(rows)), path)


def huge_rows(path: Path) -> None:
    """A dictionary makes one string of 5 MB a thousand, in a file of next to nothing."""
    import pyarrow
    from pyarrow import parquet as format_

    column = pyarrow.DictionaryArray.from_arrays([0] * 1000, ["x" * 5_000_000])
    format_.write_table(pyarrow.table({"text": column}), path, compression="zstd")


TURN = {"role": "user", "content": "Hello"}
PARQUET: dict[str, tuple[Callable[[Path], object], str]] = {
    "text": (lambda path: path.write_text("Hello"), "is not a readable parquet file"),
    "the magic alone": (lambda path: path.write_bytes(b"PAR1PAR1"), "is not a readable parquet"),
    "a footer of 2 GB": (
        lambda path: path.write_bytes(b"PAR1" + (2**31 - 1).to_bytes(4, "little") + b"PAR1"),
        "is not a readable parquet file",
    ),
    "bytes in a turn": (
        lambda path: parquet(path, [{"messages": [{**TURN, "image": b"\xff"}]}] * 2),
        "cannot render a chat that is no JSON",
    ),
    "a day in a turn": (
        lambda path: parquet(path, [{"messages": [{**TURN, "at": datetime.date(2026, 1, 1)}]}] * 2),
        "cannot render a chat that is no JSON",
    ),
    "no such column": (lambda path: parquet(path, [{"prompt": "a"}] * 2), "row 1: holds no text"),
}


@pytest.mark.parametrize("what", PARQUET)
def test_a_hostile_parquet_file_is_named(attack: Attack, project: Project, what: str) -> None:
    """A parquet file that is none, or holds what no chat holds, is refused by name."""
    write, words = PARQUET[what]
    write(project.root / "rows.parquet")

    check_named(build(attack, "rows.parquet"), "rows.parquet", words)


def test_rows_that_unfold_do_not_fill_the_memory(attack: Attack, project: Project) -> None:
    """A small parquet file of rows that are 5 MB each ends in a line, not in swap."""
    huge_rows(project.root / "rows.parquet")

    check_named(build(attack, "rows.parquet"), "row 1 has 4194304 characters or more")


FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "nothing there": (lambda path: None, "calibration.dataset: rows.jsonl: cannot read the file"),
    "a folder": (lambda path: path.mkdir(), "cannot read"),
    "a device": (lambda path: path.symlink_to("/dev/zero"), "is empty"),
    "a pipe": (os.mkfifo, "is empty"),
    "a loop of links": (lambda path: path.symlink_to(path), "cannot read the file"),
}


@pytest.mark.parametrize("what", FILES)
def test_a_dataset_that_is_no_file_is_refused(attack: Attack, project: Project, what: str) -> None:
    """Nothing waits for a pipe, reads a device or follows links in a circle."""
    make, words = FILES[what]
    make(project.root / "rows.jsonl")

    check_named(build(attack, "rows.jsonl"), "rows.jsonl", words)


@pytest.mark.parametrize("name", ["../rows.jsonl", "/etc/rows.txt", "a/../../b.txt", '"a\\0.txt"'])
def test_a_dataset_outside_is_refused(attack: Attack, name: str) -> None:
    """The file of a recipe lies in the project."""
    check_named(build(attack, name), "calibration.dataset")


TEMPLATES = {
    "one that raises": "{{ raise_exception('not \\x1b[31m this') }}",
    "one that never ends": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}"
    "{% endfor %}",
    "one that fills the memory": "{{ 'x' * 10**10 }}",
    "one that breaks out": "{{ ''.__class__.__mro__ }}",
    "one that is none": "{% for %}",
}


@pytest.mark.parametrize("what", TEMPLATES)
def test_a_hostile_template_ends_the_calibration(
    attack: Attack, project: Project, what: str
) -> None:
    """A template is a program; it is stopped before a row is given to it."""
    (project.base / "chat_template.jinja").write_text(TEMPLATES[what])
    (project.root / "rows.jsonl").write_bytes(lines(CHAT, CHAT))

    check_named(build(attack, "rows.jsonl"), "chat_template.jinja: ")


def test_conversations_need_a_template(attack: Attack, project: Project) -> None:
    """Without a template there is nothing to make a text of turns with."""
    (project.base / "chat_template.jinja").unlink()
    (project.root / "rows.jsonl").write_bytes(lines(CHAT, CHAT))

    check_named(
        build(attack, "rows.jsonl"),
        "rows.jsonl: holds conversations, but there is no chat template",
    )


def test_a_tokenizer_that_backtracks_is_stopped(attack: Attack, project: Project) -> None:
    """A regular expression that would take for ever meets the limit of the library's own engine."""
    path = project.base / "tokenizer.json"
    split = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated"}
    write_json(path, {**read_json(path), "pre_tokenizer": {**split, "invert": False}})
    (project.root / "rows.jsonl").write_bytes(lines({"text": "a" * 60 + "b"}, TEXT))

    check_named(build(attack, "rows.jsonl"), "calibration.tokens failed", code=1)
