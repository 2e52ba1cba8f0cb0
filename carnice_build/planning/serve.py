"""How a variant will be served: facts that follow from what is packaged, checked before a build."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import NoneType
from typing import NamedTuple

from carnice_build.chat.files import template_files
from carnice_build.chat.special_tokens import special_tokens
from carnice_build.chat.tool_format import tool_format
from carnice_build.checkpoint.containers import SOUND, is_statistics
from carnice_build.checkpoint.generation import generation_entries, sampling
from carnice_build.checkpoint.gguf_header import SUFFIX
from carnice_build.errors import PlanError
from carnice_build.formats.base import Conversion, Format
from carnice_build.formats.layout import PackLayout
from carnice_build.models.base import Architecture, Part
from carnice_build.planning.sharding import sharding_of
from carnice_build.plugins import failures_blamed, returned
from carnice_build.recipe.loader import Recipe
from carnice_build.serving.facts import ServingFacts
from carnice_build.serving.profile import Serving
from carnice_build.serving.rules import plan_launches


def plan_serving(
    recipe: Recipe,
    architecture: Architecture,
    conversion: Conversion,
    files: Mapping[str, bytes],
    packs: Sequence[PackLayout],
) -> ServingFacts:
    """What the launches of `package.serve` follow from; PlanError for one that cannot work."""
    assert isinstance(recipe.quantize, Format)
    with failures_blamed(recipe.quantize):
        serving = returned(recipe.quantize.serving(), (Serving, NoneType), "serving")
        schemes = returned(recipe.quantize.schemes(), tuple, "schemes")
    if serving is None:
        raise PlanError("no serving engine that we know loads this format")
    weights = _weights(packs)
    parts = {tensor.fact.part for tensor in conversion.tensors}
    tower = any(fact.part is Part.TOWER for fact in architecture.built.values())
    where, template = next(iter(template_files(files).items()), ("", None))
    found = tool_format(template, where, special_tokens(files)) if template is not None else None
    facts = ServingFacts(
        repo=recipe.card.repo or recipe.variant,
        variant=recipe.variant,
        quantization=serving.quantization,
        profiles=serving.profiles,
        schemes=schemes,
        support=serving.support,
        tool_call_parser=found.tool_call_parser if found else None,
        reasoning_parser=found.reasoning_parser if found else None,
        has_mtp=Part.MTP in parts,
        text_only=tower and Part.TOWER not in parts,
        weights_bytes=weights.size,
        kv=architecture.kv_geometry,
        max_positions=architecture.max_positions,
        sharding=sharding_of(architecture, conversion),
        # vLLM does not look whether the file asks for sampling at all.
        packaged_sampling=sampling({**generation_entries(files), "do_sample": True}),
        stated_sampling={str(name): item for name, item in (recipe.card.sampling or {}).items()},
        kv_cache_dtype=conversion.kv_cache,
        model_file=weights.file,
        projector=weights.projector.name if weights.projector else None,
        projector_bytes=weights.projector.size if weights.projector else 0,
        hears=weights.projector is not None
        and any(slot.tensor.name.startswith(SOUND) for slot in weights.projector.slots),
    )
    _check_sections(recipe, facts)
    return facts


class _Weights(NamedTuple):
    """The bytes of the model, and the file that is served where an engine takes no folder."""

    size: int
    file: str | None = None
    projector: PackLayout | None = None


def _weights(packs: Sequence[PackLayout]) -> _Weights:
    if not all(pack.name.endswith(SUFFIX) for pack in packs):
        return _Weights(sum(pack.size for pack in packs))
    model = [pack for pack in packs if not is_statistics(pack.name)]
    towers = [
        pack for pack in model if all(slot.tensor.fact.part is Part.TOWER for slot in pack.slots)
    ]
    text = [pack for pack in model if pack not in towers]
    projector = towers[0] if towers else None
    return _Weights(sum(pack.size for pack in text), text[0].name, projector)


def _check_sections(recipe: Recipe, facts: ServingFacts) -> None:
    listed = isinstance(recipe.tree.find(("package", "serve")).value, list)
    seen: set[str] = set()
    for index, spec in enumerate(recipe.package.serve):
        try:
            if spec.profile in seen:
                raise PlanError(f"the profile {spec.profile!r} is listed twice", at=("profile",))
            seen.add(spec.profile)
            plan_launches(spec, facts)
        except PlanError as error:
            raise error.revised(at=(index, *error.at) if listed else error.at) from None
