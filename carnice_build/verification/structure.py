"""Check `structure`: the expected tensors and no other, as headers, index and config state them.

What is expected comes from the architecture's table and from the plan on the source's headers,
not from anything that the build wrote.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any

from carnice_build.architectures import architecture_of
from carnice_build.architectures.base import TensorFact
from carnice_build.checkpoint.checkpoint import INDEX_NAME
from carnice_build.errors import CheckpointError
from carnice_build.keys import canonical_json
from carnice_build.planning.planner import VariantPlan
from carnice_build.transforms.mlx import MlxFormat
from carnice_build.verification.folder import ModelFolder, read_object
from carnice_build.verification.result import Check, judged

NAME = "structure"


def check_structure(variant: VariantPlan, folder: ModelFolder) -> Check:
    """Compare names, dtypes and shapes with what the recipe makes of the source."""
    problems = [*folder.problems, *_tensors(variant, folder), *_index(folder)]
    if isinstance(variant.format, MlxFormat) and folder.config:
        problems += _mlx_config(folder)
    if problems and _other_recipe(variant, folder):
        problems.insert(0, "the folder was built from another recipe than this one; build it again")
    summary = f"{len(folder.tensors)} tensors in {len(folder.shards)} shards"
    return judged(NAME, problems, summary, {"tensors": len(folder.tensors)})


def _tensors(variant: VariantPlan, folder: ModelFolder) -> Iterator[str]:
    expected = {tensor.name: tensor.ref.spec for tensor in variant.conversion.tensors}
    for name, spec in expected.items():
        if name not in folder.tensors:
            yield f"tensor {name} is missing"
            continue
        found = folder.tensors[name].spec
        if found != spec:
            yield (
                f"tensor {name} is {found.dtype} {list(found.shape)} "
                f"instead of {spec.dtype} {list(spec.shape)}"
            )
    for name in folder.tensors:
        if name not in expected:
            yield f"tensor {name} in {folder.shard_of(name)} belongs to no module of the variant"


def _index(folder: ModelFolder) -> Iterator[str]:
    index = read_object(folder.path / INDEX_NAME)
    table = index.get("weight_map")
    if not isinstance(table, dict):
        yield f"{INDEX_NAME} is missing or has no weight_map"
        return
    for name in folder.tensors:
        if table.get(name) != folder.shard_of(name):
            yield f"{INDEX_NAME} puts {name} in {table.get(name)}, not {folder.shard_of(name)}"
    for name in table:
        if name not in folder.tensors:
            yield f"{INDEX_NAME} names {name}, which is in no shard"


def _other_recipe(variant: VariantPlan, folder: ModelFolder) -> bool:
    built_from = folder.record.get("recipe")
    return canonical_json(built_from) != canonical_json(variant.recipe.tree.plain())


def _mlx_config(folder: ModelFolder) -> Iterator[str]:
    """What config.json says, held against the tensors, as mlx-lm will when it loads the folder."""
    config = folder.config
    if not isinstance(config.get("quantization"), dict):
        yield "config.json has no section quantization"
        return
    if config["quantization"] != config.get("quantization_config"):
        yield "config.json: quantization and quantization_config differ"
    try:
        architecture = architecture_of(config, "config.json")
        facts = list(architecture.tensors.values())
    except CheckpointError as error:
        yield str(error)
        return
    for fact in facts:
        name = architecture.mlx_name(fact.name)
        if name is not None:
            yield from _module(folder, name, fact)
    for path, settings in config["quantization"].items():
        if isinstance(settings, dict) and f"{path}.scales" not in folder.tensors:
            yield f"config.json states bits for {path}, which is not quantized"


def _module(folder: ModelFolder, name: str, fact: TensorFact) -> Iterator[str]:
    module = name.rpartition(".")[0]
    if f"{module}.scales" in folder.tensors:
        yield from _quantized_module(folder, module, fact)
    elif name not in folder.tensors:
        yield f"config.json calls for {name}, which is in no shard"
    elif folder.tensors[name].spec.size != prod(fact.shape):
        yield f"config.json calls for {name} of {prod(fact.shape)} elements"


def _quantized_module(folder: ModelFolder, module: str, fact: TensorFact) -> Iterator[str]:
    parts = [folder.tensors.get(f"{module}.{part}") for part in ("weight", "scales", "biases")]
    shapes = [part.spec.shape if part else () for part in parts]
    if any(len(shape) != 2 for shape in shapes):
        yield f"module {module} lacks a weight, scales or biases of two dimensions"
        return
    rows, columns = fact.shape
    settings = folder.settings(module)
    bits, group = settings.get("bits"), settings.get("group_size")
    if not _fits(rows, columns, bits, group, shapes[0], shapes[1]) or shapes[1] != shapes[2]:
        yield (
            f"config.json states {bits} bits in groups of {group} for {module} "
            f"[{rows}, {columns}], but its weight is {list(shapes[0])} "
            f"and its scales are {list(shapes[1])}"
        )
    if settings.get("mode", "affine") != "affine":
        yield f"config.json states mode {settings['mode']!r} for {module}"


def _fits(
    rows: int, columns: int, bits: Any, group: Any, weight: tuple[int, ...], scales: tuple[int, ...]
) -> bool:
    if type(bits) is not int or type(group) is not int:
        return False
    packed = (rows, columns * bits // 32)
    return weight == packed and scales[0] == rows and scales[1] * group == columns
