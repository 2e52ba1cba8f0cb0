"""Whether what a family table names beside its rows is there: in one of its rows, for some config.

Rows may be off by `when`, so a name is held against all of them, and those of the tables that it
extends, whose entries it may have taken.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from carnice_build.errors import RecipeError, nearest
from carnice_build.models.base import LINEARS
from carnice_build.models.table_schema import Group, Row, Table
from carnice_build.yaml_tree import Node

_WEIGHT = ".weight"


@dataclass(frozen=True)
class Known:
    """Names that rows have: of modules in a block, of linears among them, and of tensors.

    Tensors of groups have the number 0, linears a weight.
    """

    modules: frozenset[str]
    linears: frozenset[str]
    tensors: frozenset[str]

    def __or__(self, other: Known) -> Known:
        return Known(
            self.modules | other.modules, self.linears | other.linears, self.tensors | other.tensors
        )


def known_names(table: Table) -> Known:
    """The names of a table's own rows."""
    rows = [row for block in table.blocks.values() for row in block]
    weights = [row for row in rows if row.name.endswith(_WEIGHT)]
    return Known(
        frozenset(_modules(weights)),
        frozenset(_modules(row for row in weights if row.role in LINEARS)),
        frozenset(_tensors(table.model, table.blocks)),
    )


def _modules(rows: Iterable[Row]) -> Iterator[str]:
    return (row.name.removesuffix(_WEIGHT) for row in rows)


def _tensors(items: Sequence[Row | Group], blocks: Mapping[str, Sequence[Row]]) -> Iterator[str]:
    for item in items:
        if isinstance(item, Group):
            prefix = item.prefix.replace("{}", "0")
            yield from (prefix + row.name for row in blocks.get(item.rows, ()))
        else:
            yield item.name


def check_names(table: Table, known: Known, tree: Node) -> None:
    """Raise RecipeError for what the table, which is `tree`, names and no row has."""
    for path, name, linear in _named(table):
        names, what = (known.linears, "linear") if linear else (known.modules, "module")
        _require(name, names, f"{what} of a block", path, tree)
    for start in table.modules:
        if not any(name.startswith(start) for name in known.tensors):
            starts = {start for name in known.tensors for start in _starts(name)}
            _require(start, starts, "beginning of a row's name", ("modules", start), tree)
    for index, glob in enumerate(table.narrow):
        # A glob may mean one layer, whose number rows do not have.
        if not fnmatch.filter(known.tensors, re.sub(r"\d+", "*", glob)):
            _require(glob, known.tensors, "glob of a row's weight", ("narrow", index), tree)


def _named(table: Table) -> Iterator[tuple[Sequence[str | int], str, bool]]:
    """Where a module of a block is named, and whether it must be a linear."""
    lists: list[tuple[tuple[str | int, ...], Sequence[str]]] = [
        *((("inputs", place), group) for place, group in enumerate(table.inputs)),
        *((("fusions", fused), parts) for fused, parts in table.fusions.items()),
        *((("smoothing", i, "balance"), item.balance) for i, item in enumerate(table.smoothing)),
    ]
    for path, names in lists:
        yield from (((*path, index), name, True) for index, name in enumerate(names))
    for place, item in enumerate(table.smoothing):
        yield ("smoothing", place, "smooth"), item.smooth, False


def _starts(name: str) -> Iterator[str]:
    parts = name.split(".")
    return (".".join(parts[:count]) + "." for count in range(1, len(parts)))


def _require(
    name: str, names: Collection[str], what: str, path: Sequence[str | int], tree: Node
) -> None:
    if name not in names:
        raise RecipeError(
            f"{'.'.join(map(str, path))}: no row has {name!r}",
            where=tree.find(path).where,
            expected=f"the name of a {what}",
            nearest=nearest(name, sorted(names)),
        )
