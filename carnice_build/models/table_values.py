"""What names and formulas of a family table mean for one config.

What is wrong in the config is a CheckpointError, what is wrong in the table a RecipeError.
"""

from __future__ import annotations

import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from carnice_build.errors import CheckpointError
from carnice_build.models.base import MOST_LAYERS, ConfigReader
from carnice_build.models.formulas import FormulaError, evaluate, names_in
from carnice_build.models.readers import Reader
from carnice_build.models.table_file import TableFile

_MOST_SIZE = 2**31 - 1


@dataclass
class _Scope:
    """What names mean in a formula: those given, values of the table, then the config's."""

    values: TableValues
    given: Mapping[str, Any] = field(default_factory=dict)

    def value(self, name: str) -> Any:
        if name in self.given:
            return self.given[name]
        return self.values.named(name, self.given)


class TableValues:
    """The formulas of a table, evaluated for a config."""

    def __init__(self, file: TableFile, reader: Reader) -> None:
        self._file = file
        self._table = file.table
        self._reader = reader
        self._named: dict[tuple[str, frozenset[Any] | None], Any] = {}
        self._sizes: dict[str, int] = {}

    def named(self, name: str, given: Mapping[str, Any]) -> Any:
        """What a name means where some are `given`; CheckpointError when the config lacks it."""
        layered = name in self._file.layered
        key = (name, frozenset(given.items()) if layered else None)
        if key not in self._named:
            value = self._table.values[name] if layered else None
            self._named[key] = (
                self._find(name) if value is None else self.evaluate(value, ("values", name), given)
            )
        return self._named[key]

    def _find(self, name: str) -> Any:
        table, entries = self._table, self._reader.text_entries
        section, _, entry = name.partition(".")
        if entry:
            return self._section_entry(section, entry)
        if name in table.values:
            return self.evaluate(table.values[name], ("values", name))
        if name in table.towers:
            return self._reader.root.states(name)
        if entries.get(name) is not None:
            return entries[name]
        if name in table.defaults:
            return self.evaluate(table.defaults[name], ("defaults", name))
        raise self._reader.text.error(name, "one")

    def _section_entry(self, section: str, entry: str) -> Any:
        name = f"{section}.{entry}"
        reader = self._section(section)
        value = reader.entries.get(entry)
        if value is not None:
            return value
        if name in self._table.defaults:
            return self.evaluate(self._table.defaults[name], ("defaults", name))
        raise reader.error(entry, "one")

    def evaluate(
        self, formula: str | int, path: Sequence[str | int], given: Mapping[str, Any] | None = None
    ) -> Any:
        try:
            return evaluate(str(formula), _Scope(self, given or {}))
        except FormulaError as error:
            self._blame_config(str(formula), given or {}, 0)
            raise self._file.error(
                path, f"the formula {formula!r} {error}", f"one that fits {self._reader.root.where}"
            ) from None

    def _default(self, name: str) -> str | int | None:
        """The formula that stands for an entry which the config does not state."""
        section, _, entry = name.rpartition(".")
        if not section:
            stated = self._reader.text_entries.get(entry)
        elif section == "root" or self._reader.root.states(section):
            stated = self._section(section).entries.get(entry)
        else:
            stated = None
        return self._table.defaults.get(name) if stated is None else None

    def _section(self, name: str) -> ConfigReader:
        root = self._reader.root
        return root if name == "root" else root.section(name)

    def _blame_config(
        self, formula: str, given: Container[str], least: int, seen: set[str] | None = None
    ) -> None:
        """Raise CheckpointError for an entry that is no number where one is needed.

        Of values that are built of values, those `seen` are not asked again.
        """
        seen = set() if seen is None else seen
        names = names_in(formula) - seen
        seen |= names
        for name in names:
            if name in given or name in self._table.towers:
                continue
            if name in self._table.values:
                self._blame_config(str(self._table.values[name]), given, least, seen)
            elif (default := self._default(name)) is not None and not names_in(str(default)):
                continue  # a number that the table has right, such as 0 for what is not there
            elif not isinstance(self.named(name, {}), list):
                self._check_size(name, least)

    def count(
        self,
        formula: str | int,
        path: Sequence[str | int],
        given: Mapping[str, Any] | None = None,
        *,
        least: int = 0,
    ) -> int:
        """How often something is there."""
        found = self.evaluate(formula, path, given)
        if isinstance(found, bool) or found is None:
            found = int(bool(found))
        if type(found) is not int or not least <= found <= MOST_LAYERS:
            name = str(formula)
            if re.fullmatch(r"[\w.]+", name) and not name.isdigit():
                raise self.entry_error(name, f"a count from {least} to {MOST_LAYERS}")
            raise CheckpointError(
                f"has {found!r} of what {formula!r} counts",
                where=self._reader.root.where,
                expected=f"{least} to {MOST_LAYERS}",
            )
        return found

    def entry_error(self, name: str, expected: str) -> CheckpointError:
        section, _, entry = name.partition(".")
        if not entry:
            return self._reader.text.error(name, expected)
        return self._section(section).error(entry, expected)

    def _check_size(self, name: str, least: int) -> None:
        value = self.named(name, {})
        if type(value) is int and least <= value <= _MOST_SIZE:
            return
        expected = f"a count from {least} to {_MOST_SIZE}"
        if (default := self._default(name)) is not None:
            self._blame_config(str(default), {}, least)
            what = f"the default {default!r} gives {value!r} for {self._reader.root.where}"
            raise self._file.error(("defaults", name), what, expected)
        raise self.entry_error(name, expected)

    def size(self, formula: str | int, path: Sequence[str | int], given: Mapping[str, Any]) -> int:
        """A size of a tensor."""
        text = str(formula)
        if text in self._sizes:
            return self._sizes[text]
        names = names_in(text)
        for name in names:
            if name not in given and name not in self._table.values and "[" not in text:
                self._check_size(name, 1)
        found = self.evaluate(text, path, given)
        if type(found) is not int or found < 1:
            self._blame_config(text, given, 1)
            raise self._file.error(
                path,
                f"the formula {text!r} gives {found!r} for {self._reader.root.where}",
                "a size of 1 or more",
            )
        if not names & (given.keys() | self._file.layered):
            self._sizes[text] = found
        return found
