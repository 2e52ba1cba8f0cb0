"""What a template sees of its tokenizer is what transformers would show it, wherever we render."""

from __future__ import annotations

import json
import shutil
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from calibrating import FINE_TUNE, QUICK
from chats import CHATS, DEMO, XML
from conftest import Project
from tiny import read_json, write_json

from carnice_build.calibration.tokenizing import tokenize
from carnice_build.chat import sandbox
from carnice_build.chat.render import Chat, render
from carnice_build.chat.special_tokens import NAMES, special_tokens
from carnice_build.chat.tool_format import Syntax
from carnice_build.commands.plan import plan_variants
from carnice_build.errors import CheckpointError
from carnice_build.steps.base import PlanContext
from carnice_build.steps.chat_template import ChatTemplate
from carnice_build.verification.chat import check_chat
from carnice_build.verification.result import Outcome

pytest_plugins = ["calibrating"]

CONFIG = {
    name: value
    for name, value in read_json(DEMO / "tokenizer_config.json").items()
    if name not in (*NAMES, "added_tokens_decoder", "tokenizer_class")
}
"""The demo's, without a word of special tokens."""


def added(content: str, **more: Any) -> dict[str, Any]:
    """A token as transformers saves it in detail."""
    flags = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized"), False)
    return {"content": content, **flags, **more}


TYPED = added("<|im_end|>", __type="AddedToken", special=True)
DECODER = {"added_tokens_decoder": {"2030": added("<|im_end|>", special=True)}}
OWN = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}

Table = dict[str, Any]
FILES: dict[str, tuple[Table, Table | None]] = {
    "none": ({}, None),
    "all": ({name: f"<|{name}|>" for name in NAMES}, None),
    "an empty one": ({"bos_token": "", "eos_token": "<|im_end|>"}, None),
    "null": (dict.fromkeys(NAMES), None),
    "an object": ({"eos_token": TYPED, "pad_token": "<|endoftext|>"}, None),
    "an object in the map": ({}, {"eos_token": added("<|im_end|>"), "pad_token": "<|im_start|>"}),
    "the map comes later": ({"eos_token": "<|im_end|>"}, {"eos_token": "<|endoftext|>"}),
    "null in the map": ({"eos_token": "<|im_end|>"}, {"eos_token": None}),
    "a map that is not read": ({"eos_token": "<|im_end|>", **DECODER}, {"eos_token": "<s>"}),
    "Qwen's own class": ({"tokenizer_class": "Qwen2Tokenizer"}, None),
    "Qwen's class of old": ({"tokenizer_class": "Qwen2TokenizerFast"}, None),
    "a class and null": ({"tokenizer_class": "Qwen3_5Tokenizer", **dict.fromkeys(NAMES)}, None),
    "a class and a map": ({"tokenizer_class": "Qwen2Tokenizer"}, {"eos_token": "<|im_end|>"}),
    "Llama's class": ({"tokenizer_class": "LlamaTokenizer"}, None),
    "flags": ({"add_bos_token": True, "add_eos_token": False}, None),
    "one model's own": ({**OWN, "eos_token": "<|im_end|>"}, None),
    "own ones in a table": ({"extra_special_tokens": {**OWN, "audio_token": TYPED}}, None),
    "own ones of an older name": ({"additional_special_tokens": OWN}, None),
    "a list": ({"extra_special_tokens": ["<|image_pad|>"]}, None),
    "a list of an older name": ({"additional_special_tokens": ["<|image_pad|>"]}, None),
    "own ones as saved": ({**OWN, "model_specific_special_tokens": OWN}, None),
    "own ones that were left": ({"model_specific_special_tokens": OWN}, None),
    "own ones in the map": ({}, {**OWN, "audio_token": added("<|audio_pad|>")}),
    "own ones in both": (OWN, {"image_token": "<|im_start|>"}),
    "a table in the map": (OWN, {"extra_special_tokens": {"image_token": "<|im_start|>"}}),
    "a list in the map": ({}, {"additional_special_tokens": ["<|image_pad|>"]}),
}


def folder_of(path: Path, config: Table, mapped: Table | None = None) -> Path:
    """A folder with the demo's tokenizer and these files on its special tokens."""
    path.mkdir()
    for name in ("tokenizer.json", "config.json"):
        shutil.copyfile(DEMO / name, path / name)
    stated = {"tokenizer_class": "PreTrainedTokenizerFast", **CONFIG, **config}
    write_json(path / "tokenizer_config.json", stated)
    if mapped is not None:
        write_json(path / "special_tokens_map.json", mapped)
    return path


