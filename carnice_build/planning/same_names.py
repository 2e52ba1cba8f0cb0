"""Files that two variants call alike, of which one folder has room for one.

Variants in GGUF are often published in one repository, as their files are called by model and mix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from carnice_build.checkpoint.containers import PROJECTOR, is_statistics
from carnice_build.checkpoint.gguf_header import SUFFIX
from carnice_build.errors import PlanError
from carnice_build.formats.layout import PackLayout
from carnice_build.planning.planner import VariantPlan


def told_of_same_names(variants: Sequence[VariantPlan]) -> list[VariantPlan]:
    """The variants, and with each what it would put in the place of a file of one before it.

    PlanError where both are for one repository.
    """
    seen: dict[str, tuple[VariantPlan, PackLayout]] = {}
    told: list[VariantPlan] = []
    for variant in variants:
        # Parts of a split file are told of once.
        notices: dict[tuple[str, str], str] = {}
        for pack in variant.packs:
            if not pack.name.endswith(SUFFIX):
                continue
            other, theirs = seen.setdefault(pack.name, (variant, pack))
            if theirs.identity == pack.identity:
                continue
            what = f"{pack.name} is the name of another file of {other.name}"
            way_out = _way_out(pack.name)
            repo = variant.recipe.card.repo
            if repo is not None and repo == other.recipe.card.repo:
                raise PlanError(
                    f"{what}, and both are for {repo}",
                    where=variant.recipe.where("quantize", "label"),
                    expected=way_out,
                )
            text = f"{what}; to publish both in one repository takes {way_out}"
            notices.setdefault((other.name, way_out), text)
        found = (*variant.notices, *notices.values())
        told.append(replace(variant, notices=found) if notices else variant)
    return told


def _way_out(name: str) -> str:
    if name.startswith(PROJECTOR) or is_statistics(name):
        return "the same one in both"
    return "a `label`"
