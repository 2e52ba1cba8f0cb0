"""Rules that choose settings for modules by name and by layer; the last one that fits wins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import Field

from carnice_build.errors import PlanError
from carnice_build.models.base import TensorFact
from carnice_build.recipe.patterns import Patterns
from carnice_build.recipe.schema import PatternList, Strict
from carnice_build.steps.base import PlanContext, require_match


class Rule(Strict):
    """Which modules a rule is about; formats add the settings that it changes."""

    match: PatternList = Field(description="Module paths, such as `*.v_proj` or `lm_head`.")
    layers: str | None = Field(None, description="Only in this named set of layers.")
    skip: bool = Field(False, description="Leave these modules unquantized.")


R = TypeVar("R", bound=Rule)


def rules_by_module(
    rules: Sequence[R], facts: Sequence[TensorFact], context: PlanContext
) -> dict[str, list[tuple[int, R]]]:
    """For each module path, the rules that fit it, with their numbers, in the order they stand.

    Raises PlanError for a rule whose pattern matches no module at all.
    """
    chosen: dict[str, list[tuple[int, R]]] = {fact.module: [] for fact in facts}
    layer_of = {fact.module: fact.layer for fact in facts}
    # A rule for a head is no mistake when the head is tied: there is nothing left to choose.
    tied = [name.rpartition(".")[0] for name in context.architecture.ties]
    for index, rule in enumerate(rules):
        try:
            layers = context.layers(rule.layers) if rule.layers is not None else None
            modules = require_match(Patterns(rule.match), [*chosen, *tied], "module")
        except PlanError as error:
            raise error.revised(at=("rules", index)) from None
        for module in chosen.keys() & modules:
            if layers is None or layer_of[module] in layers:
                chosen[module].append((index, rule))
    return chosen


@dataclass(frozen=True)
class Settings:
    """What the rules chose for a module, and which entry of the recipe chose each value."""

    values: dict[str, Any]
    causes: dict[str, tuple[str | int, ...]]


def choose(defaults: Mapping[str, Any], rules: Sequence[tuple[int, Rule]]) -> Settings | None:
    """The defaults changed by the rules in turn; None when the last word is to skip the module."""
    values = dict(defaults)
    causes: dict[str, tuple[str | int, ...]] = {name: (name,) for name in defaults}
    skip = False
    for index, rule in rules:
        skip = rule.skip
        for name in defaults:
            if (value := getattr(rule, name)) is not None:
                values[name] = value
                causes[name] = ("rules", index, name)
    return None if skip else Settings(values, causes)