def small_files(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def auto_tokenizer(path: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path)


@pytest.mark.parametrize("what", FILES)
def test_special_tokens_are_those_of_transformers(tmp_path: Path, what: str) -> None:
    """However the files spell a token, it is what `special_tokens_map` says."""
    path = folder_of(tmp_path / "model", *FILES[what])

    assert auto_tokenizer(path).special_tokens_map == special_tokens(small_files(path))


def test_what_transformers_saved_is_read_alike(tmp_path: Path) -> None:
    """Saving a tokenizer again, which spells tokens anew, changes nothing that a template sees."""
    config = {"eos_token": TYPED, "tokenizer_class": "Qwen2Tokenizer", **OWN}
    before = auto_tokenizer(folder_of(tmp_path / "model", config))
    before.save_pretrained(tmp_path / "saved")

    assert before.special_tokens_map == special_tokens(small_files(tmp_path / "saved"))


def test_the_demos_are_read() -> None:
    """Both stand-ins end their turns as their tokenizer says."""
    for name in ("qwen3.6-27b", "carnice-v2-27b"):
        path = DEMO.parent / name

        assert auto_tokenizer(path).special_tokens_map == special_tokens(small_files(path))
        assert "<|im_end|>" == special_tokens(small_files(path))["eos_token"]


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("tokenizer_config.json", b"[]", "^tokenizer_config.json: is not a JSON object"),
        ("special_tokens_map.json", b"{", "^special_tokens_map.json: is not a JSON object"),
        ("tokenizer_config.json", b'{"eos_token": 5}', "says of eos_token what is no token"),
        ("tokenizer_config.json", b'{"extra_special_tokens": {"a": []}}', "says of a what is"),
    ],
)
def test_what_is_no_token_is_named(file: str, content: bytes, words: str) -> None:
    """A file that cannot be read, or a token that is none, is an error that names the file."""
    with pytest.raises(CheckpointError, match=words):
        special_tokens({file: content})


# Rendering

TOKENS = {"bos_token": "<s>", "eos_token": "<|im_end|>", "image_token": "<|image_pad|>"}
LOOP = "{% for m in messages %}{{ m.content }}{% endfor %}"
TEMPLATES = {
    "tokens": "{{ bos_token }}" + LOOP + "{{ eos_token ~ image_token }}",
    "tokens by test": "{{ bos_token is defined }} {{ sep_token is defined }} {{ eos_token == x }}",
    "tokens added": "{% set a = bos_token + 'x' %}{{ a }}" + LOOP + "{{ eos_token | trim }}",
    "an undefined token": "[{{ sep_token }}]{{ sep_token ~ 'x' }}{% if sep_token %}y{% endif %}",
    "loops": "{% for m in messages %}{% if loop.index == 2 %}{% continue %}{% endif %}"
    "{{ loop.index }}{{ loop.last }}{% endfor %}",
    "a generation": "{% for m in messages %}{% generation %}{% set x = m.content %}{{ x }}"
    "{{ eos_token }}{{ loop.index }}{% endgeneration %}{{ x }}{% endfor %}",
    "JSON": "{{ tools | tojson }}{{ messages | tojson(indent=2) }}{{ {'b': 'ü', 'a': 1} | tojson("
    "ensure_ascii=true, sort_keys=true, separators=(',', ':')) }}",
    "a day": "{{ strftime_now('%d %B %Y') }}{{ bos_token }}",
    "documents": "{{ documents is none }}{{ tools is none }}{{ add_generation_prompt }}",
    "white space": "  {% if true %}\n  {{ bos_token }}\n  {% endif %}\n\n{{- eos_token }}\n",
    "a macro": "{% macro m(x) %}{{ x }}{{ eos_token }}{% endmacro %}{{ m('a') }}{{ m('b') }}",
}


@pytest.mark.parametrize("what", TEMPLATES)
def test_prompts_are_those_of_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """`apply_chat_template` gives the same text for every kind of conversation."""
    from transformers.utils import chat_template_utils

    clock = SimpleNamespace(now=lambda: sandbox.NOW)
    monkeypatch.setattr(chat_template_utils, "datetime", clock)
    path = folder_of(tmp_path / "model", TOKENS)
    tokenizer = auto_tokenizer(path)
    expected = [
        tokenizer.apply_chat_template(
            list(chat.messages),
            tools=chat.tools,
            add_generation_prompt=chat.prompt,
            chat_template=TEMPLATES[what],
            tokenize=False,
            **chat.options,
        )
        for chat in CHATS.values()
    ]
    found = special_tokens(small_files(path))

    assert isinstance(sandbox.NOW, datetime)
    assert expected == render(TEMPLATES[what], list(CHATS.values()), "a template", found)


