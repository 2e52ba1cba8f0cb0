"""Check `structure`: the expected tensors and no other, and the small files that engines read.

Tensors are as headers, index and config state them.
What is expected comes from the architecture's table and from the plan on the source's headers,
not from anything that the build wrote.
"""

from __future__ import annotations

from collections.abc import Iterator

from carnice_build.checkpoint.checkpoint import INDEX_NAME
from carnice_build.checkpoint.containers import has_index
from carnice_build.errors import CheckpointError
from carnice_build.formats.checks import FormatChecks
from carnice_build.formats.folder import ModelFolder, read_object
from carnice_build.keys import canonical_json
from carnice_build.models import architecture_of
from carnice_build.models.base import Architecture, Part
from carnice_build.planning.planner import VariantPlan
from carnice_build.verification.result import Check, judged
from carnice_build.verification.small_files import small_file_problems

NAME = "structure"


def check_structure(variant: VariantPlan, folder: ModelFolder, checks: FormatChecks) -> Check:
    """Compare names, dtypes and shapes with what the recipe makes of the source.

    `checks` knows what the format's config must say.
    """
    problems = [*folder.problems, *_tensors(variant, folder), *_index(folder)]
    for pack in variant.packs:
        if pack.name in folder.shards:
            problems += checks.pack_problems(pack, folder.path)
    if folder.config:
        problems += _config(variant, folder, checks)
    problems += small_file_problems(variant, folder.path)
    if problems and _other_recipe(variant, folder):
        problems.insert(0, "the folder was built from another recipe than this one; build it again")
    tensors = sum(map(len, folder.shards.values()))
    summary = f"{tensors} tensors in {len(folder.shards)} shards"
    return judged(NAME, problems, summary, {"tensors": tensors})


def _tensors(variant: VariantPlan, folder: ModelFolder) -> Iterator[str]:
    expected = dict(pair for tensor in variant.conversion.tensors for pair in tensor.members)
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
    if not has_index(folder.shards):
        return
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


def _config(variant: VariantPlan, folder: ModelFolder, checks: FormatChecks) -> Iterator[str]:
    try:
        architecture = _described(variant, folder)
        yield from checks.config_problems(folder, architecture)
        yield from _head(variant, architecture)
    except CheckpointError as error:
        yield str(error)


def _described(variant: VariantPlan, folder: ModelFolder) -> Architecture:
    """What config.json describes, or where nobody knows that, what the source has."""
    if not variant.architecture.tabled:
        return variant.architecture
    return architecture_of(folder.config, "config.json")


def _head(variant: VariantPlan, architecture: Architecture) -> Iterator[str]:
    """A config that announces an MTP head that is not there, or hides one that is."""
    announced = any(fact.part is Part.MTP for fact in architecture.tensors.values())
    held = any(tensor.fact.part is Part.MTP for tensor in variant.conversion.tensors)
    if announced and not held:
        yield "config.json announces an MTP head, and the folder has none"
    if held and not announced:
        yield "config.json announces no MTP head, and the folder has one"
