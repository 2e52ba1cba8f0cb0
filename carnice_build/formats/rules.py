"""Rules that choose settings for modules by name and by layer; the last one that fits wins."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from pydantic import Field, model_validator

from carnice_build.recipe.patterns import Patterns
from carnice_build.recipe.schema import PatternList, Strict
from carnice_build.steps.base import PlanContext, require_match


class Rule(Strict):
    """Which modules a rule is about; formats add the settings that it changes.

    `about` names what they add to say which modules these are.
    """

    about: ClassVar[Collection[str]] = ()

    match: PatternList = Field(description="Module paths, such as `*.v_proj` or `lm_head`.")
    layers: str | None = Field(None, description="Only in this named set of layers.")
    optional: bool = Field(
        False, description="Whether patterns may match nothing, as in a rule for many families."
    )
    skip: bool = Field(False, description="Leave these modules unquantized.")

    @model_validator(mode="after")
    def _says_one_thing(self) -> Self:
        given = self.model_dump(exclude_none=True, exclude_unset=True)
        settings = sorted(given.keys() - Rule.model_fields.keys() - {*self.about})
        if self.skip and settings:
            raise ValueError(f"`skip` leaves nothing for {' and '.join(settings)} to change")
        return self


def fitted(
    rule: Rule, layers: Mapping[str, int | None], others: Sequence[str], context: PlanContext
) -> frozenset[str]:
    """The modules that a rule fits, of those whose decoder `layers` are given by path.

    Patterns may also match `others`, of which there is nothing left to choose.
    Raises PlanError for a rule that is not optional and has a pattern that matches no module.
    """
    among = context.layers(rule.layers) if rule.layers is not None else None
    patterns = Patterns(rule.match)
    paths = list(dict.fromkeys([*layers, *others]))
    found = patterns.select(paths) if rule.optional else require_match(patterns, paths, "module")
    return frozenset(
        path for path in found if path in layers and (among is None or layers[path] in among)
    )


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
