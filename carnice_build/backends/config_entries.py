"""Entries of a family's config class: which there are, and other values of them.

Needs the `torch` extra.
"""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Iterator, Mapping
from typing import Any

import transformers

GENERIC = frozenset(field.name for field in dataclasses.fields(transformers.PretrainedConfig))
"""Entries that any config may have."""

_UNSIZED = re.compile(r"(_id|_ids|_index|position_embeddings|window|_tok|top_k|group|chunk_size)$")
_TIED = "tie_word_embeddings"
_LAYERS = 8

Path = tuple[str, ...]
"""An entry of a config: its section, if any, and its name."""


def entries_of(config: Any, sections: Mapping[str, Any]) -> Iterator[tuple[Path, Any, Any]]:
    """Path, value and type of each entry that is the family's own."""
    for field in dataclasses.fields(config):
        if field.name in GENERIC:
            continue
        value = _value(config, field.name)
        if field.name not in sections:
            yield (field.name,), value, field.type
        elif value is not None:
            for path, inner, kind in entries_of(value, {}):
                yield (field.name, *path), inner, kind


def _value(config: Any, name: str) -> Any:
    try:
        return getattr(config, name, None)
    except Exception:  # one that says that its layers differ in this
        return config.to_dict().get(name)


def values_of(config: Any, sections: Mapping[str, Any]) -> dict[Path, Any]:
    """The value of each entry that is the family's own."""
    return {path: value for path, value, _ in entries_of(config, sections)}


def defaults_of(config_class: Any, sections: Mapping[str, Any]) -> dict[Path, Any]:
    """What is taken for entries that a config, or a section that is there, does not state."""
    config = config_class()
    found: dict[Path, Any] = {
        path: value for path, value, _ in entries_of(config, sections) if len(path) == 1
    }
    for name in sections:
        section = getattr(config, name)
        if section is not None:
            own = entries_of(type(section)(), {})
            found |= {(name, *path): value for path, value, _ in own}
    return found


def small_sizes(config: Any, sections: Mapping[str, Any]) -> Iterator[tuple[Path, Any]]:
    """Small sizes, all different, for what is large by default."""
    size = 0
    for path, value, _ in entries_of(config, sections):
        name = path[-1]
        if isinstance(value, bool):
            yield path, value and name != _TIED
        elif name.endswith("_id") and isinstance(value, int):
            yield path, 0
        elif type(value) is not int or _UNSIZED.search(name):
            continue
        elif re.search(r"(num|^n)_.*layers|^depth$", name):
            yield path, min(value, _LAYERS)
        elif re.search(r"heads", name):
            yield path, 4 if re.search(r"key|kv", name) else 8
        elif re.search(r"(num|^n)_.*experts$", name):
            yield path, value if value < 4 else 6
        elif value > 16:
            size += 1
            yield path, 64 * size + (16 if re.search(r"dim|rank", name) else 0)


def other_values(
    config: Any, sections: Mapping[str, Any], defaults: Mapping[Path, Any]
) -> Iterator[tuple[Path, list[Any]]]:
    """Other values for each entry that a shape or a layer may follow from."""
    for path, value, kind in entries_of(config, sections):
        options = typing.get_args(kind) or (kind,)
        listed = any(typing.get_origin(option) is list for option in options)
        if path[-1] == _TIED:
            continue
        if isinstance(value, bool):
            yield path, [not value]
        elif type(value) is int and not _UNSIZED.search(path[-1]):
            yield path, [2 * value, value + 1, value // 2]
            if type(None) in options and defaults.get(path) is not None:
                yield path, [None]
        elif value is None and int in options and not _UNSIZED.search(path[-1]):
            yield path, [48]
        elif listed and not value:
            yield path, [[1, 3]]
        elif isinstance(value, list) and len(value) == 4 and listed:
            yield path, [value[:3] + value]
