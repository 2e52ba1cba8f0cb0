"""The file of a family table: read, put together with those that it extends, and checked."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property, reduce
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

from pydantic import ValidationError

from carnice_build.errors import RecipeError
from carnice_build.models.formulas import names_in
from carnice_build.models.table_names import Known, check_names, known_names
from carnice_build.models.table_schema import Table
from carnice_build.yaml_tree import Node, read_tree

SHIPPED = Path(__file__).parent / "tables"

_MERGED = {"blocks", "defaults", "values"}

_Version = tuple[Path, int]
"""A file, and when it was written, in nanoseconds."""


@dataclass(frozen=True)
class TableFile:
    """A table, and where each of its entries stands."""

    name: str
    table: Table
    tree: Node

    def error(self, path: Sequence[str | int], what: str, expected: str) -> RecipeError:
        """The error for the entry at `path`."""
        return RecipeError(what, where=self.tree.find(path).where, expected=expected)

    @cached_property
    def layered(self) -> frozenset[str]:
        """The values that differ from layer to layer."""
        found = {"layer", "kind"}
        # Values may come in any order, so that one pass does not find all.
        for _ in self.table.values:
            found |= {name for name, text in self.table.values.items() if names_in(text) & found}
        return frozenset(found - {"layer", "kind"})

    def check(self) -> None:
        """Raise RecipeError for values and defaults that follow from themselves."""
        formulas = {**self.table.defaults, **self.table.values}
        asked = {name: names_in(str(text)) & formulas.keys() for name, text in formulas.items()}
        try:
            TopologicalSorter(asked).prepare()
        except CycleError as error:
            name = error.args[1][0]
            path = ("values" if name in self.table.values else "defaults", name)
            raise self.error(path, f"what {name!r} is follows from itself", "an end") from None


def load_table(path: Path) -> TableFile:
    """The table in the file `path`; RecipeError with file:line:column when it is none.

    With `extends: OTHER`, what stands at the top of the table OTHER.yaml beside it, or among
    those that ship, is taken where this one says nothing, and so is each of its `blocks`,
    `defaults` and `values`.
    """
    return _loaded(_lineage(path))


def _lineage(path: Path) -> tuple[_Version, ...]:
    """The file `path` and those that it extends, one after another, as they are now."""
    found: list[_Version] = []
    other: Path | None = path
    while other is not None:
        found.append((other, other.stat().st_mtime_ns))
        other = _parent(_tree(*found[-1]), [file for file, _ in found])
    return tuple(found)


def _parent(tree: Node, below: Sequence[Path]) -> Path | None:
    """The file that the last of the files `below`, which holds `tree`, extends."""
    assert isinstance(tree.value, dict)
    if "extends" not in tree.value:
        return None
    path, other = below[-1], tree.value["extends"]
    name = str(other.value)
    folders = (path.parent, SHIPPED) if re.fullmatch(r"\w{1,100}", name) else ()
    parents = (folder / f"{name}.yaml" for folder in folders)
    # A table of one's own may have the name of the one that it extends.
    parent = next((p for p in parents if p.is_file() and p not in below), None)
    if parent is None:
        what = "extends itself" if name == path.stem else f"there is no table {name!r}"
        raise RecipeError(what, where=other.where)
    return parent


@cache
def _tree(path: Path, _: int) -> Node:
    tree = read_tree(path)
    if not isinstance(tree.value, dict):
        raise RecipeError("is no table", where=tree.where, expected="entries with names")
    return tree


@cache
def _loaded(lineage: tuple[_Version, ...]) -> TableFile:
    found = _validated(lineage)
    found.check()
    check_names(found.table, _known(lineage), found.tree)
    return found


@cache
def _validated(lineage: tuple[_Version, ...]) -> TableFile:
    tree = reduce(_over, (_tree(*version) for version in reversed(lineage)))
    path, _ = lineage[0]
    try:
        return TableFile(path.stem, Table.model_validate(tree.plain()), tree)
    except ValidationError as error:
        detail = error.errors()[0]
        # Without which of the kinds of items it is.
        entry = [part for part in detail["loc"] if part not in ("row", "group")]
        message = detail["msg"].removeprefix("Value error, ")
        shown = ".".join(map(str, entry))
        raise RecipeError(f"{shown}: {message}", where=tree.find(entry).where) from None


@cache
def _known(lineage: tuple[_Version, ...]) -> Known:
    """The names that rows have of a table, and of those that it extends."""
    own = known_names(_validated(lineage).table)
    return own | _known(lineage[1:]) if lineage[1:] else own


def _over(inherited: Node, tree: Node) -> Node:
    """What a table says, and what it takes of the one that it extends."""
    assert isinstance(inherited.value, dict) and isinstance(tree.value, dict)
    own = {key: node for key, node in tree.value.items() if key != "extends"}
    for key in _MERGED & inherited.value.keys() & own.keys():
        old, new = inherited.value[key].value, own[key].value
        if isinstance(old, dict) and isinstance(new, dict):
            own[key] = Node({**old, **new}, own[key].where)
    return Node({**inherited.value, **own}, tree.where)
