"""What a server's own parser takes, by the tables that `benchmarks/make_options.py` makes.

The parser refuses at the start of a launch what is checked here when a recipe is planned.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.resources import files
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from carnice_build.errors import PlanError, nearest
from carnice_build.recipe.serve import FlagValue

Kind = Literal["switch", "int", "float", "size", "text", "list", "section"]
"""`size` is a count that may be written as 16k; a `section` is written as JSON."""

_SAID: Mapping[Kind, str] = {
    "switch": "true or false",
    "int": "a whole number",
    "float": "a number",
    "size": "a whole number, or one as 16k",
    "text": "a text",
    "list": "a list",
    "section": "keys and values",
}
_SIZE = re.compile(r"\d+|\d+(\.\d+)?[kmgt]|\d+[KMGT]")
_UNITS = {
    **{unit: 1000**power for power, unit in enumerate("kmgt", 1)},
    **{unit: 1024**power for power, unit in enumerate("KMGT", 1)},
}
_MOST_CHOICES = 12
"""Choices that an error lists."""


class _Fact(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    types: tuple[Kind, ...]
    choices: tuple[str | int, ...] = ()
    folded: bool = False


class KeyFact(_Fact):
    """A key of an option that is written as JSON; without `types` it may be anything."""


class OptionFact(_Fact):
    """An option of a server.

    `off` is the option that is its opposite, `also` what it takes beside its types, `many` says
    that several values may follow it, `keys` are those of its JSON where the server knows them.
    `choices` that are `folded` may be written in any case.
    """

    off: str | None = None
    aliases: tuple[str, ...] = ()
    short: tuple[str, ...] = ()
    also: tuple[str, ...] = ()
    many: bool = False
    default: bool | int | float | str | None = None
    keys: dict[str, KeyFact] = Field(default_factory=dict)


class OptionTable(BaseModel):
    """All options of one release of a server, by their names without dashes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    program: str
    version: str
    options: dict[str, OptionFact]

    @cached_property
    def names(self) -> Mapping[str, OptionFact]:
        """The options by every name that they have; an opposite is a switch that is never off."""
        found = dict(self.options)
        for fact in self.options.values():
            found |= dict.fromkeys(fact.aliases, fact)
            if fact.off:
                found[fact.off] = OptionFact(types=("switch",))
        return found

    def default(self, name: str) -> int | float | str | None:
        """What holds where option `name` is left out.

        None for a switch that is off, and where the server works it out.
        """
        fact = self.options.get(name)
        return fact.default if fact and fact.default is not False else None


@dataclass(frozen=True)
class Misfit:
    """Why an option does not take a value; `key` is that of its JSON which is to blame."""

    what: str
    expected: str | None = None
    nearest: str | None = None
    key: str | None = None

    def error(self, at: tuple[str, ...]) -> PlanError:
        """The error for the option at `at`."""
        return PlanError(
            self.what,
            expected=self.expected,
            nearest=self.nearest,
            at=at if self.key is None else (*at, self.key),
        )


@cache
def option_table(name: str) -> OptionTable:
    """The table `name`, such as vllm-0.32.0."""
    path = files(__package__).joinpath("data", "options", f"{name}.json")
    return OptionTable.model_validate_json(path.read_text("utf-8"))


def misfit(
    name: str, value: FlagValue, fact: OptionFact, more: Iterable[str] = ()
) -> Misfit | None:
    """Why option `name` does not take `value`, None where it does; `more` are further choices."""
    if not isinstance(value, dict):
        return _scalar_misfit(name, value, fact, (*fact.also, *more))
    if "section" not in fact.types:
        return Misfit(f"{name} takes no keys", _expected(fact))
    for key, item in value.items():
        known = fact.keys.get(key)
        if known is None:
            if fact.keys:
                near = nearest(key, fact.keys)
                return Misfit(f"{name} has no key {key!r}", nearest=near, key=key)
        elif known.types and (found := _key_misfit(f"{name}: {key}", item, known)):
            return Misfit(found.what, found.expected, found.nearest, key)
    return None


def _key_misfit(name: str, value: Any, fact: KeyFact) -> Misfit | None:
    if isinstance(value, list):
        return None if "list" in fact.types else Misfit(f"{name} is a list", _expected(fact))
    # In JSON a number is none in quotes, and true is no text.
    strict = {bool: {"switch"}, int: {"int", "float", "size"}, float: {"float"}, str: {"text"}}
    if not strict[type(value)] & set(fact.types):
        return Misfit(f"{name} is {value!r}", _expected(fact))
    return _choice_misfit(name, value, fact)


def _scalar_misfit(
    name: str, value: bool | int | float | str, fact: OptionFact, more: tuple[str, ...]
) -> Misfit | None:
    if isinstance(value, bool):
        # `false` leaves an option out, so only `true` comes here.
        return None if "switch" in fact.types else Misfit(f"{name} has no value", _expected(fact))
    if str(value) in more:
        return None
    if not any(_reads(kind, str(value)) for kind in fact.types):
        return Misfit(f"{name} is {value!r}", _expected(fact))
    return _choice_misfit(name, value, fact)


def _choice_misfit(name: str, value: bool | int | float | str, fact: _Fact) -> Misfit | None:
    text = str(value)
    if not fact.choices or (text.lower() if fact.folded else text) in map(str, fact.choices):
        return None
    near = nearest(text, [str(choice) for choice in fact.choices])
    return Misfit(f"{name} is {value!r}", None if near else _expected(fact), near)


def _reads(kind: Kind, text: str) -> bool:
    """Whether a command's argument is of a kind."""
    if kind == "text":
        return True
    if kind == "size":
        return _SIZE.fullmatch(text) is not None
    try:
        {"int": int, "float": float}[kind](text)
    except (KeyError, ValueError):
        return False
    return True


def size_in_full(text: str) -> int | None:
    """16000 for 16k and 16384 for 16K, as vLLM reads them; None for what is no size."""
    if not _SIZE.fullmatch(text):
        return None
    unit = _UNITS.get(text[-1])
    return int(text) if unit is None else int(float(text[:-1]) * unit)


def _expected(fact: _Fact) -> str:
    if not fact.choices:
        return " or ".join(_SAID[kind] for kind in fact.types)
    listed = [str(choice) for choice in fact.choices[:_MOST_CHOICES]]
    return " or ".join(listed) + (" or others" if len(fact.choices) > _MOST_CHOICES else "")
