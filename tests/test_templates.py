"""Chat templates: rendering as transformers does, the format they make, and the Hermes patch."""

from __future__ import annotations

import json
import subprocess
import sys
from difflib import SequenceMatcher
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
from chats import ASKED, CHATS, DEMO, GOLDEN, XML, assistant, both, hermes
from pydantic import ValidationError

from carnice_build.chat.hermes import to_hermes
from carnice_build.chat.render import Chat, render
from carnice_build.chat.roundtrip import check_round_trips
from carnice_build.chat.tool_format import Syntax, ToolFormat, tool_format
from carnice_build.errors import CheckpointError, PlanError
from carnice_build.steps.base import PlanContext
from carnice_build.steps.chat_template import ChatTemplate


def sections(path: Path) -> dict[str, str]:
    """The renderings of a golden file, by the names in its `=====` lines."""
    parts = path.read_text(encoding="utf-8").split("===== ")[1:]
    return {part.partition("\n")[0]: part.partition("\n")[2].removesuffix("\n") for part in parts}


# Rendering


@both
def test_a_patched_template_renders_its_golden_texts(name: str) -> None:
    """Every kind of conversation renders as the golden file says."""
    texts = render(hermes(name), list(CHATS.values()), name)

    assert sections(GOLDEN / f"{name}-hermes.txt") == dict(zip(CHATS, texts, strict=True))


@both
@pytest.mark.parametrize("patched", [False, True])
def test_renderings_are_those_of_transformers(name: str, patched: bool) -> None:
    """`apply_chat_template` of the demo's tokenizer gives the same texts."""
    from transformers import AutoTokenizer

    template = hermes(name) if patched else XML[name]
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    expected = [
        tokenizer.apply_chat_template(
            list(chat.messages),
            tools=chat.tools,
            add_generation_prompt=chat.prompt,
            chat_template=template,
            tokenize=False,
            **chat.options,
        )
        for chat in CHATS.values()
    ]

    assert expected == render(template, list(CHATS.values()), "a template")


def test_the_features_of_transformers_templates_render() -> None:
    """Loop controls, the generation tag, tojson's options and trimmed blocks are as there."""
    template = (
        "{% for m in messages %}\n  {% if loop.index > 1 %}{% break %}{% endif %}\n"
        "{% generation %}{{ m.content }}{% endgeneration %}\n{% endfor %}\n"
        "{{ {'b': '<é>', 'a': 1} | tojson(indent=1, sort_keys=true) }}"
    )
    from transformers.utils.chat_template_utils import render_jinja_template

    messages = [{"role": "user", "content": "one"}, {"role": "user", "content": "two"}]
    expected = render_jinja_template(conversations=[messages], chat_template=template)[0]

    assert expected == render(template, [Chat(messages)], "a template")


def test_a_rendering_does_not_depend_on_the_day() -> None:
    """`strftime_now` tells a fixed date."""
    assert ["2026-01-01"] == render("{{ strftime_now('%Y-%m-%d') }}", [Chat([])], "a template")


def test_a_chat_that_is_no_json_is_refused() -> None:
    """A row of a dataset may hold anything."""
    with pytest.raises(CheckpointError, match=r"^a file: cannot render a chat that is no JSON"):
        render("{{ messages }}", [Chat([{"role": "user", "content": object()}])], "a file")


# Formats


@both
def test_the_format_follows_from_what_is_rendered(name: str) -> None:
    """The same template is qwen3_xml before the patch and hermes after it."""
    assert ToolFormat(Syntax.QWEN3_XML, reasoning=True) == tool_format(XML[name])
    assert ToolFormat(Syntax.HERMES, reasoning=True) == tool_format(hermes(name))


def test_serving_flags_name_the_parsers() -> None:
    """Flags are vLLM's, and none are given for what a template does not render."""
    both_parsers = ToolFormat(Syntax.HERMES, reasoning=True)

    assert both_parsers.serving_flags() == (
        "--enable-auto-tool-choice",
        *("--tool-call-parser", "hermes"),
        *("--reasoning-parser", "qwen3"),
    )
    assert () == ToolFormat(Syntax.NONE, reasoning=False).serving_flags()


