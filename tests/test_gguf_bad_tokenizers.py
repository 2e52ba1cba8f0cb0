"""Files of a tokenizer that are not what they are called are refused, and it is said where."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from sentencepiece import SentencePieceProcessor
from vocabularies import Made, added, cases, model_pieces, replace, sentencepiece_model

from carnice_build.errors import CarniceError, CheckpointError, PlanError
from carnice_build.formats.gguf.sentencepiece import pieces

CASES = cases()
QWEN = CASES["qwen2"]
PIECES = CASES["tokenizer.model"]


def with_model(**entries: Any) -> Made:
    """A byte-level tokenizer with other entries in its model."""
    model = json.loads(QWEN.files["tokenizer.json"])["model"]
    return QWEN.changed("tokenizer.json", model={**model, **entries})


BAD = {
    "no merges": (with_model(merges=[]), "tokenizer.json: has no merges"),
    "merges of three": (with_model(merges=[["a", "b", "c"]]), "is no pair of texts"),
    "merges of numbers": (with_model(merges=[["a", "b"], ["c", 1]]), "is no pair of texts"),
    "merges as letters": (with_model(merges=[["a", "b"], "cd"]), "is no pair of texts"),
    "merges of one": (with_model(merges=["a b", "cd"]), "is no pair of texts"),
    "no vocabulary": (with_model(vocab={}), "has no vocabulary"),
    "a list for a vocabulary": (with_model(vocab=[["a", 0.0]]), "has no vocabulary"),
    "a negative number": (with_model(vocab={"a": -1}), "a token without a number"),
    "a number that is true": (with_model(vocab={"a": True}), "a token without a number"),
    "an absurd number": (with_model(vocab={"a": 10**15}), "a token without a number"),
    "padding that is there": (
        replace(
            QWEN.changed("tokenizer.json", added_tokens=added("[PAD270]", first=261)),
            config={"vocab_size": 300},
        ),
        r"has two tokens that are '\[PAD270\]'",
    ),
    "what two tokens become": (
        QWEN.changed(
            "tokenizer.json", added_tokens=added("\u2581x", " x", first=261, special=False)
        ),
        "has two tokens that are ' x' in a GGUF file",
    ),
    "a piece twice": (
        PIECES.with_file(
            "tokenizer.model", sentencepiece_model([*model_pieces(), ("<s>", 0.0, 1)])
        ),
        "tokenizer.model: has two tokens that are '<s>'",
    ),
    "one number for two": (with_model(vocab={"a": 0, "b": 0}), "gives two tokens one number"),
    "a Unigram model": (with_model(type="Unigram"), "model of type 'Unigram'"),
    "no model": (QWEN.changed("tokenizer.json", model=3), "has no model"),
    "no JSON": (QWEN.with_file("tokenizer.json", b"{"), "is not a JSON object"),
    "deep JSON": (QWEN.with_file("tokenizer.json", b"[" * 100_000), "is not a JSON object"),
    "added tokens that are a text": (QWEN.changed("tokenizer.json", added_tokens="x"), "no list"),
    "an added token of no text": (
        QWEN.changed("tokenizer.json", added_tokens=[{"id": 3}]),
        "added token without a content",
    ),
    "an added token elsewhere": (
        QWEN.changed("tokenizer.json", added_tokens=added("<x>", first=270)),
        "the number 270",
    ),
    "a decoder of words": (
        QWEN.changed("tokenizer.json", decoder={"type": "WordPiece"}),
        "decoder of type 'WordPiece'",
    ),
    "decoders in decoders": (
        QWEN.changed(
            "tokenizer.json", decoder={"type": "Sequence", "decoders": [{"type": "Sequence"}]}
        ),
        "decoder of type 'Sequence'",
    ),
    "an added number that is a word": (
        QWEN.changed("tokenizer_config.json", added_tokens_decoder={"x": {"content": "a"}}),
        "the number 'x'",
    ),
    "a vocabulary that is too small": (
        replace(QWEN, config={"vocab_size": 250}),
        "has a token of number 265; expected numbers below 250",
    ),
    "an absurd vocabulary": (
        replace(PIECES, config={"vocab_size": 10**12}),
        "that it has 1000000000000 tokens",
    ),
    "no tokens of its family": (
        replace(QWEN, model_type="glm4_moe", files=CASES["gpt-oss"].files),
        r"has no token '\[gMASK\]'",
    ),
    "an unreadable template": (QWEN.with_file("chat_template.jinja", b"\xff"), "is not UTF-8"),
    "an empty tokenizer.model": (
        PIECES.with_file("tokenizer.model", b""),
        "is not a SentencePiece model",
    ),
    "no tokenizer.model": (replace(QWEN, model_type="gemma2"), "here: has no tokenizer.model"),
    "no tokenizer at all": (replace(QWEN, files={}), "here: has no tokenizer.json"),
    "a tokenizer of Phi-3": (replace(QWEN, model_type="phi3"), "a tokenizer of Phi-3"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_tokenizer_is_refused_by_what_is_wrong(name: str) -> None:
    """The file and the fault are said."""
    tokenizer, sentence = BAD[name]
    with pytest.raises((CheckpointError, PlanError), match=sentence):
        tokenizer.metadata("qwen2")


def test_pieces_are_those_that_the_library_reads() -> None:
    """Texts, scores and types of a model are SentencePiece's own."""
    content = sentencepiece_model(model_pieces())
    library = SentencePieceProcessor(model_proto=content)
    kinds = {
        2: library.IsUnknown,
        3: library.IsControl,
        5: library.IsUnused,
        6: library.IsByte,
    }
    found = pieces(content)
    assert library.vocab_size() == len(found)
    for number, piece in enumerate(found):
        expected = next((kind for kind, asks in kinds.items() if asks(number)), None)
        assert (library.IdToPiece(number), library.GetScore(number)) == piece[:2]
        assert piece.kind == expected if expected else piece.kind in (1, 4)


