"""Folders for mlx-lm and mlx-vlm: their config entries."""

from __future__ import annotations

from typing import Any

from carnice_build.checkpoint.generation import generation_entries
from carnice_build.checkpoint.json import to_json
from carnice_build.formats.mlx.entries import with_entries
from carnice_build.formats.mlx.modes import AFFINE, mode_of
from carnice_build.formats.mlx.target import Target
from carnice_build.formats.scheme import Scheme
from carnice_build.formats.variant import Variant


def mlx_files(library: Target, variant: Variant) -> dict[str, bytes]:
    """config.json, as the library's `convert` writes it."""
    return {"config.json": to_json(_config(library, variant))}


def _config(library: Target, variant: Variant) -> dict[str, Any]:
    """The model's config with the quantization, sorted by key.

    Where every module is listed, mlx-lm writes a null group size; we write the real one.
    """
    config = with_entries(variant.config, variant.stated["entries"])
    config.pop("_name_or_path", None)
    settings = generation_entries(variant.copied)
    if library is Target.MLX_LM:
        config.pop("vision_config", None)
        if ends := settings.get("eos_token_id"):
            config["eos_token_id"] = ends
    else:
        config.pop("torch_dtype", None)
        config.setdefault("vision_config", {})
        if settings:
            config["generation_config"] = settings
        config |= {key: settings[key] for key in _GENERATION if key in settings}
    quantization = {**variant.stated["whole"], **variant.stated["modules"]}
    config["quantization"] = config["quantization_config"] = quantization
    return dict(sorted(config.items()))


_GENERATION = ("eos_token_id", "temperature", "top_p", "top_k", "do_sample")
"""What mlx-vlm repeats of generation_config.json."""


def short_section(scheme: Scheme) -> dict[str, Any]:
    """As `section_of`, without the mode affine: so mlx-vlm says it of a single module."""
    section = section_of(scheme)
    return {key: value for key, value in section.items() if (key, value) != ("mode", AFFINE)}


def section_of(scheme: Scheme) -> dict[str, Any]:
    """What config.json says of a module that is stored so."""
    return {"group_size": scheme.group_size, "bits": scheme.bits, "mode": mode_of(scheme)}
