"""From a YAML file to a checked recipe whose every part knows where it was written."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from carnice_build.errors import RecipeError, nearest
from carnice_build.recipe.layers import LayerSpan
from carnice_build.recipe.merge import override, read_with_parents
from carnice_build.recipe.schema import (
    CalibrationSpec,
    CardSpec,
    PackageSpec,
    RecipeBody,
    SourceSpec,
    Vocabulary,
)
from carnice_build.recipe.tree import Node

M = TypeVar("M", bound=BaseModel)


@dataclass(frozen=True)
class Step:
    """One step of a recipe: its kind, its checked parameters and its place in the file."""

    kind: str
    params: BaseModel
    index: int


@dataclass(frozen=True)
class Recipe:
    """A variant as declared: checked for form, not yet against any checkpoint."""

    variant: str
    description: str
    sources: Mapping[str, SourceSpec]
    layers: Mapping[str, list[LayerSpan]]
    steps: Sequence[Step]
    quantize: BaseModel
    calibration: CalibrationSpec | None
    package: PackageSpec
    card: CardSpec
    tree: Node

    @property
    def body(self) -> str:
        """Name of the source that the variant is made from: the first one."""
        return next(iter(self.sources))

    def where(self, *path: str | int) -> str:
        """The place in the file of the entry at `path`, or of the nearest one above it."""
        return self.tree.find(path).where


def list_recipes(folder: Path) -> list[Path]:
    """The recipe files in `folder`; those whose name begins with `_` are parts of others."""
    if not folder.is_dir():
        raise RecipeError("is not a folder of recipes", where=str(folder))
    return sorted(path for path in folder.glob("*.yaml") if not path.name.startswith("_"))


def find_recipe(name: str, folder: Path) -> Path:
    """The file that declares variant `name` in `folder`."""
    known = {path.stem: path for path in list_recipes(folder)}
    if name not in known:
        raise RecipeError(
            f"there is no recipe for the variant {name!r}",
            where=str(folder),
            nearest=nearest(name, known),
        )
    return known[name]


def load_recipe(path: Path, vocabulary: Vocabulary, overrides: Iterable[str] = ()) -> Recipe:
    """Read, merge, override and check the recipe at `path`."""
    tree = read_with_parents(path)
    for assignment in overrides:
        tree = override(tree, assignment)
    body = _validate(RecipeBody, tree, ())
    if body.variant != path.stem:
        raise RecipeError(
            f"declares the variant {body.variant!r}",
            where=tree.find(("variant",)).where,
            expected=f"{path.stem!r}, as the file is named",
        )
    steps = [_step(tree, index, vocabulary) for index in range(len(body.steps))]
    return Recipe(
        variant=body.variant,
        description=body.description,
        sources=body.sources,
        layers=body.layers,
        steps=steps,
        quantize=_format(tree, vocabulary),
        calibration=body.calibration,
        package=body.package,
        card=body.card,
        tree=tree,
    )


def _step(tree: Node, index: int, vocabulary: Vocabulary) -> Step:
    node = tree.find(("steps", index))
    table = node.value
    assert isinstance(table, dict)
    if len(table) != 1:
        raise RecipeError(
            f"a step has {len(table)} keys", where=node.where, expected="one, the kind of step"
        )
    kind = next(iter(table))
    model = vocabulary.steps.get(kind)
    if model is None:
        raise RecipeError(
            f"unknown step {kind!r}",
            where=node.where,
            expected=" or ".join(vocabulary.steps),
            nearest=nearest(kind, vocabulary.steps),
        )
    return Step(kind, _validate(model, tree, ("steps", index, kind)), index)


def _format(tree: Node, vocabulary: Vocabulary) -> BaseModel:
    node = tree.find(("quantize", "format"))
    name = node.value
    if not isinstance(name, str) or name not in vocabulary.formats:
        raise RecipeError(
            f"unknown format {name!r}" if isinstance(name, str) else "has no format",
            where=node.where,
            expected=" or ".join(vocabulary.formats),
            nearest=nearest(str(name), vocabulary.formats),
        )
    return _validate(vocabulary.formats[name], tree, ("quantize",))


def _validate(model: type[M], tree: Node, path: tuple[str | int, ...]) -> M:
    try:
        return model.model_validate(tree.find(path).plain())
    except ValidationError as error:
        details = error.errors()
        # A misspelt key is why another is missing, so it comes first.
        unknown = (detail for detail in details if detail["type"] == "extra_forbidden")
        raise _translate(next(unknown, details[0]), model, tree, path) from None


def _translate(
    detail: ErrorDetails, model: type[BaseModel], tree: Node, path: tuple[str | int, ...]
) -> RecipeError:
    location = (*path, *detail["loc"])
    shown = ".".join(map(str, location)) or "the recipe"
    where = tree.find(location).where
    if detail["type"] == "extra_forbidden":
        key = str(location[-1])
        return RecipeError(
            f"unknown key {shown!r}", where=where, nearest=nearest(key, _keys(model, detail["loc"]))
        )
    if detail["type"] == "missing":
        return RecipeError(f"{shown} is missing", where=where)
    message = detail["msg"].removeprefix("Value error, ")
    given = detail["input"]
    suffix = "" if isinstance(given, dict | list) or repr(given) in message else f" (got {given!r})"
    near = None
    if detail["type"] == "literal_error" and isinstance(given, str):
        near = nearest(given, re.findall("'([^']+)'", detail["ctx"]["expected"]))
    return RecipeError(f"{shown}: {message}{suffix}", where=where, nearest=near)


def _keys(model: type[BaseModel], location: tuple[str | int, ...]) -> list[str]:
    """The keys that the sub-model at `location`'s parent accepts; the model's own as a fallback."""
    current: Any = model
    for part in location[:-1]:
        field = current.model_fields.get(part) if hasattr(current, "model_fields") else None
        if field is not None:
            current = _model_in(field.annotation) or current
    return [field.alias or name for name, field in current.model_fields.items()]


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The pydantic model inside an annotation such as `list[Rule]`, if there is one."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for part in getattr(annotation, "__args__", ()):
        if found := _model_in(part):
            return found
    return None
