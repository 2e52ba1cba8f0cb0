"""Writing a table for a model family that has none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from carnice_build.backends.families import described
from carnice_build.checkpoint.json import json_object
from carnice_build.commands.options import FAMILIES, Options
from carnice_build.errors import CarniceError, CheckpointError, RecipeError
from carnice_build.models import known_types, packaged_types, replaced, table_of
from carnice_build.models.table import FamilyTable
from carnice_build.models.table_file import SHIPPED, load_table
from carnice_build.models.write_table import NEVER_WRITTEN
from carnice_build.planning.gather import stored
from carnice_build.verification.process import Worker


@dataclass(frozen=True)
class WrittenTable:
    """A table that was written: where, what could not be known, and what a small model says of it.

    Of `tensors` that transformers would save, `differing` do not come out of the table so.
    `replaces` says that it counts from now on in the place of a table that ships.
    """

    path: Path
    unknown: tuple[str, ...]
    tensors: int
    differing: tuple[str, ...]
    replaces: bool


def write_family(
    model: str, out: Path | None, options: Options, *, replace: bool = False
) -> WrittenTable:
    """Write a table for `model`, a model type or the path of a config.json.

    It goes to `out`, by default into the project's folder of tables.
    CarniceError when it is there already, or when transformers has no such model; and unless it
    may `replace` it, when a table that ships would no longer count.
    """
    model_type, entries = _config(model)
    path = out or options.recipes / FAMILIES / f"{model_type}.yaml"
    if path.exists():
        raise RecipeError("is there already", where=str(path), expected="another --out")
    counts = path.resolve() == (options.recipes / FAMILIES / f"{model_type}.yaml").resolve()
    if counts and not replace and (shipped := table_of(model_type)):
        raise RecipeError(
            f"would count in the place of the table that ships{_lost(shipped)}",
            where=str(path),
            expected="--out FILE, where it does not count, or --replace",
        )
    with Worker() as worker:
        found = worker.ask(described, model_type, entries, model)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(found.text, encoding="utf-8")
    differing = _differing(path, found.config, found.shapes)
    own = replaced(model_type)
    replaces = own is not None and own == path.resolve()
    return WrittenTable(path, found.unknown, len(found.shapes), tuple(differing), replaces)


def _lost(shipped: Path) -> str:
    """What the table that ships says and a new one cannot, as the end of a clause."""
    said = load_table(shipped).table.model_fields_set
    lost = [entry for entry in NEVER_WRITTEN if entry in said]
    return f", without {', '.join(map(repr, lost))}" if lost else ""


def families() -> dict[str, str]:
    """The model types that have a table, each with where it is from."""
    found = {name: f"from {package}" for name, package in packaged_types().items()}
    for name in known_types():
        path = table_of(name)
        ships = path is not None and path.parent == SHIPPED
        instead = ", in the place of the one that ships" if replaced(name) else ""
        found[name] = "ships" if ships else f"this project's{instead}"
    return dict(sorted(found.items()))


def _config(model: str) -> tuple[str, Mapping[str, Any]]:
    if not model.endswith(".json"):
        return model, {}
    try:
        entries = json_object(model, Path(model).read_bytes())
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", where=model) from None
    model_type = entries.get("model_type")
    if not isinstance(model_type, str):
        raise CheckpointError("has no model_type", where=model)
    return model_type, entries


def _differing(
    path: Path, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> list[str]:
    """The tensors that the table does not say of a model that has these `shapes`."""
    try:
        facts = FamilyTable(path, config, str(path)).tensors.values()
    except CarniceError as error:
        return [str(error)]
    found: dict[str, tuple[int, ...]] = {}
    for fact in facts:
        names, shape = stored(fact, shapes)
        found |= dict.fromkeys(names, shape)
    return [name for name in {**shapes, **found} if shapes.get(name) != found.get(name)]
