"""A model folder opened for inspection: all that can be read is read, the rest becomes problems."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from carnice_build.checkpoint.containers import SUFFIXES, is_statistics, read_entries
from carnice_build.checkpoint.json import object_or_none
from carnice_build.checkpoint.source import LocalFile
from carnice_build.errors import CheckpointError, StoreError
from carnice_build.tensors import SourceTensor

BUILD_NAME = "build.json"


def read_build(folder: Path) -> dict[str, Any]:
    """The build.json of a folder, {} when there is none or it is damaged."""
    return read_object(folder / BUILD_NAME)


@dataclass(frozen=True)
class ModelFolder:
    """The tensors that lie in a folder's shards, whatever its index says of them.

    `shards` names the tensors of each file in the order of their bytes; `problems` says which
    files cannot be read; `record` is build.json, {} when there is none.
    `statistics` are tensors that no model has: they tell what weights were quantized by.
    """

    path: Path
    record: Mapping[str, Any]
    config: Mapping[str, Any]
    tensors: Mapping[str, SourceTensor]
    shards: Mapping[str, Sequence[str]]
    problems: Sequence[str]
    statistics: Mapping[str, SourceTensor] = field(default_factory=dict)

    @cached_property
    def stored(self) -> Mapping[str, SourceTensor]:
        """Every tensor of the files, whatever it is for."""
        return {**self.tensors, **self.statistics}

    def shard_of(self, name: str) -> str:
        """The file that holds the tensor `name`."""
        file = self.stored[name].file
        assert file is not None
        return Path(file.name).name


def section(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """The section `key` of a config, empty when there is none."""
    value = config.get(key)
    return value if isinstance(value, dict) else {}


def open_folder(path: Path) -> ModelFolder:
    """Read the headers and JSON files of `path`; StoreError when it holds no weights at all."""
    shards = sorted(item for item in path.glob("*") if item.suffix in SUFFIXES)
    if all(is_statistics(shard.name) for shard in shards):
        raise StoreError(
            "holds no safetensors or GGUF file",
            where=str(path),
            expected="a built folder, as `carnice build` makes it",
        )
    tensors: dict[str, SourceTensor] = {}
    statistics: dict[str, SourceTensor] = {}
    names: dict[str, list[str]] = {}
    problems: list[str] = []
    for shard in shards:
        try:
            source = LocalFile(shard)
            entries = read_entries(source)
        except CheckpointError as error:
            problems.append(f"{shard.name}: {error.what}")
            continue
        names[shard.name] = [entry.name for entry in entries]
        held = statistics if is_statistics(shard.name) else tensors
        for entry in entries:
            if entry.name in held:
                problems.append(f"{shard.name}: tensor {entry.name} is in another file too")
            else:
                held[entry.name] = SourceTensor(entry.name, entry.spec, source, entry.offset)
    config = read_object(path / "config.json")
    if not config:
        problems.append("config.json: is missing or not a JSON object")
    return ModelFolder(path, read_build(path), config, tensors, names, problems, statistics)


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object from a file, {} when the file is missing or holds something else."""
    try:
        return object_or_none(path.read_bytes()) or {}
    except OSError:
        return {}
