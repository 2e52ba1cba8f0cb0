"""How launches sample where a request does not say: the folder's own file, or an option over it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from carnice_build.recipe.serve import FlagValue, ServeSpec
from carnice_build.serving.facts import ServingFacts
from carnice_build.serving.launches import OVERRIDE, SOURCE, Launch, resolve_launches


def served_sampling(
    specs: Sequence[ServeSpec], facts: ServingFacts
) -> dict[str, dict[str, int | float]]:
    """What each launch of a recipe's sections samples with, by profile and launch: `a/b`.

    Names are those of vLLM's requests: temperature, top_p, top_k, min_p and penalties.
    What is in none of them is the engine's own: a temperature of 1, and no limits.
    PlanError as `resolve_launches`.
    """
    return {
        f"{spec.profile}/{launch.name}": launch_sampling(launch, facts)
        for spec in specs
        for launch in resolve_launches(spec, facts)
    }


def launch_sampling(launch: Launch, facts: ServingFacts) -> dict[str, int | float]:
    """What one launch samples with where a request does not say."""
    source, override = launch.flags.get(SOURCE), launch.flags.get(OVERRIDE)
    own = facts.packaged_sampling if source is None or source.value == "auto" else {}
    return {**own, **(_numbers(override.value) if override else {})}


def _numbers(value: FlagValue) -> Mapping[str, int | float]:
    if not isinstance(value, dict):
        return {}
    return {name: item for name, item in value.items() if type(item) in (int, float)}  # type: ignore[misc]
