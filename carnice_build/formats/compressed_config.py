"""What the formats of compressed-tensors have in common: files beside the weights, and checks."""

from __future__ import annotations

import re
from collections.abc import Collection, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from carnice_build.formats.exclusions import (
    engine_names,
    ignore_problems,
    modules_of,
    plain_modules,
)
from carnice_build.formats.folder import ModelFolder, section
from carnice_build.formats.kv_cache import scale_problems
from carnice_build.formats.statements import names, statements, states
from carnice_build.formats.variant import Variant
from carnice_build.models.base import LINEARS, Architecture, Part

VERSION = "0.19.0"
"""The version of compressed-tensors whose format the files are in."""

METHOD = "compressed-tensors"
"""What config.json calls all that the library writes."""

SCALES = "{attention}.{part}_scale"
"""What the scales of a cache are called."""

_MIXED = "mixed-precision"
_PARTS = ("weights", "input_activations")

_ARGUMENTS: Mapping[str, Any] = {
    "actorder": None,
    "block_structure": None,
    "observer_kwargs": {},
    "scale_dtype": None,
}


def arguments(given: Mapping[str, Any]) -> dict[str, Any]:
    """A scheme with every entry that compressed-tensors writes."""
    return {**_ARGUMENTS, **given}


@dataclass(frozen=True)
class Stated:
    """What config.json says of a group of modules.

    `storage` is the library's name of the way in which weights are stored; `weights` and `inputs`
    are its arguments, `targets` the names or classes of the modules.
    """

    storage: str
    weights: Mapping[str, Any]
    inputs: Mapping[str, Any] | None = None
    targets: Sequence[str] = ("Linear",)

    def entry(self) -> dict[str, Any]:
        """The entry of `config_groups`."""
        return {
            "format": self.storage,
            "input_activations": self.inputs and dict(sorted(self.inputs.items())),
            "output_activations": None,
            "targets": list(self.targets),
            "weights": dict(sorted(self.weights.items())),
        }


def compressed_config(
    variant: Variant,
    storage: str,
    weights: Mapping[str, Any],
    input_activations: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """config.json of a folder whose quantized linears all have one scheme; see `Stated`."""
    return grouped_config(variant, [Stated(storage, weights, input_activations)])


def grouped_config(
    variant: Variant, groups: Sequence[Stated], kv_cache: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """config.json of a folder whose quantized linears are in one of `groups` each.

    `kv_cache` is the scheme of the cache whose scales are there, None without any.
    """
    return {
        **variant.config,
        "quantization_config": {
            "config_groups": {
                f"group_{number}": group.entry() for number, group in enumerate(groups)
            },
            "format": _flattened(groups),
            "global_compression_ratio": None,
            "ignore": engine_names(variant.architecture, variant.ignored),
            "kv_cache_scheme": kv_cache and dict(sorted(kv_cache.items())),
            "quant_method": METHOD,
            "quantization_status": "compressed",
            "sparsity_config": {},
            "transform_config": {},
            "version": VERSION,
        },
    }


def _flattened(groups: Sequence[Stated]) -> str:
    """What the library calls a folder with all of these storages."""
    storages = {group.storage for group in groups}
    if len(storages) > 1:
        return _MIXED
    return next(iter(storages), "dense")


def stored_as(config: Mapping[str, Any], storage: str) -> bool:
    """True when config.json is that of a folder whose weights are stored as `storage`."""
    return states(
        section(config, "quantization_config"), {"quant_method": METHOD, "format": storage}
    )


def config_problems(
    folder: ModelFolder,
    architecture: Architecture,
    storage: str,
    weights: Mapping[str, Any],
    input_activations: Mapping[str, Any] | None = None,
) -> Iterator[str]:
    """What config.json states otherwise than one scheme for all that it does not list."""
    return grouped_problems(folder, architecture, [Stated(storage, weights, input_activations)])


def grouped_problems(
    folder: ModelFolder,
    architecture: Architecture,
    groups: Sequence[Stated],
    kv_cache: Mapping[str, Any] | None = None,
) -> Iterator[str]:
    """What config.json states otherwise than `groups`, and plain linears that it does not list.

    `groups` are in the order of config.json, which is that of the model.
    And what is wrong with the scales of a cache of which it says `kv_cache`.
    This format's engines look for the parts of a fused linear, so none is listed.
    """
    stated = section(folder.config, "quantization_config")
    wanted = {"quant_method": METHOD, "format": _flattened(groups)}
    yield from statements("config.json", stated, wanted)
    entries = section(stated, "config_groups")
    if len(entries) != len(groups):
        yield f"config.json has {len(entries)} groups instead of {len(groups)}"
    for name, group in zip(entries, groups, strict=False):
        entry = section(entries, name)
        yield from statements("config.json", section(entry, "weights"), group.weights)
        yield from statements(
            "config.json", section(entry, "input_activations"), group.inputs or {}
        )
    if kv_cache:
        yield from statements("config.json", section(stated, "kv_cache_scheme"), kv_cache)
        yield from scale_problems(folder, architecture, SCALES)
    ignore = names(stated.get("ignore"))
    yield from ignore_problems(folder, architecture, ignore, LINEARS, fused=False)


def recipe_file(modifiers: Mapping[str, Any]) -> bytes:
    """recipe.yaml: what llm-compressor writes of the modifiers that would give a folder."""
    import yaml

    stage = {"default_stage": {"default_modifiers": dict(modifiers)}}
    return yaml.safe_dump(stage, sort_keys=False, allow_unicode=True, width=100).encode()


def ignored_modules(architecture: Architecture, quantized: Container[str]) -> list[str]:
    """What llm-compressor lists as unquantized: each linear, and an MTP head by one pattern.

    Its engines look for the parts of a fused linear, so no fused name is listed.
    """
    head = [fact for fact in architecture.built.values() if fact.part is Part.MTP]
    plain = plain_modules(architecture, quantized, LINEARS)
    modules = {module for fact in head for module in modules_of(fact)}
    listed = [module for module in plain if module not in modules]
    return [*listed, *_pattern(modules)]


def _pattern(modules: Collection[str]) -> list[str]:
    """One pattern for all of an MTP head: of what its modules begin with and no other does."""
    if not modules:
        return []
    paths = [module.split(".") for module in modules]
    shared = [names[0] for names in zip(*paths, strict=False) if len(set(names)) == 1]
    # A head that is one layer more of the model must not be taken for the layers before it.
    return [f"re:^{shared[0]}.*" if len(shared) == 1 else f"re:^{re.escape('.'.join(shared))}\\..*"]
