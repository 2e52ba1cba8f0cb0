"""Step `graft`: put tensors of another source beside the body's own; moves no byte."""

from __future__ import annotations

from pydantic import Field

from carnice_build.checkpoint.checkpoint import Checkpoint, source_view
from carnice_build.checkpoint.quantized import stated_quantization
from carnice_build.errors import PlanError, nearest
from carnice_build.graph import View
from carnice_build.models import architecture_of
from carnice_build.recipe.patterns import Patterns
from carnice_build.recipe.schema import Expectation, PatternList
from carnice_build.steps.base import PlanContext, Step, require_match


class Graft(Step):
    """Take every tensor whose name matches from another source of the recipe."""

    source: str = Field(alias="from", description="Name of the source.")
    match: PatternList = Field(description="Names to take, as the source spells them.")
    replace: bool = Field(
        False, description="Take the place of tensors that match among the body's own."
    )
    expect: Expectation = Field(None, description="How many tensors must be taken.")

    def apply(self, view: View, context: PlanContext) -> View:
        """The view with the tensors at its end; PlanError when they do not belong to this body."""
        checkpoint = self._checkpoint(context)
        if stated_quantization(checkpoint.config) is not None:
            raise PlanError(
                "is quantized, so that its tensors are codes",
                where=checkpoint.where,
                expected="the model that it was quantized from",
                at=("from",),
            )
        _check_dimensions(checkpoint, context)
        patterns = Patterns(self.match)
        found = source_view(checkpoint)
        names = require_match(patterns, list(found), "tensor of the source")
        context.check_count(self.expect, patterns, len(names))
        if self.replace:
            replaced = set(patterns.select(view))
            view = {name: ref for name, ref in view.items() if name not in replaced}
        for name in names:
            if name in view:
                raise PlanError(f"tensor {name!r} is there already", expected="replace: true")
        return {**view, **{name: found[name] for name in names}}

    def _checkpoint(self, context: PlanContext) -> Checkpoint:
        if self.source not in context.sources:
            raise PlanError(
                f"the recipe has no source {self.source!r}",
                expected=" or ".join(context.sources),
                nearest=nearest(self.source, context.sources),
            )
        return context.sources[self.source].checkpoint


def _check_dimensions(checkpoint: Checkpoint, context: PlanContext) -> None:
    """A tensor may have the right shape and still belong to another vocabulary."""
    other = architecture_of(checkpoint.config, checkpoint.where)
    for name, wanted in context.architecture.dimensions.items():
        found = other.dimensions.get(name)
        if found != wanted:
            raise PlanError(
                f"{name} is {found}", where=checkpoint.where, expected=f"{wanted}, as the body's"
            )
