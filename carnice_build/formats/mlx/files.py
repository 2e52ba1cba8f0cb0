"""Folders for mlx-lm: its config entries."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from carnice_build.checkpoint.generation import generation_entries
from carnice_build.checkpoint.json import to_json
from carnice_build.formats.mlx.entries import with_entries
from carnice_build.formats.scheme import Scheme
from carnice_build.formats.variant import Variant

if TYPE_CHECKING:
    from carnice_build.formats.mlx.format import MlxFormat


def mlx_files(knobs: MlxFormat, variant: Variant) -> dict[str, bytes]:
    """config.json, as `mlx_lm.convert` writes it."""
    return {"config.json": to_json(_config(knobs, variant))}


def _config(knobs: MlxFormat, variant: Variant) -> dict[str, Any]:
    """The model's config without vision, with the quantization, sorted by key.

    As mlx-lm does, `eos_token_id` follows generation_config.json.  Where every module is listed,
    mlx-lm writes a null group size; we write the real one.
    """
    config = with_entries(variant.config, variant.stated["entries"])
    config.pop("vision_config", None)
    config.pop("_name_or_path", None)
    if ends := generation_entries(variant.copied).get("eos_token_id"):
        config["eos_token_id"] = ends
    quantization = {**variant.stated["whole"], **variant.stated["modules"]}
    config["quantization"] = config["quantization_config"] = quantization
    return dict(sorted(config.items()))


def section_of(scheme: Scheme) -> dict[str, Any]:
    """What config.json says of a module that is stored so."""
    return {"group_size": scheme.group_size, "bits": scheme.bits, "mode": "affine"}
