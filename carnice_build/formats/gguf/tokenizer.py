"""The tokenizer as metadata of a GGUF file, key by key as llama.cpp's converter writes it.

Which of its ways the converter takes depends on the family (`set_vocab` of its classes).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

from carnice_build.checkpoint.gguf_values import Value
from carnice_build.checkpoint.json import json_object
from carnice_build.errors import PlanError
from carnice_build.formats.gguf import sentencepiece
from carnice_build.formats.gguf.pre_tokenizer import checked, recognised
from carnice_build.formats.gguf.sentencepiece import sentencepiece_vocabulary
from carnice_build.formats.gguf.special_ids import merges, special_values
from carnice_build.formats.gguf.tokenizer_file import CONFIG, NAME, TokenizerFile, read_tokenizer
from carnice_build.formats.gguf.vocabulary import (
    Vocabulary,
    byte_pairs,
    is_scored_pairs,
    scored_pairs,
)

_PREFIX = "tokenizer.ggml."
_SPACE_PREFIX = "tokenizer.ggml.add_space_prefix"


class _Source(NamedTuple):
    """What `tokenizer_metadata` is given."""

    files: Mapping[str, bytes]
    config: Mapping[str, Any]
    model_type: str
    vocab: int
    pre: str | None
    where: str

    def read(self) -> TokenizerFile:
        return read_tokenizer(self.files, self.where)

    @property
    def tokenizer_config(self) -> Mapping[str, Any]:
        return json_object(CONFIG, self.files[CONFIG]) if CONFIG in self.files else {}


def tokenizer_metadata(
    files: Mapping[str, bytes],
    config: Mapping[str, Any],
    model_type: str,
    vocab: int,
    pre: str | None,
    where: str,
) -> dict[str, Value]:
    """The keys `tokenizer.*` in the order in which the converter writes them.

    `files` are the small files of the folder `where`, `config` is what its config.json says,
    `vocab` the size of its vocabulary (rows of the embedding), which is filled up to that; `pre`
    is llama.cpp's name of the pre-tokenizer where the recipe gives one.
    PlanError for a tokenizer of a kind that cannot be written, CheckpointError for files that are
    not what they are called.
    """
    if pre is not None:
        checked(pre)
    return dict(
        _made(tuple(files.items()), json.dumps(config), model_type, vocab, pre, where),
    )


@lru_cache(maxsize=2)
def _made(
    files: tuple[tuple[str, bytes], ...],
    config: str,
    model_type: str,
    vocab: int,
    pre: str | None,
    where: str,
) -> dict[str, Value]:
    """Remembered, as all variants of a checkpoint hold the same, and reading it takes long."""
    make = _FAMILIES.get(model_type.removesuffix("_text"), _gpt2)
    return make(_Source(dict(files), json.loads(config), model_type, vocab, pre, where))


def _values(model: str, pre: str | None, vocabulary: Vocabulary) -> dict[str, Value]:
    values = {f"{_PREFIX}model": Value("str", model)}
    if pre is not None:
        values[f"{_PREFIX}pre"] = Value("str", pre)
    values[f"{_PREFIX}tokens"] = Value("[str]", vocabulary.tokens)
    if vocabulary.scores is not None:
        values[f"{_PREFIX}scores"] = Value("[f32]", vocabulary.scores)
    values[f"{_PREFIX}token_type"] = Value("[i32]", vocabulary.kinds)
    return values


def _gpt2(
    source: _Source, preset: Mapping[str, str] | None = None, read: TokenizerFile | None = None
) -> dict[str, Value]:
    """Byte-level pairs; `preset` are special tokens of the family by type."""
    read = read or source.read()
    pre = source.pre or recognised(read, source.model_type)
    numbers = {kind: _number(read, text) for kind, text in (preset or {}).items()}
    return {
        **_values("gpt2", pre, byte_pairs(read, source.vocab)),
        f"{_PREFIX}merges": merges(read.model),
        **special_values(source.files, source.config, preset=numbers, tokenizer=read.content),
    }


def _number(read: TokenizerFile, text: str) -> int:
    if text not in read.added:
        raise PlanError(f"has no token {text!r}, which its family has", where=NAME)
    return read.added[text].number


def _sentencepiece(source: _Source) -> dict[str, Value]:
    """A SentencePiece model, which files call tokenizer.model."""
    vocabulary = sentencepiece_vocabulary(source.files, source.vocab)
    return _scored(source, vocabulary)


def _scored(source: _Source, vocabulary: Vocabulary) -> dict[str, Value]:
    known = len(vocabulary.tokens)
    return {
        **_values("llama", source.pre or "default", vocabulary),
        **special_values(source.files, source.config, known=known),
    }


def _either(source: _Source) -> dict[str, Value]:
    return _sentencepiece(source) if sentencepiece.NAME in source.files else _gpt2(source)


def _llama(source: _Source) -> dict[str, Value]:
    """SentencePiece as either file has it, or byte-level pairs since Llama 3."""
    prefix = source.tokenizer_config.get("add_prefix_space")
    values = {_SPACE_PREFIX: Value("bool", prefix)} if isinstance(prefix, bool) else {}
    if sentencepiece.NAME in source.files:
        values |= _sentencepiece(source)
    else:
        read = source.read()
        scored = is_scored_pairs(read)
        values |= _scored(source, scored_pairs(read)) if scored else _gpt2(source, read=read)
    if source.vocab == _CODE_LLAMA:
        values |= special_values(
            source.files,
            source.config,
            types=("prefix", "suffix", "middle", "eot"),
            preset={"eot": 32010},
        )
    if source.vocab == _GRANITE_SMALL:
        values[f"{_PREFIX}add_bos_token"] = Value("bool", False)
    return values


_CODE_LLAMA, _GRANITE_SMALL = 32016, 49152
"""Sizes of vocabularies by which the converter knows two models of family llama."""


def _gemma(source: _Source) -> dict[str, Value]:
    types = ("prefix", "suffix", "middle", "fsep", "eot")
    again = special_values(source.files, source.config, types=types, preset={"eot": 107})
    templates = [key for key in again if key.startswith("tokenizer.chat_template")]
    for key in templates:
        del again[key]
    first = _gemma2(source)
    last = first.pop(_SPACE_PREFIX)
    return {**first, **again, _SPACE_PREFIX: last}


def _gemma2(source: _Source) -> dict[str, Value]:
    if sentencepiece.NAME not in source.files:
        raise PlanError(
            f"has no {sentencepiece.NAME}, which the vocabulary of a GGUF file is made of",
            where=source.where,
        )
    return {**_sentencepiece(source), _SPACE_PREFIX: Value("bool", False)}


def _gemma3(source: _Source) -> dict[str, Value]:
    return _gemma2(source) if sentencepiece.NAME in source.files else _gpt2(source)


def _gemma4(source: _Source) -> dict[str, Value]:
    """Pairs with scores and merges; what parsers of chats look for is shown."""
    read = source.read()
    if not is_scored_pairs(read):
        raise PlanError("is no SentencePiece model with merges, as its family has", where=NAME)
    visible = (
        *("<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>"),
        *("<|tool_response>", "<tool_response|>", '<|"|>'),
    )
    return {
        **_values("gemma4", source.pre, scored_pairs(read, visible)),
        f"{_PREFIX}merges": merges(read.model),
        **special_values(source.files, source.config, tokenizer=read.content),
        _SPACE_PREFIX: Value("bool", False),
        f"{_PREFIX}add_bos_token": Value("bool", True),
    }


def _glm4(source: _Source) -> dict[str, Value]:
    end = "<|endoftext|>"
    return _gpt2(source, {"eos": end, "eot": "<|user|>", "unk": end, "bos": end})


def _glm4_moe(source: _Source) -> dict[str, Value]:
    ids = {"bos": "[gMASK]", "eot": "<|user|>", "unk": "<|endoftext|>", "eom": "<|observation|>"}
    return _gpt2(source, ids)


def _nemotron_h(source: _Source) -> dict[str, Value]:
    return _gpt2(source._replace(vocab=-(-source.vocab // 8) * 8))


def _phi3(source: _Source) -> dict[str, Value]:
    if source.tokenizer_config.get("tokenizer_class") == "GPT2Tokenizer":
        return _gpt2(source)
    raise PlanError(
        "has a tokenizer of Phi-3, which cannot be written as GGUF yet",
        where=NAME,
        expected="the tokenizer_class GPT2Tokenizer in tokenizer_config.json, as Phi-4 has it",
    )


_FAMILIES: Mapping[str, Callable[[_Source], dict[str, Value]]] = {
    "llama": _llama,
    "mistral": _llama,
    "mixtral": _llama,
    "mistral3": _llama,
    "ministral3": _llama,
    "smollm3": _llama,
    "qwen2": _either,
    "qwen3": _either,
    "deepseek": _either,
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "gemma4": _gemma4,
    "glm4": _glm4,
    "glm4_moe": _glm4_moe,
    "glm4_moe_lite": _glm4_moe,
    "glm_moe_dsa": _glm4_moe,
    "nemotron_h": _nemotron_h,
    "phi3": _phi3,
}
"""By `model_type`, that of a text model as that of the whole; any other has byte-level pairs."""
