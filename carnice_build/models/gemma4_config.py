"""How a config.json of Gemma 4 is read, and the one spelling in which it is published.

What the layers of full attention have for themselves, published configs state in
`global_head_dim` and `num_global_key_value_heads`; transformers 5 saves it by layer, in
`per_layer_config`, which nobody else reads.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from functools import cached_property
from typing import Any

from carnice_build.models.base import Part
from carnice_build.models.readers import PlainReader

_BY_LAYER = "per_layer_config"
_NAMES = {"head_dim": "global_head_dim", "num_key_value_heads": "num_global_key_value_heads"}


class Gemma4Config(PlainReader):
    """A config.json of the family; a missing or ill-typed entry is a CheckpointError."""

    @cached_property
    def text_entries(self) -> Mapping[str, Any]:
        """The section as published."""
        return self._respelled(super().text_entries)

    def published(self, parts: Container[Part]) -> dict[str, Any]:
        """See `Architecture.published_config`."""
        config = super().published(parts)
        if self.text is self.root:
            return self._respelled(config)
        return {**config, "text_config": self._respelled(config["text_config"])}

    def _respelled(self, entries: Mapping[str, Any]) -> dict[str, Any]:
        result = {key: value for key, value in entries.items() if key != _BY_LAYER}
        layers = list(self.text.optional_section(_BY_LAYER).values())
        if not layers:
            return result
        if any(layer != layers[0] or not isinstance(layer, dict) for layer in layers):
            raise self.text.error(_BY_LAYER, "the same for all layers of full attention")
        stated = {_NAMES[key]: value for key, value in layers[0].items() if key in _NAMES}
        return {**result, **stated}
