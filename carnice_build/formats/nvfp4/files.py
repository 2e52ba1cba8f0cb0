"""Folders as NVIDIA ModelOpt exports them: hf_quant_config.json and its twin in config.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from carnice_build.checkpoint.json import to_json
from carnice_build.formats.nvfp4.algorithms import ALGORITHMS, MIXED
from carnice_build.formats.variant import Variant

PRODUCER = {"name": "modelopt", "version": "0.47.0"}
"""Whose format the files are in; engines tell it by this name."""

DEFAULT = "quant_algo"
"""Of `Conversion.stated`: the algorithm where no rule says otherwise."""

LAYERS = "quantized_layers"
"""Of `Conversion.stated` and of both files: the name of the algorithm of each quantized module."""


KV_CACHE_SCHEME = {"dynamic": False, "num_bits": 8, "type": "float"}
"""What config.json says of a cache of FP8."""

SCALES = "{attention}.{part}_proj.{part}_scale"
"""What its scales are called."""


def modelopt_files(variant: Variant, kv_cache: bool = False) -> dict[str, bytes]:
    """config.json and hf_quant_config.json; `kv_cache` says that there are scales for one of FP8.

    Modules are spelled as the checkpoint's tensors: so the library spells them, turning the names
    of transformers back, and its engines read them so.
    """
    layers = variant.stated[LAYERS]
    name, *others = {*layers.values()} or {variant.stated[DEFAULT]}
    said = _mixed(layers) if others else _uniform(name, variant.ignored)
    twin = {
        "quant_algo": said["quant_algo"],
        "kv_cache_quant_algo": "FP8" if kv_cache else None,
        **said,
    }
    return {
        "config.json": to_json({**variant.config, "quantization_config": _config(said, kv_cache)}),
        "hf_quant_config.json": to_json({"producer": PRODUCER, "quantization": twin}),
    }


def _uniform(name: str, ignore: Sequence[str]) -> dict[str, Any]:
    """A folder of one algorithm names the modules that are plain."""
    return {**ALGORITHMS[name].of_layer, "exclude_modules": list(ignore)}


def _mixed(layers: Mapping[str, str]) -> dict[str, Any]:
    """A folder of several names the modules that are quantized, and no others."""
    of_layers = {module: ALGORITHMS[name].of_layer for module, name in layers.items()}
    return {"quant_algo": MIXED, LAYERS: of_layers}


def mixed_groups(layers: Mapping[str, str]) -> dict[str, Any]:
    """The config groups of modules, of each of which the algorithm's name is given."""
    targets: dict[str, list[str]] = {}
    for module, algorithm in layers.items():
        targets.setdefault(algorithm, []).append(module)
    return {
        f"group_{index}": {**ALGORITHMS[algorithm].group, "targets": sorted(modules)}
        for index, (algorithm, modules) in enumerate(targets.items())
    }


def _config(said: Mapping[str, Any], kv_cache: bool) -> dict[str, Any]:
    """The `quantization_config` that says the same, as the library derives it."""
    name = said["quant_algo"]
    groups: dict[str, Any] = {}
    if name != MIXED and ALGORITHMS[name].grouped:
        groups = {"group_0": {**ALGORITHMS[name].group, "targets": ["Linear"]}}
    elif name == MIXED:
        groups = mixed_groups({module: item["quant_algo"] for module, item in said[LAYERS].items()})
    return {
        **({"config_groups": groups} if groups else {}),
        **({LAYERS: said[LAYERS]} if name == MIXED else {}),
        "ignore": said.get("exclude_modules", []),
        "quant_algo": name,
        **({"kv_cache_scheme": KV_CACHE_SCHEME} if kv_cache else {}),
        "producer": PRODUCER,
        "quant_method": "modelopt",
    }
