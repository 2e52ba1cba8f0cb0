"""The small files of a checkpoint that a published folder takes over, and what they must hold."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from enum import StrEnum
from typing import Any

from carnice_build.checkpoint import generation
from carnice_build.checkpoint.checkpoint import TEMPLATE_FOLDER, Checkpoint, is_plain_path
from carnice_build.checkpoint.json import object_or_none
from carnice_build.checkpoint.source import LocalFile, LostFile, read_all, refuse_pointer
from carnice_build.errors import CheckpointError
from carnice_build.tensors import Readable


class Reads(StrEnum):
    """What an engine reads of a folder beside config, weights and generation settings."""

    TOKENIZER = "tokenizer"
    PROCESSOR = "processor"


_FILES: Mapping[Reads, tuple[str, ...]] = {
    Reads.TOKENIZER: (
        "tokenizer.json",
        "tokenizer_config.json",
        "tokenizer.model",
        "vocab.json",
        "merges.txt",
        "special_tokens_map.json",
        "added_tokens.json",
        "chat_template.jinja",
        "chat_template.json",
    ),
    Reads.PROCESSOR: (
        "preprocessor_config.json",
        "processor_config.json",
        "video_preprocessor_config.json",
    ),
}
"""Taken over as they are: a library that saves them again may change what they mean."""

_OLD_FORMS = ("tokenizer.model", "merges.txt")
_MAX_COPIED_BYTES = 200_000_000


class Assets(Mapping[str, bytes]):
    """The files of a checkpoint that are copied, by name; each is read when it is asked for."""

    def __init__(self, checkpoint: Checkpoint, reads: Collection[Reads]) -> None:
        """`reads` says what the engine reads of a folder; files for nothing else are copied."""
        self._checkpoint = checkpoint
        self._names = taken_over(checkpoint.assets, reads)

    def __getitem__(self, name: str) -> bytes:
        if name not in self._names:
            raise KeyError(name)
        return read_copied(self._checkpoint.assets[name])

    def __contains__(self, name: object) -> bool:
        """Without reading the file, which may be far away."""
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def check_places(self) -> None:
        """Raise CheckpointError for a link to nothing and a Git LFS pointer on this machine.

        What is elsewhere is looked at when it is read.
        """
        for name in (*self._names, TEMPLATE_FOLDER):
            source = self._checkpoint.assets.get(name)
            if isinstance(source, LocalFile | LostFile):
                refuse_pointer(source)


def read_copied(source: Readable) -> bytes:
    """The content of a file that is copied; CheckpointError when it is not one, or too large."""
    if source.size > _MAX_COPIED_BYTES:
        raise CheckpointError(f"has {source.size} bytes", where=source.name)
    return read_all(source)


def taken_over(names: Collection[str], reads: Collection[Reads]) -> list[str]:
    """Those of the files `names` that a folder for an engine that reads these takes over."""
    wanted = [name for kind in Reads if kind in reads for name in _FILES[kind]]
    named = sorted(filter(is_named_template, names)) if Reads.TOKENIZER in reads else []
    return [name for name in (*wanted, generation.NAME) if name in names] + named


def is_named_template(name: str) -> bool:
    """True for the path of a chat template beside the default one."""
    folder, _, file = name.rpartition("/")
    return folder == TEMPLATE_FOLDER and file.endswith(".jinja") and is_plain_path(name)


def absent(names: Collection[str], reads: Collection[Reads], *, vision: bool) -> list[str]:
    """What an engine that reads these needs and a folder of these files lacks; a sentence each.

    `vision` says that the folder has a vision tower, which no engine runs without its processor;
    without a tower a processor is read where it is there, and not missed.
    """
    problems = []
    if Reads.TOKENIZER in reads and not _tokenizer(names):
        problems.append("there is no tokenizer (tokenizer.json, or another complete form)")
    # Since transformers 5, processor_config.json may hold what preprocessor_config.json held.
    processors = {"preprocessor_config.json", "processor_config.json"}
    if Reads.PROCESSOR in reads and vision and processors.isdisjoint(names):
        problems.append("there is a vision tower, but no preprocessor_config.json")
    return problems


def damaged(files: Mapping[str, bytes]) -> Iterator[tuple[str, str]]:
    """The names of copied files that are not what they are called, each with what is wrong."""
    for name in files:
        if name.endswith(".json"):
            value = object_or_none(files[name])
            if value is None:
                yield name, "is not a JSON object"
            elif name == "tokenizer.json" and not _has_vocabulary(value):
                yield name, "has no model with a vocabulary"
            elif name == "vocab.json" and not value:
                yield name, "has no entry"
        elif name.endswith(".jinja") and not _is_text(files[name]):
            yield name, "is not UTF-8"
        elif name in _OLD_FORMS and not files[name].strip():
            yield name, "is empty"


def _tokenizer(names: Collection[str]) -> bool:
    """True when these files hold a complete tokenizer, in one of the forms that are loaded."""
    pair = {"vocab.json", "merges.txt"}
    return "tokenizer.json" in names or "tokenizer.model" in names or pair <= set(names)


def _is_text(content: bytes) -> bool:
    try:
        content.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _has_vocabulary(tokenizer: Mapping[str, Any]) -> bool:
    """True for the form that the `tokenizers` library writes, of any of its models."""
    model = tokenizer.get("model")
    return isinstance(model, dict) and bool(model.get("vocab"))
