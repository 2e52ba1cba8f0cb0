"""Which real checkpoint each model name of a recipe means.

A profile is an entry of `_profiles.yaml` beside the recipes: a map from models to folders or
shape files, relative to the project, or the word `hub`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from carnice_build.checkpoint.checkpoint import Checkpoint, open_checkpoint
from carnice_build.errors import CheckpointError, RecipeError, nearest
from carnice_build.recipe.schema import SourceSpec
from carnice_build.recipe.tree import Node, read_tree

PROFILES_NAME = "_profiles.yaml"
HUB = "hub"


@dataclass(frozen=True)
class Source:
    """A source of a recipe, found: what the recipe calls it and the opened checkpoint.

    `profile` is None when the command line mapped the source to a checkpoint of its own.
    """

    name: str
    spec: SourceSpec
    profile: str | None
    checkpoint: Checkpoint


class SourceFinder:
    """Finds and opens sources, each checkpoint once however many recipes name it."""

    def __init__(self, recipes: Path, profile: str, overrides: Mapping[str, Path]) -> None:
        """`overrides` maps source names to checkpoints, over what `profile` says."""
        self._root = recipes.parent
        self._profile = profile
        self._overrides = overrides
        self._table = _read_profile(recipes / PROFILES_NAME, profile)
        self._opened: dict[Path, Checkpoint] = {}

    def find(self, name: str, spec: SourceSpec) -> Source:
        """The source called `name`, opened; CheckpointError when nothing says where it is."""
        if name in self._overrides:
            return Source(name, spec, None, self._open(self._overrides[name]))
        path = self._path_of(name, spec)
        return Source(name, spec, self._profile, self._open(path))

    def _path_of(self, name: str, spec: SourceSpec) -> Path:
        if isinstance(self._table.value, dict) and spec.model in self._table.value:
            node = self._table.value[spec.model]
            pure = PurePosixPath(str(node.value))
            if ".." in pure.parts or pure.is_absolute():
                raise RecipeError(f"{str(pure)!r} is outside the project", where=node.where)
            return self._root / pure
        raise CheckpointError(
            f"profile {self._profile!r} does not say where {spec.model} is",
            where=self._table.where,
            expected=f"an entry there, or --source {name}=FOLDER",
        )

    def _open(self, path: Path) -> Checkpoint:
        resolved = path.resolve()
        if resolved not in self._opened:
            self._opened[resolved] = open_checkpoint(path)
        return self._opened[resolved]


def _read_profile(path: Path, profile: str) -> Node:
    tree = read_tree(path)
    if not isinstance(tree.value, dict):
        raise RecipeError("is not a mapping of profiles", where=tree.where)
    if profile not in tree.value:
        raise RecipeError(
            f"there is no profile {profile!r}",
            where=tree.where,
            expected=" or ".join(tree.value),
            nearest=nearest(profile, tree.value),
        )
    return tree.value[profile]
