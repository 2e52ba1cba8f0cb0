"""Everything that a recipe may name."""

from __future__ import annotations

from carnice_build.errors import PluginError
from carnice_build.formats.registry import FORMATS, RETIRED
from carnice_build.recipe.schema import Vocabulary
from carnice_build.steps.registry import STEPS


def vocabulary() -> Vocabulary:
    """The steps and formats of this installation; a broken one raises when it is asked for."""
    return Vocabulary(steps=STEPS, formats=FORMATS, retired=RETIRED)


def usable_vocabulary() -> tuple[Vocabulary, list[PluginError]]:
    """The steps and formats that can be used, and what is wrong with all others."""
    problems: list[PluginError] = []
    found = Vocabulary(STEPS.usable(problems), FORMATS.usable(problems))
    return found, problems
