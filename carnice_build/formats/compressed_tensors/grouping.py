"""Which group of a recipe each linear of a model is in, and what config.json says of the groups."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from carnice_build.errors import PlanError
from carnice_build.formats.base import check_fusions
from carnice_build.formats.compressed_config import Stated
from carnice_build.formats.compressed_tensors.schemes import LINEAR, ConfigGroup
from carnice_build.formats.compressed_tensors.storages import known_storage
from carnice_build.formats.compressed_tensors.storages.base import Storage
from carnice_build.formats.compressed_tensors.targets import Targets, first_of
from carnice_build.formats.exclusions import engine_names, modules_of
from carnice_build.graph import View
from carnice_build.models.base import Architecture, TensorFact
from carnice_build.recipe.patterns import expression
from carnice_build.steps.base import require_match

Path = tuple[str, ...]


class Grouping:
    """The linears that are quantized, each in one group.

    `facts` are those of their weights, by module.
    """

    def __init__(self, groups: Mapping[Path, ConfigGroup], linears: Sequence[TensorFact]) -> None:
        """PlanError for a linear that two groups name, and for a name of no linear."""
        self._groups = groups
        paths = list(groups)
        targets = Targets([group.targets for group in groups.values()])
        modules = [first_of(fact.module) for fact in linears]
        for path, patterns in zip(paths, targets.patterns, strict=True):
            if patterns.texts:
                try:
                    require_match(patterns, modules, "linear of decoder layers")
                except PlanError as error:
                    raise error.revised(at=path) from None
        self._paths: dict[str, Path] = {}
        self.facts: dict[str, TensorFact] = {}
        for fact in linears:
            named = targets.named(fact.module)
            if len(named) > 1:
                first, second = (".".join(paths[index]) for index in named[:2])
                raise PlanError(
                    f"{fact.module} is named by two groups, {first} and {second}",
                    expected="one that names it",
                    at=paths[named[1]],
                )
            index = targets.group(fact.module)
            if index is not None:
                self._paths[fact.module] = paths[index]
                self.facts[fact.module] = fact

    def path(self, module: str) -> Path:
        """Where the recipe has the group of a module."""
        return self._paths[module]

    def group(self, module: str) -> ConfigGroup:
        """The group of a module."""
        return self._groups[self._paths[module]]

    def storage(self, path: Path) -> Storage:
        """How the weights of a group are stored."""
        return known_storage(self._groups[path])

    def by_path(self) -> dict[Path, list[TensorFact]]:
        """The linears of each group that has some, in the order of the model."""
        found: dict[Path, list[TensorFact]] = {}
        for module, fact in self.facts.items():
            found.setdefault(self._paths[module], []).append(fact)
        return found

    def check_fusions(self, view: View, architecture: Architecture) -> None:
        """Raise PlanError where an engine would fuse linears of two groups, or plain ones."""
        try:
            check_fusions(self.facts, view, architecture)
        except PlanError as error:
            raise error.revised(at=("ignore",)) from None
        for fusion in architecture.fusions:
            paths = {part: self._paths[part] for part in fusion.parts if part in self._paths}
            schemes = {
                (group.weights, group.input_activations)
                for group in (self._groups[path] for path in paths.values())
            }
            if len(schemes) > 1:
                raise PlanError(
                    f"{', '.join(paths)} have different schemes",
                    expected=f"one, because serving engines fuse them to {fusion.module}",
                    at=list(paths.values())[-1],
                )

    def sharing(self, fact: TensorFact, architecture: Architecture) -> Sequence[TensorFact]:
        """The linears that share what the storage of one has to share, which is one of them."""
        if not self.storage(self._paths[fact.module]).shares:
            return [fact]
        for fusion in architecture.fusions:
            if fact.module in fusion.parts:
                return [self.facts[part] for part in fusion.parts if part in self.facts]
        return [fact]

    def stated(
        self, of: Callable[[ConfigGroup], Stated], architecture: Architecture
    ) -> list[Stated]:
        """What config.json says of the groups that have linears, in the order of the model.

        `of` says of each all but its targets.
        """
        return [
            replace(of(self._groups[path]), targets=self._targets(path, facts, architecture))
            for path, facts in self.by_path().items()
        ]

    def _targets(
        self, path: Path, facts: Sequence[TensorFact], architecture: Architecture
    ) -> list[str]:
        """The targets of a group as its engines read them: those of the recipe, or names.

        An engine may spell modules otherwise than the checkpoint does, so that a pattern of the
        recipe says something else there.
        """
        group = self._groups[path]
        if LINEAR in group.targets:
            return [LINEAR]
        patterns = [expression(target) for target in group.targets]
        own = _engine_names(facts, architecture)
        others = _engine_names(self.facts.values(), architecture) - own
        targets = Targets([patterns])
        right = all(targets.named(name) for name in own)
        wrong = any(targets.named(name) for name in others)
        return patterns if right and not wrong else sorted(own)


def _engine_names(facts: Iterable[TensorFact], architecture: Architecture) -> set[str]:
    return {name for fact in facts for name in engine_names(architecture, modules_of(fact))}
