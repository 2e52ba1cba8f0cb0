"""How a config.json of Qwen3.5 is read, and the one spelling in which it is published.

It is read as its owner reads it, transformers 5 (`Qwen3_5Config` and what is below it), whatever
version wrote it, and published so that transformers, mlx-lm and vLLM read the same out of it: a
model that is spelled in two ways gives one folder.
"""

from __future__ import annotations

import json
from collections.abc import Container, Mapping
from functools import cached_property
from typing import Any

from carnice_build.errors import CheckpointError, nearest
from carnice_build.models.base import MOST_LAYERS, QUANTIZATION, ConfigReader, Part
from carnice_build.models.readers import stated_type
from carnice_build.models.table_schema import Table

_KINDS = {"full_attention": "full", "linear_attention": "linear"}
_LEGACY = {"attention": "full_attention", "mamba": "linear_attention", "conv": "linear_attention"}
"""Kinds of layers as transformers once called them (`remap_legacy_layer_types`)."""

_ROPE, _ROTATED = "rope_parameters", "partial_rotary_factor"

_NAMES = {ours: theirs for theirs, ours in _KINDS.items()}

_INTERVAL = 4
_THETA = 10_000.0
_ROTATED_SHARE = 0.25
"""What transformers takes where a config is silent."""

_RESPELLED = ("rope_theta", "rope_scaling", "full_attention_interval")


class Qwen35Config:
    """A config.json of the family; a missing or ill-typed entry is a CheckpointError."""

    def __init__(self, config: Mapping[str, Any], where: str, _: Table) -> None:
        """Read `config`, found at `where`."""
        root = self.root = ConfigReader(config, where)
        self.text = root.section("text_config") if root.states("text_config") else root
        # Whether there is a tower is asked often; that it is described by a section, here.
        root.optional_section("vision_config")
        self.num_layers = self.text.count("num_hidden_layers", most=MOST_LAYERS)
        self.mtp_layers = self.text.count("mtp_num_hidden_layers", 0, least=0, most=MOST_LAYERS)
        self.dtype = stated_type(self.root) or stated_type(self.text)
        self.kinds = self._kinds()
        self.tied = self._tied()
        self.rope = self._rope()

    def _kinds(self) -> tuple[str, ...]:
        stated = self.text.texts("layer_types", ())
        if not stated:
            return _pattern(self._stated_interval(), self.num_layers)
        if len(stated) != self.num_layers:
            raise self.text.error("layer_types", f"{self.num_layers} entries")
        return tuple(_kind(self.text, index, name) for index, name in enumerate(stated))

    def _stated_interval(self) -> int:
        return self.text.count("full_attention_interval", _INTERVAL)

    @cached_property
    def interval(self) -> int | None:
        """The n of which every n-th layer is of full attention; None when there is no such n."""
        first = self.kinds.index("full") + 1 if "full" in self.kinds else self._stated_interval()
        return first if _pattern(first, self.num_layers) == self.kinds else None

    def _tied(self) -> bool:
        """Whether the head is the embedding.

        The root decides: transformers ties by it alone, and saves it there.
        Where the root is silent, the text section is asked, as mlx-lm and vLLM do: transformers
        itself would give a checkpoint that older versions saved so a head of random numbers.
        """
        return self.root.flag("tie_word_embeddings", self.text.flag("tie_word_embeddings", False))

    def _rope(self) -> dict[str, Any]:
        """As transformers' `convert_rope_params_to_dict` puts together what stands apart."""
        text = self.text
        stated = text.optional_section("rope_scaling") or text.optional_section(_ROPE)
        rope = ConfigReader(stated, f"{text.where}: {_ROPE}")
        return {key: value for key, value in stated.items() if key != "type"} | {
            "rope_type": rope.text("rope_type", rope.text("type", "default")),
            "rope_theta": rope.number("rope_theta", text.number("rope_theta", _THETA)),
            _ROTATED: rope.number(_ROTATED, text.number(_ROTATED, _ROTATED_SHARE)),
        }

    @cached_property
    def text_entries(self) -> dict[str, Any]:
        """The entries that describe the text model, in the one spelling."""
        entries = {key: value for key, value in _kept(self.text).items() if key not in _RESPELLED}
        entries |= {
            "layer_types": [_NAMES[kind] for kind in self.kinds],
            "mtp_num_hidden_layers": self.mtp_layers,
            _ROTATED: self.rope[_ROTATED],
            _ROPE: self.rope,
            "tie_word_embeddings": self.tied,
        }
        if self.interval is not None:
            # All that mlx-lm asks of the kinds of layers.
            entries["full_attention_interval"] = self.interval
        return entries

    def published(self, parts: Container[Part]) -> dict[str, Any]:
        """See `Architecture.published_config`."""
        text = dict(self.text_entries)
        if Part.MTP not in parts:
            text["mtp_num_hidden_layers"] = 0
        whole = text
        if self.text is not self.root:
            whole = _kept(self.root) | {"tie_word_embeddings": self.tied, "text_config": text}
        return _sorted(whole)


def _pattern(interval: int, layers: int) -> tuple[str, ...]:
    return tuple("linear" if (layer + 1) % interval else "full" for layer in range(layers))


def _kind(text: ConfigReader, index: int, name: str) -> str:
    kind = _KINDS.get(_LEGACY.get(name, name))
    if kind is None:
        raise CheckpointError(
            f"config entry layer_types[{index}] is {name!r}",
            where=text.where,
            expected=" or ".join(_KINDS),
            nearest=nearest(name, _KINDS),
        )
    return kind


def _kept(section: ConfigReader) -> dict[str, Any]:
    """The entries of a section under their names of today, without those that state nothing."""
    entries = dict(section.entries)
    if "torch_dtype" in entries:
        entries["dtype"] = stated_type(section)
        del entries["torch_dtype"]
    void = {key for key in QUANTIZATION if not entries.get(key)}
    void |= {key for key in ("dtype", "eos_token_id") if entries.get(key) is None}
    return {key: value for key, value in entries.items() if key not in void}


def _sorted(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` with the keys of every object in order, as transformers writes it."""
    # By the encoder, which unlike Python's stack holds any nesting that the parser let through.
    return dict(json.loads(json.dumps(config, sort_keys=True)))
