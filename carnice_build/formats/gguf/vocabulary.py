"""The tokens of a GGUF file, their types and scores, as llama.cpp's converter writes them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from enum import IntEnum
from typing import Any, NamedTuple

from carnice_build.errors import CheckpointError, PlanError
from carnice_build.formats.gguf.tokenizer_file import MOST_TOKENS, NAME, TokenizerFile


class Kind(IntEnum):
    """What a token is (`llama_token_type`)."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


class Vocabulary(NamedTuple):
    """Tokens by number; `scores` where they have any."""

    tokens: list[str]
    kinds: list[int]
    scores: list[float] | None = None


def distinct(vocabulary: Vocabulary, where: str) -> Vocabulary:
    """The vocabulary itself; CheckpointError where two tokens have one text.

    llama.cpp ends with a failed assertion when it loads such a file.
    """
    tokens = vocabulary.tokens
    # Those without a text get one there, each another.
    if len(set(tokens)) < len(tokens) - max(0, tokens.count("") - 1):
        text = next(text for text, count in Counter(tokens).items() if text and count > 1)
        raise CheckpointError(
            f"has two tokens that are {text!r} in a GGUF file", where=where, expected="one of each"
        )
    return vocabulary


_SCORE = -1000.0
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_SPACE = "\u2581"


def padded(size: int) -> list[str]:
    """The texts of `size` numbers that stand for no token; PlanError when that is absurd."""
    if not 0 < size <= MOST_TOKENS:
        raise PlanError(
            f"says of the vocabulary that it has {size} tokens",
            where="config.json",
            expected=f"1 to {MOST_TOKENS}",
        )
    return [f"[PAD{number}]" for number in range(size)]


def byte_pairs(read: TokenizerFile, size: int) -> Vocabulary:
    """A vocabulary of `size` tokens for pairs that are merged (`gpt2`).

    CheckpointError when the tokenizer has one whose number is not below `size`.
    """
    most = max(read.numbers)
    if most >= size:
        raise CheckpointError(
            f"has a token of number {most}",
            where=NAME,
            expected=f"numbers below {size}, the vocabulary of config.json",
        )
    tokens, kinds = padded(size), [int(Kind.UNUSED)] * size
    normal = int(Kind.NORMAL)
    for text, number in read.base.items():
        tokens[number], kinds[number] = text, normal
    for token in read.added.values():
        # Where a text is searched before it is normalized, llama.cpp needs what is really found.
        text = token.text if token.normalized else decoded(token.text, read.content.get("decoder"))
        control = token.special or looks_special(text)
        tokens[token.number] = text if control else text.replace(_SPACE, " ")
        kinds[token.number] = int(Kind.CONTROL if control else Kind.USER_DEFINED)
    return distinct(Vocabulary(tokens, kinds), NAME)


def scored_pairs(read: TokenizerFile, visible: Iterable[str] = ()) -> Vocabulary:
    """A vocabulary for SentencePiece's pairs in a tokenizer.json, without padding.

    Tokens of the texts `visible` are shown though the tokenizer calls them special.
    CheckpointError when the numbers of the model's own tokens have gaps.
    """
    texts = {number: text for text, number in read.base.items()}
    texts |= {token.number: text for text, token in read.added.items()}
    count = len(read.base)
    order = [*range(count), *sorted(number for number in texts if number >= count)]
    if any(number not in texts for number in order):
        raise CheckpointError("has a vocabulary with gaps", where=NAME)
    tokens = [texts[number] for number in order]
    special, shown = read.special, frozenset(visible)
    kinds = [int(Kind.NORMAL)] * count + [int(Kind.USER_DEFINED)] * (len(tokens) - count)
    for index, text in enumerate(tokens):
        if index < count and len(text) == 6 and _BYTE.fullmatch(text):
            kinds[index] = int(Kind.BYTE)
        elif text in special:
            kinds[index] = int(Kind.CONTROL)
        if text in shown:
            kinds[index] = int(Kind.USER_DEFINED)
    return distinct(Vocabulary(tokens, kinds, [_SCORE] * len(tokens)), NAME)


def is_scored_pairs(read: TokenizerFile) -> bool:
    """True for a tokenizer.json that was made of a SentencePiece model."""
    decoder = read.content.get("decoder")
    sequence = isinstance(decoder, dict) and decoder.get("type") == "Sequence"
    return read.model.get("byte_fallback") is True and sequence


def looks_special(text: str) -> bool:
    """True for texts that are control tokens though some tokenizers do not say so."""
    return (
        text in ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
        or (text.startswith("<|") and text.endswith("|>"))
        or (text.startswith("<\uff5c") and text.endswith("\uff5c>"))
        or (text.startswith("<unused") and text.endswith(">"))
    )


def _byte_letters() -> dict[str, int]:
    """The letter that stands for each byte in byte-level vocabularies (GPT-2's table)."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    letters = {chr(byte): byte for byte in shown}
    return letters | {chr(256 + index): byte for index, byte in enumerate(hidden)}


_BYTES = _byte_letters()


def decoded(text: str, decoder: Any) -> str:
    """What the text of one token becomes when a tokenizer with this `decoder` says it.

    PlanError for a decoder that is none of those of pairs.
    """
    if decoder is None:
        return text
    kind = str(decoder.get("type")) if isinstance(decoder, dict) else ""
    if kind == "Sequence" and isinstance(decoder.get("decoders"), list):
        for step in decoder["decoders"]:
            if not isinstance(step, dict) or step.get("type") == "Sequence":
                break
            text = decoded(text, step)
        else:
            return text
    elif kind == "ByteLevel":
        whole = all(letter in _BYTES for letter in text)
        return bytes(map(_BYTES.__getitem__, text)).decode("utf-8", "replace") if whole else text
    elif kind == "ByteFallback":
        byte = _BYTE.fullmatch(text)
        return bytes([int(text[3:5], 16)]).decode("utf-8", "replace") if byte else text
    elif kind == "Fuse":
        return text
    elif kind in _STEPS and (step := _STEPS[kind](text, decoder)) is not None:
        return step
    raise PlanError(
        f"has a decoder of type {kind!r}, which cannot be written as GGUF yet",
        where=NAME,
        expected="ByteLevel, or a Sequence of Replace, ByteFallback, Fuse, Strip and Metaspace",
    )


def _replace(text: str, decoder: Mapping[str, Any]) -> str | None:
    pattern, content = decoder.get("pattern"), decoder.get("content")
    searched = pattern.get("String") if isinstance(pattern, dict) else None
    if not isinstance(searched, str) or not searched or not isinstance(content, str):
        return None
    return text.replace(searched, content)


def _strip(text: str, decoder: Mapping[str, Any]) -> str | None:
    content, counts = decoder.get("content"), (decoder.get("start"), decoder.get("stop"))
    if not isinstance(content, str) or len(content) != 1:
        return None
    start, stop = (count if type(count) is int else 0 for count in counts)
    text = text[min(len(text) - len(text.lstrip(content)), start) :]
    return text[: len(text) - min(len(text) - len(text.rstrip(content)), stop)]


def _metaspace(text: str, decoder: Mapping[str, Any]) -> str | None:
    mark = decoder.get("replacement")
    if not isinstance(mark, str) or not mark:
        return None
    prefixed = "always" if decoder.get("add_prefix_space", True) else "never"
    kept = decoder.get("prepend_scheme", prefixed) == "never"
    return text.replace(mark, " " if kept else "")


_STEPS = {"Replace": _replace, "Strip": _strip, "Metaspace": _metaspace}
