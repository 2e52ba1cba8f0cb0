"""What a GGUF file says beside its tokens: merges, special ids, what is added, chat templates.

The rules are those of `gguf.SpecialVocab` in llama.cpp's own gguf-py, with what its writer does
with the result; where they seem odd, that is because a file must be equal to the converter's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from string import ascii_letters, digits
from typing import Any

from carnice_build.chat.files import TEMPLATE_NAME
from carnice_build.checkpoint.assets import is_named_template
from carnice_build.checkpoint.gguf_values import Value
from carnice_build.checkpoint.json import json_object
from carnice_build.errors import CheckpointError
from carnice_build.formats.gguf.tokenizer_file import CONFIG, NAME

TYPES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
"""The special tokens that are looked for, in the order in which they are written."""

_ID_KEYS: Mapping[str, str] = {
    "bos": "bos_token_id",
    "eos": "eos_token_id",
    "unk": "unknown_token_id",
    "sep": "seperator_token_id",
    "pad": "padding_token_id",
    "mask": "mask_token_id",
    "eot": "eot_token_id",
    "eom": "eom_token_id",
}
"""Keys after `tokenizer.ggml.`, one of them misspelt, of the types that have one."""

_ADDED = ("bos", "eos", "sep")
_TEMPLATE = "tokenizer.chat_template"
_MOST_ID = 1 << 32
_SPACE = re.compile("(?<=.) (?=.)", re.DOTALL)


class _Reading:
    """The state that the rules of `special_values` share."""

    def __init__(
        self,
        files: Mapping[str, bytes],
        tokenizer: Mapping[str, Any] | None,
        types: Sequence[str],
        known: int | None,
    ) -> None:
        self.types = list(types)
        self.known = known
        self.adds: dict[str, bool] = {}
        self.ids: dict[str, int] = {}
        if tokenizer is None:
            tokenizer = json_object(NAME, files[NAME]) if NAME in files else {}
        self.tokenizer = tokenizer
        self.config = json_object(CONFIG, files[CONFIG]) if CONFIG in files else {}

    def set_id(self, kind: str, number: Any) -> None:
        """Take the first number of a kind that a vocabulary of that size can have."""
        if type(number) is int and 0 <= number < (self.known or _MOST_ID):
            self.ids.setdefault(kind, number)


def special_values(
    files: Mapping[str, bytes],
    config: Mapping[str, Any],
    *,
    types: Sequence[str] = TYPES,
    known: int | None = None,
    preset: Mapping[str, int] | None = None,
    tokenizer: Mapping[str, Any] | None = None,
) -> dict[str, Value]:
    """Special ids, whether they are added, the chat templates and what a normalizer does.

    `config` is what config.json says, `known` the size of the vocabulary where ids are held
    against it, `preset` the ids that the family has where nothing says another one, `tokenizer`
    the object of tokenizer.json where it has been read.
    """
    reading = _Reading(files, tokenizer, types, known)
    _read_post_processor(reading)
    _read_tokens(reading)
    _read_config(reading, config)
    for kind, number in (preset or {}).items():
        reading.set_id(kind, number)
    values = {
        f"tokenizer.ggml.{_ID_KEYS[kind]}": Value("u32", number)
        for kind, number in reading.ids.items()
        if kind in _ID_KEYS
    }
    for kind, added in reading.adds.items():
        if kind in _ADDED:
            values[f"tokenizer.ggml.add_{kind}_token"] = Value("bool", added)
    if reading.config:
        values |= _templates(files, reading.config)
    return values | dict(_normalizer(reading.tokenizer.get("normalizer")))


def merges(model: Mapping[str, Any]) -> Value:
    """The merges of a model, best first; CheckpointError when there are none, or no pairs."""
    listed = model.get("merges")
    if not isinstance(listed, list) or not listed:
        raise CheckpointError("has no merges, without which no text can be split", where=NAME)
    try:
        texts = listed if isinstance(listed[0], str) else _joined(listed)
        # Counted in one go: there may be half a million.
        pairs = "".join(texts).count(" ") == len(texts) and all(map(_SPACE.search, texts))
    except (TypeError, ValueError):
        pairs = False
    if not pairs:
        raise CheckpointError("has a merge that is no pair of texts", where=NAME)
    return Value("[str]", texts)


def _joined(listed: list[Any]) -> list[str]:
    """Merges that are lists of two; ValueError or TypeError when one is none."""
    if set(map(type, listed)) != {list} or set(map(len, listed)) != {2}:
        raise ValueError
    texts = list(map(" ".join, listed))
    if "".join(texts).count(" ") > len(texts):
        # A space is written by the letter that stands for it in byte-level vocabularies.
        mark = chr(ord(" ") + 256)
        texts = [" ".join(part.replace(" ", mark) for part in pair) for pair in listed]
    return texts


def _table(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _tables(value: Any) -> list[Mapping[str, Any]]:
    return [_table(entry) for entry in value] if isinstance(value, list) else []


def _read_post_processor(reading: _Reading) -> None:
    """What is put around a text, as far as the converter understands the template for it."""
    config, found = reading.config, reading.tokenizer.get("post_processor")
    if not reading.tokenizer:
        return
    if not config.get("bos_token") and config.get("cls_token"):
        config["bos_token"] = config["cls_token"]
    if not config.get("eos_token") and config.get("sep_token"):
        config["eos_token"] = config["sep_token"]
    processor = _table(found)
    steps = _tables(processor["processors"]) if "processors" in processor else [processor]
    named = _Named(config)
    for step in steps:
        kind = step.get("type")
        if kind == "ByteLevel":
            reading.adds.setdefault("bos", False)
            reading.adds.setdefault("eos", False)
        elif kind == "RobertaProcessing":
            reading.adds |= {"bos": True, "eos": True, "sep": True}
            named.take_roberta(step)
        elif kind == "TemplateProcessing":
            _read_template(reading, named, step)


class _Named:
    """The special tokens of tokenizer_config.json while post-processors are read.

    Without such a file they are kept aside, and none is looked up.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config
        self.bos, self.cls = config.get("bos_token"), config.get("cls_token")
        self.eos, self.sep = config.get("eos_token"), config.get("sep_token")

    def take_roberta(self, step: Mapping[str, Any]) -> None:
        if not self.config:
            return
        if not self.cls:
            self.cls = self.config["cls_token"] = _first(step.get("cls"), self.bos)
        if not self.sep:
            self.sep = self.config["sep_token"] = _first(step.get("sep"), self.eos)

    def take_first(self, token: str) -> None:
        """What stands before every text."""
        if not self.config:
            self.bos = token
        elif token not in (self.bos, self.cls):
            if not self.bos:
                self.bos = self.config["bos_token"] = token
            if not self.cls:
                self.cls = self.config["cls_token"] = token

    def take_last(self, token: str, types: list[str]) -> None:
        """What stands after every text; another end that is named becomes that of a turn."""
        if not self.config:
            self.eos = token
        elif token != self.eos:
            for kind in ("eot", "eom"):
                if kind not in types:
                    types.append(kind)
                    self.config[f"{kind}_token"] = self.eos
                    break
            self.eos = self.config["eos_token"] = token


