"""The knob `keep`: weights that stay as they are."""

from __future__ import annotations

from collections.abc import Sequence

from carnice_build.errors import PlanError
from carnice_build.recipe.patterns import Patterns
from carnice_build.steps.base import require_match


def kept(patterns: Sequence[str], names: Sequence[str]) -> set[str]:
    """Those of the weights `names` that match; PlanError at `keep` for a pattern without any."""
    if not patterns:
        return set()
    try:
        return set(require_match(Patterns(list(patterns)), names, "weight"))
    except PlanError as error:
        raise error.revised(at=("keep",)) from None


def weights_of(modules: Sequence[str]) -> list[str]:
    """Patterns for the weights of modules, for which there are globs."""
    return [f"{glob}.weight" for glob in modules]