def test_a_template_without_tools_has_no_format() -> None:
    """A template that renders messages alone calls no tools and has no thoughts."""
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"

    assert ToolFormat(Syntax.NONE, reasoning=False) == tool_format(template)


def test_words_that_are_not_rendered_do_not_count() -> None:
    """A comment or a dead branch in the other format does not mislead."""
    dead = "{# <tool_call>\n<function=x> #}{% if false %}<tool_call><function=x>{% endif %}"

    assert Syntax.HERMES is tool_format(dead + hermes("qwen")).syntax


def test_a_half_patched_template_is_refused() -> None:
    """Instructions for one format and calls in the other are an error."""
    example = '<tool_call>\\n{"name": <function-name>, "arguments": <arguments-as-json-object>}\\n'
    template = hermes("qwen").replace(example, "<tool_call>\\n<function=a>\\n</function>\\n")

    with pytest.raises(CheckpointError, match="as qwen3_xml, and renders them as hermes"):
        tool_format(template)


# The patch


@both
def test_chats_without_tools_are_untouched(name: str) -> None:
    """The patch changes no rendering in which no tool occurs."""
    chats = [CHATS["plain"], CHATS["system, no tools"], CHATS["thoughts in the content"]]
    chats = [Chat(chat.messages, None, chat.prompt) for chat in chats]

    assert render(XML[name], chats, name) == render(hermes(name), chats, name)


@both
def test_the_patch_changes_the_two_blocks_alone(name: str) -> None:
    """Every line outside of the instructions, the loop and its macro stays byte for byte."""
    old, new = XML[name].splitlines(), hermes(name).splitlines()
    changes = SequenceMatcher(None, old, new, autojunk=False).get_opcodes()
    changed = [old[start:end] for kind, start, end, _, _ in changes if kind != "equal"]

    assert {"demo": 3, "qwen": 2}[name] == len(changed)
    assert all("<function=" in "".join(lines) or "call(" in "".join(lines) for lines in changed)


@both
def test_arguments_may_be_a_json_string(name: str) -> None:
    """Arguments given as JSON text render as they stand, empty ones as an empty object."""
    texts = render(
        hermes(name),
        [
            Chat([ASKED, assistant("", "", {"function": {"name": "f", "arguments": arguments}})])
            for arguments in ('{"a":  "é"}', "", None, {})
        ],
        name,
    )

    assert [
        '{"name": "f", "arguments": {"a":  "é"}}',
        *['{"name": "f", "arguments": {}}'] * 3,
    ] == [text.partition("<tool_call>\n")[2].partition("\n</tool_call>")[0] for text in texts]


@both
def test_mlx_lm_takes_a_patched_template_for_json(name: str) -> None:
    """mlx-lm, which searches the template's source, chooses the fitting parser."""
    from mlx_lm.tokenizer_utils import _infer_tool_parser

    class Tokenizer:
        def __init__(self, chat_template: str) -> None:
            self.chat_template = chat_template

    assert "qwen3_coder" == _infer_tool_parser(Tokenizer(XML[name]))
    assert "json_tools" == _infer_tool_parser(Tokenizer(hermes(name)))


@both
def test_a_patched_template_is_not_patched_again(name: str) -> None:
    """The error says that it is patched already."""
    with pytest.raises(PlanError, match=r"^a file: is patched already"):
        to_hermes(hermes(name), "a file")


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("{%- for tool in tools %}", "{%- for tool in (tools) %}", "list of tools"),
        ("</tools>", "</functions>", "list of tools"),
        ("in message.tool_calls %}", "in message['tool_' ~ 'calls'] %}", "one loop"),
        ("|trim %}\n    {%- if message.role", " %}\n    {%- if message.role", ""),
        ("{%- for tool in tools %}", "<function=x>{%- for tool in tools %}", "another place"),
    ],
)
def test_a_template_without_the_blocks_is_refused(old: str, new: str, expected: str) -> None:
    """A template of another build is refused, or patched to one that passes; never spoilt."""
    template = XML["qwen"].replace(old, new)

    assert template != XML["qwen"]
    if expected:
        with pytest.raises(PlanError, match=expected):
            to_hermes(template)
    else:
        assert all(item.ok for item in check_round_trips(to_hermes(template)))