def _first(pair: Any, otherwise: Any) -> Any:
    return pair[0] if isinstance(pair, list) and pair else otherwise


def _special(entry: Mapping[str, Any]) -> Any:
    return _table(entry.get("SpecialToken")).get("id")


def _read_template(reading: _Reading, named: _Named, step: Mapping[str, Any]) -> None:
    single, pair = _tables(step.get("single")), _tables(step.get("pair"))
    first = last = None
    if len(single) > 1:
        if first := _special(single[0]):
            named.take_first(first)
            reading.adds["bos"] = first in (named.bos, named.cls)
        if last := _special(single[-1]):
            named.take_last(last, reading.types)
            reading.adds["eos"] = last == named.eos
    if pair:
        _read_pair(reading, named, pair, first, last)


def _read_pair(
    reading: _Reading,
    named: _Named,
    pair: list[Mapping[str, Any]],
    first: Any,
    last: Any,
) -> None:
    """Whether something is put between two texts, `A [sep] [eos] B`."""
    start = 1 if first and _special(pair[0]) == first else 0
    stop = -1 if last and _special(pair[-1]) == last else None
    inner = pair[start:stop]
    ends = [_table(entry.get("Sequence")).get("id") for entry in (inner[:1] + inner[-1:])]
    between = inner[1:-1]
    if ends != ["A", "B"] or not between:
        return
    separators = (named.sep, named.eos)
    entry = _special(between[0])
    add = bool(entry) and entry in separators and not last
    if len(between) == 2 and (second := _special(between[1])):
        add = add or second in separators
    reading.adds["sep"] = add
    if add and not named.sep and named.config:
        named.config["sep_token"] = named.eos