def test_a_damaged_model_is_refused_or_read() -> None:
    """Bytes that are cut, changed or put between never end in a traceback."""
    content = sentencepiece_model(model_pieces()[:20])
    dice = random.Random(7)
    for _ in range(2000):
        damaged = bytearray(
            content[: dice.randrange(len(content))] if dice.random() < 0.3 else content
        )
        for _ in range(dice.randrange(4) if damaged else 0):
            damaged[dice.randrange(len(damaged))] = dice.randrange(256)
        try:
            assert pieces(bytes(damaged))
        except CheckpointError as error:
            assert error.where == "tokenizer.model"


ODD: list[Any] = [
    None,
    True,
    -1,
    2**40,
    1.5,
    "",
    "x",
    [],
    {},
    [None],
    {"x": None},
    [["a"]],
    "\u0120",
]


def spoiled(value: Any, dice: random.Random) -> Any:
    """A value with something odd somewhere in it."""
    if not isinstance(value, dict | list) or not value or dice.random() < 0.2:
        return dice.choice(ODD)
    keys = list(value) if isinstance(value, dict) else range(len(value))
    key = dice.choice(list(keys)[:40])
    changed: Any = value.copy()
    changed[key] = spoiled(value[key], dice)
    return changed


@pytest.mark.parametrize("name", ["llama 3", "another end", "gemma4", "llama 2 in JSON", "roberta"])
@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json", "config.json"])
def test_odd_entries_never_end_in_a_traceback(name: str, file: str) -> None:
    """Whatever stands in a file, it is read or refused by an error of ours."""
    tokenizer, dice = CASES[name], random.Random(11)
    for _ in range(60):
        if file == "config.json":
            text = spoiled({"bos_token_id": 1, "pad_token_id": [3]}, dice)
            ends = {"vocab_size": 280, "eos_token_id": spoiled(None, dice), "text_config": text}
            files, used = tokenizer.files, ends
        else:
            content = spoiled(json.loads(tokenizer.files[file]), dice)
            files, used = tokenizer.with_file(file, content).files, tokenizer.config
        try:
            made = replace(tokenizer, files=files, config=used)
            values = made.metadata(tokenizer.pre if tokenizer.pre != "default" else None)
        except CarniceError:
            continue
        assert all(type(value.value) in (int, bool, str, list) for value in values.values())
