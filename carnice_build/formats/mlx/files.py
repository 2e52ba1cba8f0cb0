"""Folders for mlx-lm: its config entries, and a model card that says how to run the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from carnice_build.checkpoint.generation import generation_entries
from carnice_build.checkpoint.json import to_json
from carnice_build.formats.card import render_card
from carnice_build.formats.variant import Variant


class MlxPackager:
    """Writes config.json as `mlx_lm.convert` does, and README.md."""

    def files(self, variant: Variant) -> dict[str, bytes]:
        """config.json and README.md."""
        return {
            "config.json": to_json(mlx_config(variant)),
            "README.md": render_card("mlx.md.j2", variant, library="mlx", tags=("mlx",)),
        }


def mlx_config(variant: Variant) -> dict[str, Any]:
    """The model's config without vision, with the quantization, sorted by key.

    As mlx-lm does, `eos_token_id` follows generation_config.json.  When modules differ, every
    one is listed; mlx-lm writes a null group size there, we write the real one.
    """
    config = dict(variant.config)
    config.pop("vision_config", None)
    config.pop("_name_or_path", None)
    if ends := generation_entries(variant.copied).get("eos_token_id"):
        config["eos_token_id"] = ends
    quantization = dict(variant.defaults)
    if not _uniform(variant.quantized, variant.defaults):
        quantization |= variant.quantized
    config["quantization"] = config["quantization_config"] = quantization
    return dict(sorted(config.items()))


def _uniform(modules: Mapping[str, Mapping[str, Any]], defaults: Mapping[str, Any]) -> bool:
    return all(settings == defaults for settings in modules.values())