def _read_tokens(reading: _Reading) -> None:
    """The ids of the tokens that tokenizer_config.json names, and what it says is added."""
    numbers: dict[Any, Any] = {}
    for token in _tables(reading.tokenizer.get("added_tokens")):
        if isinstance(token.get("content"), str):
            numbers.setdefault(token["content"], token.get("id"))
    for kind in reading.types if reading.config else ():
        added = reading.config.get(f"add_{kind}_token")
        if isinstance(added, bool):
            reading.adds.setdefault(kind, added)
        entry = reading.config.get(f"{kind}_token")
        text = entry.get("content") if isinstance(entry, dict) else entry
        if isinstance(text, str):
            reading.set_id(kind, numbers.get(text))


def _read_config(reading: _Reading, config: Mapping[str, Any]) -> None:
    text = _table(config.get("text_config"))
    for kind in reading.types:
        number = config.get(f"{kind}_token_id")
        reading.set_id(kind, text.get(f"{kind}_token_id") if number is None else number)


def _templates(
    files: Mapping[str, bytes], config: Mapping[str, Any]
) -> Iterator[tuple[str, Value]]:
    """The chat template, and those with names of their own in the order of these."""
    found = config["chat_template"] if "chat_template" in config else _beside(files)
    if isinstance(found, list):
        default, names = None, []
        for choice in _tables(found):
            name, template = choice.get("name", ""), choice.get("template")
            if not isinstance(name, str) or not name or not isinstance(template, str):
                continue
            name = "".join(c if c in ascii_letters + digits else "_" for c in name)
            if name == "default":
                default = template
                continue
            names.append(name)
            if template:
                yield f"{_TEMPLATE}.{name}", Value("str", template)
        if names:
            yield "tokenizer.chat_templates", Value("[str]", sorted(set(names)))
        found = default
    if isinstance(found, str) and found:
        yield _TEMPLATE, Value("str", found)


def _beside(files: Mapping[str, bytes]) -> Any:
    """The templates in files of their own, which count where tokenizer_config.json has none."""
    if TEMPLATE_NAME in files:
        named = sorted(filter(is_named_template, files))
        template = _text(files, TEMPLATE_NAME)
        more = [
            {"name": PurePosixPath(name).stem, "template": _text(files, name)} for name in named
        ]
        return [{"name": "default", "template": template}, *more] if more else template
    name = "chat_template.json"
    return json_object(name, files[name]).get("chat_template") if name in files else None


def _text(files: Mapping[str, bytes], name: str) -> str:
    """A text as Python opens it, with every kind of line end as one."""
    try:
        text = files[name].decode("utf-8")
    except UnicodeDecodeError:
        raise CheckpointError("is not UTF-8", where=name) from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _normalizer(found: Any) -> Iterator[tuple[str, Value]]:
    """What is done to letters before a text is split, which llama.cpp does as well."""
    steps = [_table(found)]
    if steps[0].get("type") == "Sequence":
        steps = _tables(steps[0].get("normalizers"))
    flags: dict[str, Any] = {"lowercase": None, "strip_accents": None}
    for step in steps:
        if step.get("type") == "Lowercase":
            flags["lowercase"] = True
        elif step.get("type") == "StripAccents":
            flags["strip_accents"] = True
        elif step.get("type") == "BertNormalizer":
            flags |= {key: step[key] for key in flags if key in step}
    for key, flag in flags.items():
        if isinstance(flag, bool):
            yield f"tokenizer.ggml.normalizer.{key}", Value("bool", flag)
