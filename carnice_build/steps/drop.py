"""Step `drop`: leave tensors out; moves no byte."""

from __future__ import annotations

from pydantic import Field

from carnice_build.graph import View
from carnice_build.recipe.patterns import Patterns
from carnice_build.recipe.schema import Expectation, PatternList
from carnice_build.steps.base import PlanContext, Step, require_match


class Drop(Step):
    """Leave out every tensor whose name matches."""

    match: PatternList = Field(description="Names to leave out.")
    optional: bool = Field(False, description="Accept that nothing matches.")
    expect: Expectation = Field(None, description="How many tensors must match.")

    def apply(self, view: View, context: PlanContext) -> View:
        """The view without the matching tensors."""
        patterns = Patterns(self.match)
        if self.optional:
            dropped = set(patterns.select(view))
        else:
            dropped = set(require_match(patterns, list(view), "tensor"))
        if dropped or not self.optional:
            context.check_count(self.expect, patterns, len(dropped))
        return {name: ref for name, ref in view.items() if name not in dropped}
