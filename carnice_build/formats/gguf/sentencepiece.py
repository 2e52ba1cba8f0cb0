"""SentencePiece models (tokenizer.model) read without their library.

The file is a protobuf message, of which three fields of each piece are needed:
`ModelProto.pieces` is field 1, with `piece` (1, text), `score` (2, float) and `type` (3, enum).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from carnice_build.checkpoint.json import json_object
from carnice_build.errors import CheckpointError
from carnice_build.formats.gguf.tokenizer_file import ADDED, CONFIG, MOST_TOKENS, described, listed
from carnice_build.formats.gguf.vocabulary import Kind, Vocabulary, distinct, looks_special, padded

NAME = "tokenizer.model"

_NORMAL, _USER_DEFINED = 1, 4
_PADDING_SCORE, _ADDED_SCORE = -10000.0, -1000.0
_VARINT, _EIGHT_BYTES, _LENGTH, _FOUR_BYTES = 0, 1, 2, 5


class Piece(NamedTuple):
    """A piece of a model; `kind` is its type in the file, which are those of llama.cpp."""

    text: str
    score: float
    kind: int


def pieces(content: bytes) -> list[Piece]:
    """The pieces of a model by number; CheckpointError when `content` is none."""
    found = []
    try:
        for field, wire, value in _fields(content):
            if field == 1 and wire == _LENGTH:
                found.append(_piece(value))
                if len(found) > MOST_TOKENS:
                    raise ValueError
    except (ValueError, IndexError, struct.error):
        found = []
    if not found:
        raise CheckpointError("is not a SentencePiece model", where=NAME)
    return found


def sentencepiece_vocabulary(files: Mapping[str, bytes], size: int | None) -> Vocabulary:
    """A vocabulary of `size` tokens, or of all pieces, as the converter makes it (`llama`).

    Pieces come first, then what added_tokens.json and tokenizer_config.json put in their place.
    """
    found = pieces(files[NAME])
    count = size or len(found)
    tokens, scores = padded(count), [_PADDING_SCORE] * count
    kinds = [int(Kind.UNUSED)] * count
    for number, piece in enumerate(found[:count]):
        tokens[number], scores[number] = piece.text, piece.score
        kinds[number] = _NORMAL if piece.kind == _USER_DEFINED else piece.kind
    for text, number, *_ in listed(_read(files, ADDED)):
        if number < count:
            tokens[number], scores[number] = text, _ADDED_SCORE
            kinds[number] = int(Kind.USER_DEFINED)
    for text, number, special, _ in described(_read(files, CONFIG)):
        if number < count:
            control = special or looks_special(text)
            tokens[number] = text if control else text.replace("\u2581", " ")
            scores[number] = _ADDED_SCORE
            kinds[number] = int(Kind.CONTROL if control else Kind.USER_DEFINED)
    return distinct(Vocabulary(tokens, kinds, scores), NAME)


def _read(files: Mapping[str, bytes], name: str) -> Mapping[str, Any]:
    return json_object(name, files[name]) if name in files else {}


def _piece(content: bytes) -> Piece:
    text, score, kind = "", 0.0, _NORMAL
    for field, wire, value in _fields(content):
        if (field, wire) == (1, _LENGTH):
            text = value.decode("utf-8")
        elif (field, wire) == (2, _FOUR_BYTES):
            (score,) = struct.unpack("<f", value)
        elif (field, wire) == (3, _VARINT):
            kind = int.from_bytes(value, "little")
    if kind not in list(Kind) or not math.isfinite(score):
        raise ValueError(f"type {kind}, score {score}")
    return Piece(text, score, kind)


def _fields(content: bytes) -> Iterator[tuple[int, int, bytes]]:
    """The fields of a message: number, wire type and bytes (a varint's as little endian)."""
    at = 0
    while at < len(content):
        tag, at = _varint(content, at)
        wire = tag & 7
        if wire == _VARINT:
            number, at = _varint(content, at)
            yield tag >> 3, wire, number.to_bytes(8, "little")
            continue
        if wire == _LENGTH:
            length, at = _varint(content, at)
        elif wire in (_FOUR_BYTES, _EIGHT_BYTES):
            length = 4 if wire == _FOUR_BYTES else 8
        else:
            raise ValueError(f"wire type {wire}")
        if length > len(content) - at:
            raise ValueError("a field ends after the file")
        yield tag >> 3, wire, content[at : at + length]
        at += length


def _varint(content: bytes, at: int) -> tuple[int, int]:
    """The number that starts at `at`, below 2**64, and where it ends."""
    number = 0
    for index in range(10):
        byte = content[at + index]
        number |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:
            if number >= 1 << 64:
                break
            return number, at + index + 1
    raise ValueError("a number of more than 64 bits")
