"""Rules that choose settings for modules by name and by layer; the last one that fits wins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from pydantic import Field

from carnice_build.architectures.base import TensorFact
from carnice_build.recipe.patterns import Patterns
from carnice_build.recipe.schema import PatternList, Strict
from carnice_build.transforms.base import PlanContext, require_match


class Rule(Strict):
    """Which modules a rule is about; formats add the settings that it changes."""

    match: PatternList = Field(description="Module paths, such as `*.v_proj` or `lm_head`.")
    layers: str | None = Field(None, description="Only in this named set of layers.")
    skip: bool = Field(False, description="Leave these modules unquantized.")


R = TypeVar("R", bound=Rule)


def rules_by_module(
    rules: Sequence[R], facts: Sequence[TensorFact], context: PlanContext
) -> dict[str, list[R]]:
    """For each module path, the rules that fit it in the order they stand.

    Raises PlanError for a rule whose pattern matches no module at all.
    """
    chosen: dict[str, list[R]] = {fact.module: [] for fact in facts}
    layer_of = {fact.module: fact.layer for fact in facts}
    for rule in rules:
        layers = context.layers(rule.layers) if rule.layers is not None else None
        for module in require_match(Patterns(rule.match), list(chosen), "module"):
            if layers is None or layer_of[module] in layers:
                chosen[module].append(rule)
    return chosen
