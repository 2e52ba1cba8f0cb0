"""Which group of a config a module is in, by the targets that each group has."""

from __future__ import annotations

from collections.abc import Sequence

from carnice_build.formats.compressed_tensors.schemes import LINEAR
from carnice_build.recipe.patterns import Patterns
from carnice_build.tensors import STACK


class Targets:
    """The targets of all groups, in their order: names and patterns, or the class of linears.

    A group that names a module goes before one that has its class, as in the library.
    """

    def __init__(self, groups: Sequence[Sequence[str]]) -> None:
        """Raises ValueError for what is no pattern."""
        self.patterns = [
            Patterns([target for target in targets if target != LINEAR]) for targets in groups
        ]
        self.classes = [index for index, targets in enumerate(groups) if LINEAR in targets]

    def named(self, module: str) -> list[int]:
        """The numbers of the groups that name a module; a stack is named as its first expert."""
        name = first_of(module)
        return [index for index, found in enumerate(self.patterns) if found.matches(name)]

    def group(self, module: str) -> int | None:
        """The number of the group that a linear is in, None when no group is about it."""
        return next(iter([*self.named(module), *self.classes]), None)


def first_of(module: str) -> str:
    """A module's path; of a stack, that of its first expert."""
    return module.replace(STACK, "0")
