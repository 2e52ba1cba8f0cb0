"""One table per model family, found by the `model_type` of a config.

Packages add theirs through the entry point `carnice_build.families`: its name is the model type,
its value what makes an `Architecture` of a config and the place that the config is from.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from carnice_build.errors import CheckpointError, near
from carnice_build.models.base import Architecture
from carnice_build.models.table import FamilyTable
from carnice_build.models.table_file import SHIPPED, load_table

GROUP = "carnice_build.families"


class UnknownFamily(CheckpointError):
    """A checkpoint is of a family without a table."""


Family = Callable[[Mapping[str, Any], str], Architecture]

_TABLES: list[Path] = [SHIPPED]
"""Folders of tables, that of a project first."""


def use_tables(folder: Path) -> None:
    """Look for tables in `folder`, that of a project, before those that ship."""
    # With the current folder gone, whoever asks for recipes says so.
    with suppress(FileNotFoundError):
        folder = folder.resolve()
    _TABLES[:] = [folder, SHIPPED]


def architecture_of(config: Mapping[str, Any], where: str) -> Architecture:
    """The table for the checkpoint with this `config.json`, found at `where`.

    CheckpointError for a family without one, for another name for it would only hide what it is,
    and when what a package announces is none; RecipeError for a table that is wrong.
    """
    model_type = config.get("model_type")
    if isinstance(model_type, str):
        if path := table_of(model_type):
            return FamilyTable(path, config, where)
        drafted = config.get("text_config")
        if isinstance(drafted, dict) and _drafter_of(drafted.get("model_type")) == model_type:
            return architecture_of(drafted, f"{where}: text_config")
        for entry in entry_points(group=GROUP, name=model_type):
            return _from_package(entry, config, where)
    known = {*known_types(), *packaged_types()}
    unknown = f"is of the unknown model_type {str(model_type)!r}"
    like = ", ".join(near(model_type, sorted(known), 3) if isinstance(model_type, str) else ())
    raise UnknownFamily(
        unknown if "model_type" in config else "has no model_type",
        where=where,
        expected="one of a family that has a table here"
        + (f", such as {like}" if like else "")
        + " (`carnice family --list` shows all); docs/adding-a-family.md says how to add one",
    )


def _drafter_of(model_type: object) -> str | None:
    """The model type of a folder with no more than the MTP head of such a model."""
    path = table_of(model_type) if isinstance(model_type, str) else None
    return load_table(path).table.mlx_drafter if path else None


def table_of(model_type: str) -> Path | None:
    """The file of the table for checkpoints of this type; None when there is none."""
    if not re.fullmatch(r"\w{1,100}", model_type):
        return None
    paths = (folder / f"{model_type}.yaml" for folder in _TABLES)
    return next((path for path in paths if path.is_file()), None)


def replaced(model_type: str) -> Path | None:
    """The project's table that counts in the place of one that ships; None when there is none."""
    path, shipped = table_of(model_type), SHIPPED / f"{model_type}.yaml"
    return path if path and path != shipped and shipped.is_file() else None


def known_types() -> list[str]:
    """The model types that have a table."""
    return sorted({path.stem for folder in _TABLES for path in folder.glob("*.yaml")})


def packaged_types() -> dict[str, str]:
    """The model types whose tables other packages bring, each with the package."""
    entries = entry_points(group=GROUP)
    return {entry.name: entry.dist.name if entry.dist else "a package" for entry in entries}


def _from_package(entry: EntryPoint, config: Mapping[str, Any], where: str) -> Architecture:
    package = entry.dist.name if entry.dist else "a package"
    announced = f"needs the model family {entry.name!r} of {package}, {entry.value}, which"
    try:
        family: Family = entry.load()
    except Exception as error:  # it is the package's code that runs
        words = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{announced} cannot be loaded: {words}", where=where) from None
    try:
        table = family(config, where)
    except CheckpointError:
        raise
    except Exception as error:  # as above
        words = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{announced} is no family: {words}", where=where) from None
    if not isinstance(table, Architecture):
        words = f"makes a {type(table).__name__}"
        raise CheckpointError(f"{announced} {words}", where=where, expected="an `Architecture`")
    lacking = [name for name in Architecture.__annotations__ if not hasattr(table, name)]
    if lacking:
        raise CheckpointError(f"{announced} lacks {', '.join(lacking)}", where=where)
    return table
