"""A tokenizer as the `tokenizers` library and transformers make it of a folder's files.

Read from tokenizer.json itself, without either library: a plan needs the texts of the tokens and
their numbers, and no word is split.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from carnice_build.chat.special_tokens import special_tokens
from carnice_build.checkpoint.json import json_object
from carnice_build.errors import CheckpointError, PlanError

MOST_TOKENS = 1 << 20
"""Tokens that a vocabulary may have; the largest known have some 260,000."""

NAME, CONFIG = "tokenizer.json", "tokenizer_config.json"
ADDED, _MAP = "added_tokens.json", "special_tokens_map.json"


class Added(NamedTuple):
    """A token that is found in a text before it is split.

    `special` ones are left out of what a model said; `normalized` ones are looked for after the
    text was normalized.
    """

    text: str
    number: int
    special: bool
    normalized: bool


@dataclass(frozen=True)
class TokenizerFile:
    """What tokenizer.json and the files beside it say of the tokens."""

    content: Mapping[str, Any]
    model: Mapping[str, Any]
    base: Mapping[str, int]
    """The numbers of the model's own tokens, by their texts."""
    added: Mapping[str, Added]
    """Those that are found whole, by their texts; some are the model's own as well."""
    special: frozenset[str]
    """Those that tokenizer_config.json names, as the end of a text or the like."""

    @property
    def numbers(self) -> Iterator[int]:
        """The number of every token; one that is both added and the model's own comes twice."""
        yield from self.base.values()
        yield from (token.number for token in self.added.values())


def read_tokenizer(files: Mapping[str, bytes], where: str) -> TokenizerFile:
    """The tokenizer that a folder with the small `files` has.

    PlanError when there is none of a kind that GGUF knows how to hold, CheckpointError when its
    files are not what they are called.
    """
    if NAME not in files:
        raise PlanError(
            f"has no {NAME}, which the vocabulary of a GGUF file is made of", where=where
        )
    content = json_object(NAME, files[NAME])
    model = content.get("model")
    if not isinstance(model, dict):
        raise CheckpointError("has no model", where=NAME)
    if model.get("type", "BPE") != "BPE":
        raise PlanError(
            f"has a model of type {model['type']!r}, which cannot be written as GGUF yet",
            where=NAME,
            expected="BPE",
        )
    base = _base(model)
    config = json_object(CONFIG, files[CONFIG]) if CONFIG in files else {}
    legacy = "added_tokens_decoder" not in config
    later = {name: json_object(name, files[name]) for name in (_MAP, ADDED) if name in files}
    named = list(special_tokens(files).values())
    special = [*named, *_more(config), *(_more(later.get(_MAP, {})) if legacy else ())]
    beside = [
        *described(config),
        *(listed(later.get(ADDED, {}), special) if legacy else ()),
        *(Added(text, -1, special=True, normalized=False) for text in special),
    ]
    # What other files add gets the next number, whichever they say.
    wanted = [*_listed(content), *(token._replace(number=-1) for token in beside)]
    return TokenizerFile(content, model, base, _numbered(wanted, base), frozenset(special))


def _base(model: Mapping[str, Any]) -> dict[str, int]:
    """The model's own vocabulary; CheckpointError when it is none."""
    vocab = model.get("vocab")
    if not isinstance(vocab, dict) or not vocab:
        raise CheckpointError("has no vocabulary", where=NAME)
    numbers = vocab.values()
    if set(map(type, numbers)) != {int} or min(numbers) < 0 or max(numbers) >= MOST_TOKENS:
        raise CheckpointError(
            "has a token without a number",
            where=NAME,
            expected=f"whole numbers of 0 to {MOST_TOKENS - 1}",
        )
    if len(set(numbers)) != len(vocab):
        raise CheckpointError("gives two tokens one number", where=NAME)
    return vocab


def _listed(content: Mapping[str, Any]) -> Iterator[Added]:
    tokens = content.get("added_tokens") or []
    if not isinstance(tokens, list):
        raise CheckpointError("has added_tokens that are no list", where=NAME)
    for token in tokens:
        number = token.get("id") if isinstance(token, dict) else None
        yield _added(token, number, NAME)


def described(config: Mapping[str, Any]) -> Iterator[Added]:
    """What tokenizer_config.json adds, in the order of its numbers."""
    table = config.get("added_tokens_decoder") or {}
    if not isinstance(table, dict):
        raise CheckpointError("has an added_tokens_decoder that is no table", where=CONFIG)
    for key in table:
        if not (key.isascii() and key.isdigit() and len(key) < 10):
            raise CheckpointError(f"gives an added token the number {key!r}", where=CONFIG)
    for key, token in sorted(table.items(), key=lambda item: int(item[0])):
        yield _added(token, int(key), CONFIG)


def _added(token: Any, number: Any, where: str) -> Added:
    if not isinstance(token, dict) or not isinstance(token.get("content"), str):
        raise CheckpointError("has an added token without a content", where=where)
    if type(number) is not int or not 0 <= number < MOST_TOKENS:
        raise CheckpointError(f"gives {token['content']!r} the number {number!r}", where=where)
    special = bool(token.get("special", False))
    return Added(token["content"], number, special, bool(token.get("normalized", not special)))


def listed(table: Mapping[str, Any], special: Iterable[str] = ()) -> Iterator[Added]:
    """What added_tokens.json adds; those that are `special` by another file are not said to be."""
    named = set(special)
    for text, number in table.items():
        token = {"content": text, "special": text in named}
        yield _added(token, number, ADDED)


def _more(config: Mapping[str, Any]) -> Iterator[str]:
    """The special tokens that have no name of their own."""
    key = "extra_special_tokens"
    listed = config.get(key, config.get("additional_special_tokens"))
    for token in listed if isinstance(listed, list) else ():
        text = token.get("content") if isinstance(token, dict) else token
        if isinstance(text, str):
            yield text


def _numbered(wanted: Iterable[Added], base: Mapping[str, int]) -> dict[str, Added]:
    """Tokens by their texts, numbered as the library does when it adds them in turn.

    A text that is known keeps what was said first; a new one has the model's number of it, or the
    next that is free, which is the one that tokenizer.json must give (-1 stands for any).
    """
    found: dict[str, Added] = {}
    free = len(base)
    for token in wanted:
        if not token.text or token.text in found:
            continue
        number = base.get(token.text, free)
        if token.number not in (number, -1):
            raise CheckpointError(
                f"gives the added token {token.text!r} the number {token.number}",
                where=NAME,
                expected=f"{number}, which it has once it is loaded",
            )
        found[token.text] = token._replace(number=number)
        free = max(free, number + 1)
    return found
