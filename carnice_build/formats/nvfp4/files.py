"""Folders as NVIDIA ModelOpt exports them: hf_quant_config.json and its twin in config.json."""

from __future__ import annotations

from typing import Any

from carnice_build.checkpoint.json import to_json
from carnice_build.formats.nvfp4.ops import BLOCK
from carnice_build.formats.variant import Variant

PRODUCER = {"name": "modelopt", "version": "0.47.0"}
"""Whose format the files are in; engines tell it by this name."""


def modelopt_files(variant: Variant) -> dict[str, bytes]:
    """config.json and hf_quant_config.json.

    Modules are spelled as the checkpoint's tensors: so the library spells them, turning the names
    of transformers back, and its engines read them so.
    """
    ignore = list(variant.ignored)
    return {
        "config.json": to_json(_config(variant, ignore)),
        "hf_quant_config.json": to_json(_quantization(ignore)),
    }


def _quantization(ignore: list[str]) -> dict[str, Any]:
    return {
        "producer": PRODUCER,
        "quantization": {
            "quant_algo": "NVFP4",
            "kv_cache_quant_algo": None,
            "group_size": BLOCK,
            "exclude_modules": ignore,
        },
    }


def _config(variant: Variant, ignore: list[str]) -> dict[str, Any]:
    """The model's config with its quantization."""
    numbers = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": BLOCK}
    return {
        **variant.config,
        "quantization_config": {
            "config_groups": {
                "group_0": {
                    "input_activations": numbers,
                    "weights": numbers,
                    "targets": ["Linear"],
                }
            },
            "ignore": ignore,
            "quant_algo": "NVFP4",
            "producer": PRODUCER,
            "quant_method": "modelopt",
        },
    }
