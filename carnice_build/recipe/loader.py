"""From a YAML file to a checked recipe whose every part knows where it was written."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from carnice_build.errors import MOST_LISTED, RecipeError, nearest, together
from carnice_build.recipe.layers import LayerSpan
from carnice_build.recipe.merge import override, read_with_parents
from carnice_build.recipe.schema import (
    CalibrationSpec,
    CardSpec,
    PackageSpec,
    RecipeBody,
    SourceSpec,
    Strict,
    Vocabulary,
)
from carnice_build.yaml_tree import Node

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
        raise RecipeError(
            "is not a folder of recipes",
            where=str(folder),
            expected="one with a first recipe, as `carnice new` writes it",
        )
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
    check = _Check(tree, vocabulary)
    body = check.part(RecipeBody, ())
    steps = check.steps()
    format = check.format()
    if body is not None and body.variant != path.stem:
        check.note(
            RecipeError(
                f"declares the variant {body.variant!r}",
                where=tree.find(("variant",)).where,
                expected=f"{path.stem!r}, as the file is named",
            )
        )
    if body is None or format is None or check.errors:
        what = f"{len(check.errors)} things are wrong"
        raise together(check.errors, lambda error: error(), what, str(path))
    return Recipe(
        variant=body.variant,
        description=body.description,
        sources=body.sources,
        layers=body.layers,
        steps=steps,
        quantize=format,
        calibration=body.calibration,
        package=body.package,
        card=body.card,
        tree=tree,
    )


class _Check:
    """Checks the parts of a recipe one by one, and keeps what is wrong with any of them.

    Each of `errors` makes the error when it is called, because to word one takes time.
    """

    def __init__(self, tree: Node, vocabulary: Vocabulary) -> None:
        self._tree = tree
        self._vocabulary = vocabulary
        self.errors: list[Callable[[], RecipeError]] = []

    def note(self, error: RecipeError) -> None:
        """Keep an error."""
        self.errors.append(lambda: error)

    def part(self, model: type[M], path: tuple[str | int, ...]) -> M | None:
        """The entry at `path` as a `model`, None when it is none."""
        try:
            return model.model_validate(self._tree.find(path).plain())
        except ValidationError as error:
            for detail in _telling(error.errors(), model, self._tree, path):
                self.errors.append(partial(_translate, detail, model, self._tree, path))
            return None

    def steps(self) -> list[Step]:
        """The steps that are right."""
        node = self._tree.find(("steps",))
        count = len(node.value) if isinstance(node.value, list) else 0
        found = (self._step(index) for index in range(count))
        return [step for step in found if step is not None]

    def _step(self, index: int) -> Step | None:
        node = self._tree.find(("steps", index))
        table = node.value
        if not isinstance(table, dict):
            return None  # the body's error
        if len(table) != 1:
            what = f"a step has {len(table)} keys"
            self.note(RecipeError(what, where=node.where, expected="one, the kind of step"))
            return None
        kind = next(iter(table))
        model = self._vocabulary.steps.get(kind)
        if model is None:
            self._unknown("step", kind, node, self._vocabulary.steps)
            return None
        params = self.part(model, ("steps", index, kind))
        return None if params is None else Step(kind, params, index)

    def format(self) -> BaseModel | None:
        """The format with its knobs, None when something is wrong with it."""
        section = self._tree.value.get("quantize") if isinstance(self._tree.value, dict) else None
        if section is None or not isinstance(section.value, dict):
            return None  # the body's error
        node = section.find(("format",))
        if not isinstance(node.value, str):
            known = " or ".join(self._vocabulary.formats)
            self.note(RecipeError("has no format", where=node.where, expected=known))
            return None
        model = self._vocabulary.formats.get(node.value)
        if model is None and (instead := self._vocabulary.retired.get(node.value)):
            what = f"the format {node.value!r} is gone"
            self.note(RecipeError(what, where=node.where, expected=instead))
            return None
        if model is None:
            self._unknown("format", node.value, node, self._vocabulary.formats)
            return None
        return self.part(model, ("quantize",))

    def _unknown(self, what: str, name: str, node: Node, valid: Iterable[str]) -> None:
        self.note(
            RecipeError(
                f"unknown {what} {name!r}",
                where=node.where,
                expected=" or ".join(valid),
                nearest=nearest(name, valid),
            )
        )


def _telling(
    details: Sequence[ErrorDetails], model: type[BaseModel], tree: Node, path: tuple[str | int, ...]
) -> list[ErrorDetails]:
    """One detail for each entry that is wrong, unknown keys first.

    Of the ways in which a value fits no branch of a union the one is told that got furthest into
    the value, or the first.  A misspelt key is why another is missing, so that one is not told.
    """
    unknown = [detail for detail in details if detail["type"] == "extra_forbidden"]
    others = [detail for detail in details if detail["type"] != "extra_forbidden"]
    meant = {
        (*detail["loc"][:-1], nearest(str(detail["loc"][-1]), _keys(_owner(model, detail["loc"]))))
        for detail in unknown[:MOST_LISTED]
    }
    told: dict[tuple[str | int, ...], ErrorDetails] = {}
    for detail in (*unknown, *others):
        location = detail["loc"]
        if detail["type"] != "missing":
            place = _written(tree, (*path, *location))
            if place not in told or _is_of_type(detail) < _is_of_type(told[place]):
                told[place] = detail
        elif location not in meant:
            parent = _written(tree, (*path, *location[:-1]))
            told.setdefault((*parent, location[-1]), detail)
    # Only a union has something to say of an entry and of what is in it.
    above = {place[:end] for place in told for end in range(len(place))}
    return [
        detail
        for place, detail in told.items()
        if place not in above or detail["type"] in ("missing", "extra_forbidden")
    ]


def _is_of_type(detail: ErrorDetails) -> bool:
    """Whether the value is no more than of another type than it should be."""
    return detail["type"].endswith("_type")


def _written(tree: Node, location: tuple[str | int, ...]) -> tuple[str | int, ...]:
    """The path of the entry that `location` speaks of, without the branches of a union in it."""
    found: tuple[str | int, ...] = ()
    for part in location:
        if tree.find((*found, part)) is not tree.find(found):
            found = (*found, part)
    return found


def _translate(
    detail: ErrorDetails, model: type[BaseModel], tree: Node, path: tuple[str | int, ...]
) -> RecipeError:
    location = _written(tree, (*path, *detail["loc"]))
    if detail["type"] == "missing":
        location = (*_written(tree, (*path, *detail["loc"][:-1])), detail["loc"][-1])
    shown = ".".join(map(str, location)) or "the recipe"
    where = tree.find(location).where
    if detail["type"] == "extra_forbidden":
        key = str(location[-1])
        owner = _owner(model, detail["loc"])
        if issubclass(owner, Strict) and key in owner.retired:
            return RecipeError(f"{shown} is gone", where=where, expected=owner.retired[key])
        return RecipeError(
            f"unknown key {shown!r}", where=where, nearest=nearest(key, _keys(owner))
        )
    if detail["type"] == "missing":
        return RecipeError(f"{shown} is missing", where=where)
    message = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "model_type":
        message = "Input should be a mapping"
    given = detail["input"]
    suffix = "" if isinstance(given, dict | list) or repr(given) in message else f" (got {given!r})"
    near = None
    if detail["type"] == "literal_error" and isinstance(given, str):
        near = nearest(given, re.findall("'([^']+)'", detail["ctx"]["expected"]))
    return RecipeError(f"{shown}: {message}{suffix}", where=where, nearest=near)


def _owner(model: type[BaseModel], location: tuple[str | int, ...]) -> type[BaseModel]:
    """The sub-model that the entry at `location` stands in; the nearest above it as a fallback."""
    current = model
    for part in location[:-1]:
        field = current.model_fields.get(str(part))
        if field is not None:
            current = _model_in(field.annotation) or current
    return current


def _keys(model: type[BaseModel]) -> list[str]:
    """The keys that the model accepts."""
    return [field.alias or name for name, field in model.model_fields.items()]


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The pydantic model inside an annotation such as `list[Rule]`, if there is one."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for part in getattr(annotation, "__args__", ()):
        if found := _model_in(part):
            return found
    return None
