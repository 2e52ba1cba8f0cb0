"""Rows of a dataset through a chat template and a tokenizer; runs in worker processes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from carnice_build.calibration.samples import too_few
from carnice_build.chat.messages import with_parsed_calls, without_nulls
from carnice_build.chat.render import Chat, render
from carnice_build.errors import BackendError, CheckpointError
from carnice_build.extras import pip_install

_BATCH = 32
"""Conversations that are rendered by one child process."""

_LONGEST = 1 << 22
"""Characters of a row; the tokenizer takes some 230 bytes for each."""

_SHORTEST = 2
"""Tokens below which a sample says nothing about a model of sequences."""

Row = Mapping[str, Any]


def tokenize(
    params: Mapping[str, Any], tokenizer: np.ndarray[Any, Any], file: str | None
) -> list[list[int]]:
    """The token ids of the first `samples` rows, each cut at `length`; see `calibration.tokens`.

    `tokenizer` holds the bytes of tokenizer.json, `file` is the path of a dataset that is a file.
    Raises CheckpointError, naming the row, for one that is no text, is too short or that the
    template refuses, and when there are too few rows.
    """
    samples = list(_samples(params, tokenizer.tobytes(), file))
    if len(samples) < params["samples"]:
        raise too_few(len(samples), params["samples"], _where(params, file))
    return samples


def count(params: Mapping[str, Any], tokenizer: bytes, file: str | None) -> int:
    """How many samples `tokenize` finds of those that are wanted; raises as it does for rows."""
    return sum(1 for _ in _samples(params, tokenizer, file))


def _samples(params: Mapping[str, Any], tokenizer: bytes, file: str | None) -> Iterator[list[int]]:
    where = _where(params, file)
    rows = _from_file(file, params["rows"]) if file is not None else _from_hub(params["dataset"])
    encode = _encoder(tokenizer)
    joined = params.get("joined", False)
    rows = rows if joined else islice(rows, params["samples"])
    encoded = _encoded(encode, _texts(rows, params, where), where)
    cut = _joined if joined else _single
    return islice(cut(encoded, params["length"], where), params["samples"])


def _where(params: Mapping[str, Any], file: str | None) -> str:
    return file or str(params["dataset"]["name"])


def longest_first(lengths: Sequence[int]) -> list[int]:
    """The places of samples of these lengths in the order in which `oneshot` takes them.

    As `LengthAwareSampler` of llmcompressor/datasets/utils.py, whose sort is not stable.
    """
    import torch

    order: list[int] = torch.argsort(torch.tensor(lengths), descending=True).tolist()
    return order


def _encoded(
    encode: Callable[[str], list[int]], texts: Iterable[str], where: str
) -> Iterator[list[int]]:
    for number, text in enumerate(texts, 1):
        _check_length(text, f"row {number}", where)
        try:
            yield encode(text)
        except Exception as error:  # half of a surrogate pair is a TypeError, for one
            raise CheckpointError(f"row {number} is not tokenized: {error}", where=where) from None


def _check_length(text: str, what: str, where: str) -> None:
    if len(text) >= _LONGEST:
        raise CheckpointError(f"{what} has {_LONGEST} characters or more", where=where)


def _single(rows: Iterable[list[int]], length: int, where: str) -> Iterator[list[int]]:
    """Each row is a sample, cut at `length`."""
    for index, ids in enumerate(rows):
        if len(ids) < _SHORTEST:
            raise CheckpointError(f"row {index + 1} is too short: {len(ids)} tokens", where=where)
        yield ids[:length]


def _joined(rows: Iterable[list[int]], length: int, where: str) -> Iterator[list[int]]:
    """All rows one after another, cut into samples of `length`; what is left at the end goes."""
    held: list[int] = []
    for ids in rows:
        held += ids
        while len(held) >= length:
            yield held[:length]
            held = held[length:]


def _encoder(content: bytes) -> Any:
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise BackendError(f"tokenizers is not installed: {pip_install('torch')}") from None
    try:
        tokenizer = Tokenizer.from_str(content.decode())
    except Exception as error:  # the library raises nothing more precise
        raise CheckpointError(f"cannot be used: {error}", where="tokenizer.json") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids


def _from_file(path: str, form: str) -> Iterator[Row]:
    if form == "parquet":
        yield from _from_parquet(path)
        return
    with Path(path).open(encoding="utf-8") as file:
        try:
            for number, line in enumerate(iter(lambda: file.readline(_LONGEST), ""), 1):
                _check_length(line, f"line {number}", path)
                if line.strip():
                    text = {"text": line.removesuffix("\n")}
                    yield text if form == "txt" else _parsed(line, number, path)
        except UnicodeDecodeError:
            raise CheckpointError("is not text in UTF-8", where=path) from None


def _parsed(line: str, number: int, path: str) -> Row:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        row = None
    if not isinstance(row, dict):
        raise CheckpointError(f"line {number} is not a JSON object", where=path)
    return row


def _from_parquet(path: str) -> Iterator[Row]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        for batch in ParquetFile(path).iter_batches(_BATCH):
            yield from map(without_nulls, batch.to_pylist())
    except (ArrowException, OSError) as error:
        raise CheckpointError(f"is not a readable parquet file: {error}", where=path) from None


def _from_hub(dataset: Mapping[str, Any]) -> Iterator[Row]:
    # The hub's library is slow to import, and most calibrations never need it.
    from carnice_build.calibration.hub_rows import rows_on_hub

    return map(without_nulls, rows_on_hub(**dataset))


def _texts(rows: Iterator[Row], params: Mapping[str, Any], where: str) -> Iterator[str]:
    """The text of each row, in order, rendered as late as it is wanted."""
    start = 0
    while found := list(islice(rows, _BATCH)):
        batch = [
            _content(row, params["roles"], f"{where}: row {start + index + 1}")
            for index, row in enumerate(found)
        ]
        yield from _rendered(batch, params, where)
        start += len(found)


def _rendered(batch: Sequence[str | Chat], params: Mapping[str, Any], where: str) -> Iterable[str]:
    chats = [item for item in batch if isinstance(item, Chat)]
    if not chats:
        return [item for item in batch if isinstance(item, str)]
    if params["template"] is None:
        raise CheckpointError("holds conversations, but there is no chat template", where=where)
    tokens = params["special_tokens"]
    texts = iter(render(params["template"], chats, "the chat template", tokens))
    return [item if isinstance(item, str) else next(texts) for item in batch]


def _content(row: Row, roles: Mapping[str, str], where: str) -> str | Chat:
    """A row's text, or its conversation: `messages`, or `conversations` as ShareGPT has them."""
    text = row.get("text")
    if isinstance(text, str):
        return text
    turns = row.get("messages") or row.get("conversations")
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise CheckpointError(
            "holds no text", where=where, expected="`text`, `messages` or `conversations`"
        )
    messages = [with_parsed_calls(_message(turn, roles, where), where) for turn in turns]
    return Chat(messages, _tools(row, where), name=where)


def _message(turn: Row, roles: Mapping[str, str], where: str) -> Row:
    role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    if not isinstance(role, str) or not isinstance(content, str | list | None):
        raise CheckpointError("has a turn without a role or text", where=where)
    others = {key: value for key, value in turn.items() if key not in ("from", "value")}
    return {**others, "role": roles.get(role, role), "content": content}


def _tools(row: Row, where: str) -> Sequence[Row] | None:
    tools = row.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError):
            raise CheckpointError("has `tools` that are not JSON", where=where) from None
    return tools or None