def test_a_template_without_tool_calls_is_refused() -> None:
    """There is nothing to patch in plain ChatML."""
    with pytest.raises(PlanError, match=r"no block to patch; expected tool calls in Qwen3 XML"):
        to_hermes("{% for m in messages %}{{ m.content }}{% endfor %}")


def test_literals_keep_their_text() -> None:
    """Quotes, backslashes and letters beyond ASCII before the instructions stay."""
    template = XML["qwen"].replace('"\\n</tools>"', '"\\n\\"é\\\\n\\t\'{{ \\n</tools>"')
    patched = render(to_hermes(template), [CHATS["tools, no system"]], "")[0]

    assert "\n\"é\\n\t'{{ \n</tools>\n\nTo call" in patched


# The step

NO_CONTEXT = cast(PlanContext, SimpleNamespace(body=SimpleNamespace(buildable=True)))
STEP = ChatTemplate(patch="hermes")


def test_the_step_changes_the_template_and_no_tensor() -> None:
    """The view and every other file stay; the template is the patched one."""
    files = {"chat_template.jinja": XML["demo"].encode(), "tokenizer_config.json": b'{"a":1}'}

    assert {} == STEP.apply({}, NO_CONTEXT)
    assert {**files, "chat_template.jinja": hermes("demo").encode()} == STEP.edit(files, NO_CONTEXT)


def test_the_step_patches_the_entry_of_the_tokenizer_config() -> None:
    """Without a template file, the entry is patched and the rest of the file keeps its meaning."""
    config = {"eos_token": "<|im_end|>", "chat_template": XML["qwen"], "max": 10**30, "é": None}
    name = "tokenizer_config.json"
    edited = STEP.edit({name: json.dumps(config).encode()}, NO_CONTEXT)

    assert {**config, "chat_template": hermes("qwen")} == json.loads(edited[name])
    assert list(config) == list(json.loads(edited[name]))


def test_the_step_patches_every_copy() -> None:
    """No file keeps the template that the model is no longer served with."""
    entry = json.dumps({"chat_template": XML["demo"]}).encode()
    files = {"chat_template.jinja": XML["demo"].encode(), "tokenizer_config.json": entry}
    edited = STEP.edit(files, NO_CONTEXT)

    assert hermes("demo") == edited["chat_template.jinja"].decode()
    assert hermes("demo") == json.loads(edited["tokenizer_config.json"])["chat_template"]


@pytest.mark.parametrize(
    ("files", "error", "words"),
    [
        ({}, PlanError, "no chat template"),
        ({"tokenizer_config.json": b"{}"}, PlanError, "no chat template"),
        ({"tokenizer_config.json": b"{"}, CheckpointError, "^tokenizer_config.json: "),
        ({"tokenizer_config.json": b'{"chat_template": [{}]}'}, CheckpointError, "several"),
        ({"chat_template.jinja": b"\xff"}, CheckpointError, "^chat_template.jinja: is not UTF-8"),
    ],
)
def test_the_step_names_the_file_that_it_cannot_patch(
    files: dict[str, bytes], error: type[Exception], words: str
) -> None:
    """Each error says which file, and why."""
    with pytest.raises(error, match=words):
        STEP.edit(files, NO_CONTEXT)


def test_the_step_does_not_patch_twice() -> None:
    """A template that is patched already is refused."""
    with pytest.raises(PlanError, match=r"^chat_template.jinja: is patched already"):
        STEP.edit({"chat_template.jinja": hermes("qwen").encode()}, NO_CONTEXT)


def test_the_step_knows_one_patch() -> None:
    """Any other value of `patch` is refused when the recipe is read."""
    with pytest.raises(ValidationError, match="hermes"):
        ChatTemplate.model_validate({"patch": "xml"})


def test_templates_are_not_rendered_in_this_process() -> None:
    """Rendering and patching load no jinja2 here."""
    code = (
        "import sys; from pathlib import Path; from carnice_build.chat.hermes import to_hermes;"
        f"to_hermes(Path({str(DEMO / 'chat_template.jinja')!r}).read_text());"
        "print('jinja2' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert "False" == done.stdout.strip()
