"""The small files of a checkpoint that a published folder takes over."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from carnice_build.checkpoint.checkpoint import Checkpoint
from carnice_build.errors import CheckpointError

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
"""Taken over as they are: a tokenizer library that saves them again may change what they mean."""

COPIED_FILES = (*TOKENIZER_FILES, "generation_config.json")
MAX_COPIED_BYTES = 200_000_000


class Assets(Mapping[str, bytes]):
    """The files of a checkpoint that are copied, by name; each is read when it is asked for."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._names = [name for name in COPIED_FILES if name in checkpoint.assets]

    def __getitem__(self, name: str) -> bytes:
        if name not in self._names:
            raise KeyError(name)
        source = self._checkpoint.assets[name]
        if source.size > MAX_COPIED_BYTES:
            raise CheckpointError(f"has {source.size} bytes", where=source.name)
        content = self._checkpoint.asset(name)
        assert content is not None
        return content

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
