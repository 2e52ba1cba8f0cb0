"""Folders as llm-compressor saves them: compressed-tensors' config, and its own recipe.yaml."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from carnice_build.checkpoint.json import to_json
from carnice_build.formats.compressed_config import grouped_config, recipe_file
from carnice_build.formats.compressed_tensors.schemes import ConfigGroup
from carnice_build.formats.exclusions import plain_modules
from carnice_build.formats.variant import Variant
from carnice_build.models.base import LINEARS
from carnice_build.recipe.patterns import Patterns, expression
from carnice_build.tensors import STACK

if TYPE_CHECKING:
    from carnice_build.formats.compressed_tensors.format import CompressedFormat

_NUMBER = r"\d+"


def compressed_files(knobs: CompressedFormat, variant: Variant) -> dict[str, bytes]:
    """config.json and recipe.yaml."""
    return {
        "config.json": to_json(
            grouped_config(variant, variant.stated["groups"], knobs.kv_cache_scheme)
        ),
        "recipe.yaml": _recipe(knobs, variant),
    }


def _recipe(knobs: CompressedFormat, variant: Variant) -> bytes:
    modifiers: dict[str, Any] = {}
    if knobs.smoothing:
        modifiers["AWQModifier"] = {
            "requires_calibration_data": True,
            "mappings": _mappings(variant),
            "duo_scaling": knobs.smoothing.duo_scaling,
            "n_grid": knobs.smoothing.n_grid,
        }
    quantization = {
        **_schemes(knobs),
        **({"kv_cache_scheme": knobs.kv_cache_scheme} if knobs.kv_cache_scheme else {}),
        "targets": _spelled(knobs.targets),
        "ignore": _ignored(knobs, variant),
        "bypass_divisibility_checks": False,
        "requires_calibration_data": knobs.calibrates or bool(knobs.compensating),
    }
    if knobs.compensating:
        own = knobs.compensating.model_dump(include={"block_size", "dampening_frac", "actorder"})
        modifiers["GPTQModifier"] = {**quantization, **own, "batched_quantization": "auto"}
    else:
        modifiers["QuantizationModifier"] = quantization
    return recipe_file(modifiers)


def _schemes(knobs: CompressedFormat) -> dict[str, Any]:
    if isinstance(knobs.scheme, str):
        return {"scheme": knobs.scheme}
    if knobs.scheme is not None:
        return {"scheme": {name: _spelled(found) for name, found in knobs.scheme.items()}}
    groups = knobs.config_groups or {}
    return {"config_groups": {name: _group(knobs, group) for name, group in groups.items()}}


def _group(knobs: CompressedFormat, group: ConfigGroup) -> dict[str, Any]:
    stated = knobs.stated(group)
    return {
        "targets": _spelled(group.targets),
        "weights": dict(stated.weights),
        "input_activations": stated.inputs and dict(stated.inputs),
        "output_activations": None,
        "format": None,
    }


def _spelled(targets: list[str]) -> list[str]:
    return [expression(target) for target in targets]


def _ignored(knobs: CompressedFormat, variant: Variant) -> list[str]:
    """The patterns of the recipe, and what they do not match of modules that stay.

    The library looks for them in a model of transformers, which may respell them.
    """
    patterns, architecture = Patterns(knobs.ignore), variant.architecture
    left = [
        name
        for module in plain_modules(architecture, variant.quantized, LINEARS)
        for name in architecture.engine_names(module)[:1]
        if not patterns.matches(name)
    ]
    return [*_spelled(knobs.ignore), *left]


def _mappings(variant: Variant) -> list[dict[str, Any]]:
    """The mappings of this model as the library takes them.

    Those of some layers alone name these by their numbers, as the library's own do, and so do all
    of a model with experts: beside a router, or in two kinds of layers, the last word of a name
    does not tell modules apart.
    """
    architecture = variant.architecture
    modules = {fact.module for fact in architecture.tensors.values()}
    layers = range(architecture.num_layers)
    mappings = []
    for mapping in architecture.smoothing:
        names = (mapping.smooth, *mapping.balance)
        found = [
            str(layer)
            for layer in layers
            if modules.issuperset(architecture.layer_prefix(layer) + name for name in names)
        ]
        if not found:
            continue
        if len(found) == len(layers) and not any(STACK in module for module in modules):
            smooth, *balance = (f"re:.*{name.rpartition('.')[2]}$" for name in names)
        else:
            smooth, *balance = (f"{name.replace(STACK, _NUMBER)}$" for name in names)
            smooth = f"re:.*layers\\.({'|'.join(found)})\\.{smooth}"
            balance = [f"re:.*{name}" for name in balance]
        mappings.append(
            {"smooth_layer": smooth, "balance_layers": balance, "activation_hook_target": None}
        )
    return mappings