@pytest.mark.parametrize(
    "template", ["{{ sep_token + 'x' }}", "{{ sep_token.x }}", "{{ raise_exception('no') }}"]
)
def test_what_transformers_refuses_is_refused(tmp_path: Path, template: str) -> None:
    """A token that is not defined cannot be worked with, here or there."""
    from jinja2 import TemplateError

    path = folder_of(tmp_path / "model", TOKENS)
    chat = CHATS["plain"]
    with pytest.raises(TemplateError) as theirs:
        auto_tokenizer(path).apply_chat_template(list(chat.messages), chat_template=template)
    with pytest.raises(CheckpointError) as ours:
        render(template, [chat], "a template", special_tokens(small_files(path)))

    assert f"cannot be rendered: {type(theirs.value).__name__}: {theirs.value}" == ours.value.what


def test_a_chat_comes_before_a_token_of_its_name() -> None:
    """A tokenizer that calls a token `messages` does not replace the messages."""
    chat = Chat([{"role": "user", "content": "Hi"}])

    assert ["Hi"] == render(LOOP, [chat], "a template", {"messages": "x"})


# Wherever we render

NEEDS = "{{- bos_token + '\\n' -}}"
"""Fails where the token is not defined."""


@pytest.fixture
def needing(small: Project) -> Project:
    """A project whose models' templates cannot do without a token of their tokenizers."""
    for path in (small.base, small.checkpoint):
        (path / "chat_template.jinja").write_text(NEEDS + XML["qwen"])
        config = read_json(path / "tokenizer_config.json")
        write_json(path / "tokenizer_config.json", {**config, "bos_token": "<|im_start|>"})
    return small


def tokens_action(project: Project) -> Any:
    """The action of a plan that renders the calibration's rows."""
    plan = plan_variants([FINE_TUNE], project.options(overrides=QUICK))
    actions = plan.variants[0].actions.values()
    return next(action for action in actions if action.op.name == "calibration.tokens")


def test_a_plan_gives_the_tokens_to_its_template(needing: Project) -> None:
    """Serving flags and the calibration follow from a template that needs a token."""
    plan = plan_variants([FINE_TUNE], needing.options(overrides=QUICK))
    action = tokens_action(needing)

    assert plan.variants[0].serving is not None
    assert Syntax.QWEN3_XML == plan.variants[0].serving.tool_call_parser
    assert "<|im_start|>" == action.params["special_tokens"]["bos_token"]


def test_a_token_is_in_the_key(needing: Project) -> None:
    """Another end of sequence is another calibration."""
    digests = ["0" * 64] * 2
    before = tokens_action(needing).key(digests)
    path = needing.checkpoint / "tokenizer_config.json"
    write_json(path, {**read_json(path), "eos_token": "<|endoftext|>"})

    assert before != tokens_action(needing).key(digests)


def test_the_chat_check_gives_the_tokens_to_the_template(needing: Project) -> None:
    """`verify` plays its tasks through a template that needs a token, and fails without it."""
    found = check_chat(needing.checkpoint)
    (needing.checkpoint / "tokenizer_config.json").write_text("{}")
    missing = check_chat(needing.checkpoint)

    assert Outcome.PASSED is found.outcome, found.problems
    assert Outcome.FAILED is missing.outcome
    assert "'bos_token' is undefined" in missing.problems[0]


def test_the_step_gives_the_tokens_to_the_template(needing: Project) -> None:
    """A template that needs a token can be patched."""
    context = cast(PlanContext, SimpleNamespace(body=SimpleNamespace(buildable=True)))
    edited = ChatTemplate(patch="hermes").edit(small_files(needing.checkpoint), context)

    assert edited["chat_template.jinja"].startswith(NEEDS.encode())


def test_rows_give_the_tokens_of_apply_chat_template(tmp_path: Path) -> None:
    """Rows of a calibration end as the tokenizer says."""
    path = folder_of(tmp_path / "model", {**TOKENS, "bos_token": "<|im_start|>"})
    template = TEMPLATES["tokens"]
    chats = [{"messages": list(CHATS[name].messages)} for name in ("plain", "several turns")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    tokenizer = auto_tokenizer(path)
    expected = [
        tokenizer.apply_chat_template(chat["messages"], chat_template=template, return_dict=False)
        for chat in chats
    ]
    params = {
        "samples": 2,
        "length": 1000,
        "roles": {},
        "template": template,
        "special_tokens": special_tokens(small_files(path)),
        "rows": "jsonl",
    }
    content = np.frombuffer((path / "tokenizer.json").read_bytes(), np.uint8)

    assert expected == tokenize(params, content, str(tmp_path / "rows.jsonl"))
