"""Metadata by formulas over a config: the entries of a table, and what they are for one model."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from carnice_build.checkpoint.gguf_values import Value
from carnice_build.errors import CheckpointError
from carnice_build.formats.gguf.table import Parameter
from carnice_build.models.formulas import FormulaError, evaluate

_MOST_ITEMS = 10_000

_BITS: Mapping[str, tuple[int, int]] = {
    kind: (0, 2**bits - 1) if kind[0] == "u" else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    for kind, bits in (
        ("u8", 8),
        ("i8", 8),
        ("u16", 16),
        ("i16", 16),
        ("u32", 32),
        ("i32", 32),
        ("u64", 64),
        ("i64", 64),
    )
}


@dataclass
class ConfigScope:
    """Names of formulas: those given, values of the table, then entries of the config.

    `sections` are parts of the config by what formulas call them, as in `rope.rope_theta`; the
    first, of no name, is the text model's.  An entry that nobody states is None.
    """

    sections: Mapping[str, Mapping[str, Any]]
    given: Mapping[str, Any] = field(default_factory=dict)
    values: Mapping[str, str | int] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    where: str = "config.json"

    def value(self, name: str) -> Any:
        """See `formulas.Scope`."""
        if name in self.given:
            return self.given[name]
        if name in self.values:
            return self.evaluated(self.values[name])
        section, _, entry = name.rpartition(".")
        found = self.sections.get(section, {}).get(entry)
        if found is not None:
            return found
        default = self.defaults.get(name)
        return self.evaluated(default) if isinstance(default, str) else default

    def evaluated(self, formula: str | int, **given: Any) -> Any:
        """What a formula gives where some more names are given; CheckpointError if nothing."""
        scope = self if not given else self._with(given)
        try:
            return evaluate(str(formula), scope)
        except FormulaError as error:
            raise CheckpointError(f"{formula} {error}", where=self.where) from None

    def size(self, formula: str | int) -> int:
        """A number of rows, columns or heads; CheckpointError for what is none."""
        found = self.evaluated(formula)
        if type(found) is not int or not 0 <= found < 2**31:
            raise CheckpointError(f"{formula} is {found!r}", where=self.where, expected="a number")
        return found

    def _with(self, given: Mapping[str, Any]) -> ConfigScope:
        return ConfigScope(
            self.sections, {**self.given, **given}, self.values, self.defaults, self.where
        )


def evaluated_parameters(
    parameters: Iterable[Parameter], scope: ConfigScope, prefix: str, layers: Sequence[str]
) -> dict[str, Value]:
    """The entries that are there, in their order, as `prefix` has them.

    `layers` are the kinds of the layers, for entries that have a value for each.
    CheckpointError for a value that is not of its kind.
    """
    found: dict[str, Value] = {}
    for row in parameters:
        if row.when is not None and not scope.evaluated(row.when):
            continue
        value: Any = (
            [
                scope.evaluated(row.value, layer=layer, kind=kind)
                for layer, kind in enumerate(layers)
            ]
            if row.each
            else scope.evaluated(row.value)
        )
        if value is not None:
            key = row.key if row.key.startswith("general.") else f"{prefix}.{row.key}"
            found[key] = Value(row.kind, typed(value, row.kind, f"{scope.where}: {key}"))
    return found


def typed(value: Any, kind: str, where: str) -> Any:
    """A value as its kind has it; CheckpointError for one that is of another."""
    if kind.startswith("["):
        if not isinstance(value, list) or len(value) > _MOST_ITEMS:
            raise _wrong(value, kind, where)
        return [typed(item, kind[1:-1], where) for item in value]
    if not _CHECKS.get(kind, _whole(kind))(value):
        raise _wrong(value, kind, where)
    return float(value) if kind in ("f32", "f64") else value


def _wrong(value: Any, kind: str, where: str) -> CheckpointError:
    return CheckpointError(f"is {value!r}"[:100], where=where, expected=f"a value of kind {kind}")


def _whole(kind: str) -> Callable[[Any], bool]:
    least, most = _BITS.get(kind, (0, -1))
    return lambda value: type(value) is int and least <= value <= most


def _float(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        struct.pack("<f", value)
    except OverflowError:
        return False
    return True


_CHECKS: Mapping[str, Callable[[Any], bool]] = {
    "f32": _float,
    "f64": lambda value: isinstance(value, int | float) and not isinstance(value, bool),
    "bool": lambda value: isinstance(value, bool),
    "str": lambda value: isinstance(value, str),
}
