"""Step `rename`: rewrite names by a regular expression; moves no byte."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, Field

from carnice_build.errors import PlanError
from carnice_build.graph import View
from carnice_build.recipe.patterns import MAX_NAME, Patterns, compile_pattern, in_time
from carnice_build.recipe.schema import Expectation
from carnice_build.steps.base import PlanContext, Step


def _check_regex(text: str) -> str:
    compile_pattern(f"re:{text}")
    return text


class Rename(Step):
    """Rewrite the part of each name that `from` matches; names it does not match stay."""

    pattern: Annotated[str, AfterValidator(_check_regex)] = Field(
        alias="from", description="Regular expression, searched for in each name."
    )
    to: str = Field(description="Replacement; `\\1` stands for the first group.")
    optional: bool = Field(False, description="Accept that no name changes.")
    expect: Expectation = Field(None, description="How many names must change.")

    def apply(self, view: View, context: PlanContext) -> View:
        """The view under its new names; PlanError when two tensors would share one."""
        pattern = re.compile(self.pattern)
        renamed: View = {}
        changed = 0
        for name, ref in in_time(view.items()):
            new_name = self._rewrite(pattern, name)
            if len(new_name) > MAX_NAME:
                raise PlanError(
                    f"renaming {name!r} gives a name of {len(new_name)} characters",
                    expected=f"at most {MAX_NAME}",
                )
            if new_name in renamed:
                raise PlanError(f"renaming {name!r} gives the name {new_name!r} twice")
            renamed[new_name] = ref
            changed += new_name != name
        if not changed and not self.optional:
            raise PlanError(
                f"{self.pattern} changes no name", expected="a match, or optional: true"
            )
        if changed or not self.optional:
            patterns = Patterns(f"re:{self.pattern}")
            context.check_count(self.expect, patterns, changed, derive=False)
        return renamed

    def _rewrite(self, pattern: re.Pattern[str], name: str) -> str:
        try:
            return pattern.sub(self.to, name, count=1)
        except (re.error, IndexError) as error:
            raise PlanError(f"{self.to!r} is not a valid replacement: {error}") from None
