"""Folders for mlx-lm: its config entries."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from carnice_build.checkpoint.generation import generation_entries
from carnice_build.checkpoint.json import to_json
from carnice_build.formats.scheme import Scheme
from carnice_build.formats.variant import Variant

if TYPE_CHECKING:
    from carnice_build.formats.mlx.format import MlxFormat


def mlx_files(knobs: MlxFormat, variant: Variant) -> dict[str, bytes]:
    """config.json, as `mlx_lm.convert` writes it."""
    return {"config.json": to_json(_config(knobs, variant))}


def _config(knobs: MlxFormat, variant: Variant) -> dict[str, Any]:
    """The model's config without vision, with the quantization, sorted by key.

    As mlx-lm does, `eos_token_id` follows generation_config.json.  When modules differ, every
    one is listed; mlx-lm writes a null group size there, we write the real one.
    """
    config = dict(variant.config)
    config.pop("vision_config", None)
    config.pop("_name_or_path", None)
    if ends := generation_entries(variant.copied).get("eos_token_id"):
        config["eos_token_id"] = ends
    whole = Scheme(knobs.config_bits or knobs.bits, knobs.group_size)
    quantization: dict[str, Any] = _section(whole)
    if any(scheme != whole for scheme in variant.quantized.values()):
        quantization |= {path: _section(scheme) for path, scheme in variant.quantized.items()}
    config["quantization"] = config["quantization_config"] = quantization
    return dict(sorted(config.items()))


def _section(scheme: Scheme) -> dict[str, Any]:
    return {"group_size": scheme.group_size, "bits": scheme.bits, "mode": "affine"}
