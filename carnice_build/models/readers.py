"""How a config.json is read, and the one spelling in which it is published.

Most families are read as they are spelled; one that has several spellings brings code of its own,
which its table names (`reader`).
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from functools import cached_property
from typing import Any, Protocol

from carnice_build.models.base import QUANTIZATION, ConfigReader, Part
from carnice_build.models.table_schema import Table


class Reader(Protocol):
    """A config.json of a family; a missing or ill-typed entry is a CheckpointError.

    `root` and `text` are its sections as they are; `tied` says whether the head is the embedding.
    """

    root: ConfigReader
    text: ConfigReader
    dtype: str | None
    tied: bool

    @property
    def text_entries(self) -> Mapping[str, Any]:
        """The entries that describe the text model, in the one spelling.

        Null is not silence: transformers then takes no default.
        """

    def published(self, parts: Container[Part]) -> dict[str, Any]:
        """See `Architecture.published_config`."""


class PlainReader:
    """A config that goes out as it came in, but for what its folder does not hold."""

    def __init__(self, config: Mapping[str, Any], where: str, table: Table) -> None:
        """Read `config`, found at `where`."""
        self._table = table
        self.root = root = ConfigReader(config, where)
        section = table.text.section
        nested = section is not None and root.states(section)
        self.text = root.section(section) if section and nested else root
        self.dtype = stated_type(root) or stated_type(self.text)
        self.tied = self._tied()

    def _tied(self) -> bool:
        """The root decides, as in transformers; where it is silent, the text section."""
        by_text = self.text.flag("tie_word_embeddings", self._table.tied)
        return self.root.flag("tie_word_embeddings", by_text)

    @cached_property
    def text_entries(self) -> Mapping[str, Any]:
        """The section as it is."""
        return self.text.entries

    def published(self, parts: Container[Part]) -> dict[str, Any]:
        """As it is, without an MTP head that the folder does not hold, and not quantized."""
        text = without_quantization(self.text)
        entries = self._table.mtp_entries
        known = {*text, *self._table.defaults}
        if Part.MTP not in parts and not known.isdisjoint(entries):
            # Another name for the first would contradict it.
            text = {key: text[key] for key in text if key not in entries[1:]}
            text[entries[0]] = 0
        if self.text is self.root:
            return text
        return {**without_quantization(self.root), str(self._table.text.section): text}


def stated_type(section: ConfigReader) -> str | None:
    """The type of the weights; transformers 4 called the entry `torch_dtype`."""
    return section.text("dtype", "") or section.text("torch_dtype", "") or None


def without_quantization(section: ConfigReader) -> dict[str, Any]:
    """The entries of `section` but what says how weights were quantized."""
    return {key: value for key, value in section.entries.items() if key not in QUANTIZATION}
