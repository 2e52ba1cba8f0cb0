"""Folders as llm-compressor saves them: compressed-tensors' config, and its own recipe.yaml."""

from __future__ import annotations

from carnice_build.checkpoint.json import to_json
from carnice_build.formats.compressed_config import arguments, compressed_config, recipe_file
from carnice_build.formats.exclusions import engine_names
from carnice_build.formats.variant import Variant

STORAGE = "float-quantized"
"""What compressed-tensors calls floats that are stored as such."""

_FLOAT8 = {"num_bits": 8, "type": "float", "symmetric": True, "group_size": None, "zp_dtype": None}

WEIGHTS = {**_FLOAT8, "strategy": "channel", "dynamic": False, "observer": "memoryless_minmax"}
INPUTS = {**_FLOAT8, "strategy": "token", "dynamic": True, "observer": None}


def fp8_files(variant: Variant) -> dict[str, bytes]:
    """config.json and recipe.yaml."""
    config = compressed_config(variant, STORAGE, arguments(WEIGHTS), arguments(INPUTS))
    return {"config.json": to_json(config), "recipe.yaml": _recipe(variant)}


def _recipe(variant: Variant) -> bytes:
    modifier = {
        "targets": ["Linear"],
        "ignore": engine_names(variant.architecture, variant.ignored),
        "scheme": "FP8_DYNAMIC",
        "bypass_divisibility_checks": False,
        "requires_calibration_data": False,
    }
    return recipe_file({"QuantizationModifier": modifier})
