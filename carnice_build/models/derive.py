"""A family table, as far as it follows from models of the family that differ.

Given names and shapes of models whose configs differ in one entry each, formulas are found for
sizes, for how often groups are there, and for when a model has a tensor.
What does not follow is said in the table, by comments that begin with `not known`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import combinations
from typing import Any

from carnice_build.models.base import Part, Role
from carnice_build.models.fitting import fit
from carnice_build.tensors import expert_of

SEVERAL = "several"
"""What a sample has changed that differs in more than one entry."""

_SHOWN_LAYERS = 12


@dataclass(frozen=True)
class Sample:
    """A model: the entry in which it differs from the first, its config, and its tensors' shapes.

    `entries` are named as in tables; the first sample of a series has changed nothing, and the
    others differ from it.
    """

    changed: str | None
    entries: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    series: str = ""


@dataclass(frozen=True)
class Owner:
    """What a tensor belongs to: the class of its module, and what follows from it."""

    kind: str
    part: Part
    role: Role
    offset: bool = False
    wide: bool = False
    transposed: bool = False


@dataclass(frozen=True, order=True)
class Place:
    """Where a row stands: in a group whose names begin with `prefix`, or in none."""

    prefix: str
    rest: str


Seen = dict[int | None, tuple[int, ...]]
"""The shape of a row's tensor by the number of the group's member; a stack's has its count."""


@dataclass(frozen=True)
class Condition:
    """What decides whether a model has a tensor."""

    text: str
    holds: Callable[[Mapping[str, Any], int | None], bool]


def parsed(name: str) -> tuple[Place, int | None, int | None]:
    """The row of a tensor, the number of its group's member, and that of its expert."""
    stack, found = expert_of(name) or (name, None)
    parts = stack.split(".")
    first = next((index for index, part in enumerate(parts) if part.isdigit()), None)
    if first is None:
        return Place("", stack), None, found
    prefix = ".".join([*parts[:first], "{}", ""])
    return Place(prefix, ".".join(parts[first + 1 :])), int(parts[first]), found


def rows_of(shapes: Mapping[str, tuple[int, ...]]) -> dict[Place, Seen]:
    """The rows of a model, those of stacks with the number of experts in front."""
    found: dict[Place, Seen] = {}
    counts: dict[tuple[Place, int | None], int] = {}
    for name, shape in shapes.items():
        place, member, expert = parsed(name)
        found.setdefault(place, {})[member] = shape
        if expert is not None:
            counts[place, member] = counts.get((place, member), 0) + 1
    for (place, member), count in counts.items():
        found[place][member] = (count, *found[place][member])
    return found


class Derivation:
    """What follows from samples."""

    def __init__(self, samples: Sequence[Sample], owners: Mapping[str, Owner]) -> None:
        """The first of `samples` is the one that the others differ from, and that has `owners`."""
        self.samples = samples
        self.base = samples[0]
        self.rows = [rows_of(sample.shapes) for sample in samples]
        self.owners = {parsed(name)[0]: owner for name, owner in owners.items()}
        self.unknown: list[str] = []
        self.used: set[str] = set()

    # --- what there is ----------------------------------------------------------------------------

    @cached_property
    def places(self) -> list[Place]:
        """All rows of all samples, in the order of the first."""
        return list(dict.fromkeys(place for rows in self.rows for place in rows))

    def members(self, index: int, prefix: str) -> set[int]:
        """The numbers of a group's members in sample `index`."""
        rows = self.rows[index]
        return {
            number
            for place, seen in rows.items()
            if place.prefix == prefix
            for number in seen
            if number is not None
        }

    @cached_property
    def decoder(self) -> str:
        """What the names of decoder layers begin with."""
        weights = [
            (sum(place.prefix == prefix for place in self.places), prefix)
            for prefix in {place.prefix for place in self.places if place.prefix}
            if any(
                owner.part is Part.LAYERS
                for place, owner in self.owners.items()
                if place.prefix == prefix
            )
        ]
        return max(weights)[1]

    @cached_property
    def kinds(self) -> str | None:
        """The entry that lists the kinds of decoder layers, None when there are none."""
        for name, value in self.base.entries.items():
            if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
                continue
            lists = [sample.entries.get(name) for sample in self.samples]
            layers = [len(self.members(i, self.decoder)) for i in range(len(self.samples))]
            if value and [len(found or ()) for found in lists] == layers:
                return name
        return None

    def kind(self, entries: Mapping[str, Any], layer: int | None) -> str | None:
        """The kind of a layer."""
        if self.kinds is None or layer is None:
            return None
        name = str(entries[self.kinds][layer])
        return name.removesuffix("_attention") or name

    # --- sizes ------------------------------------------------------------------------------------

    def _causes(self, values: Callable[[int], Any]) -> list[str]:
        """The entries whose change alone changes what `values` says of a sample.

        None stands for nothing that could be compared.
        """
        firsts = {
            sample.series: values(index)
            for index, sample in enumerate(self.samples)
            if sample.changed is None
        }
        found = {
            sample.changed
            for index, sample in enumerate(self.samples)
            if firsts[sample.series] is not None
            and values(index) not in (firsts[sample.series], None)
        }
        return [name for name in self.base.entries if name in found - {SEVERAL}]

    def _scope(self, index: int) -> dict[str, Any]:
        entries = self.samples[index].entries
        lists = {f"len({n})": len(v) for n, v in entries.items() if isinstance(v, list)}
        return {**entries, **lists}

    def count(self, prefix: str) -> str:
        """How many members a group has."""
        counts = [len(self.members(index, prefix)) for index in range(len(self.samples))]
        names = self._causes(lambda index: counts[index] or None)
        names += [f"len({name})" for name in names]
        there = [index for index, count in enumerate(counts) if count]
        found = fit([counts[i] for i in there], [self._scope(i) for i in there], names)
        if found is None:
            self.unknown.append(f"how many there are of {prefix}")
        return self._noted(found or str(counts[0]))

    def size(self, place: Place, axis: int, of: int = 1) -> str:
        """A size of a row's tensors, or that part of it which is one of `of`."""
        whole = self._fitted(place, axis, of, lambda index, member: True)
        if whole is not None:
            return self._noted(whole)
        kinds = sorted(
            {
                str(self.kind(self.base.entries, member))
                for member in self.rows[0].get(place, {})
                if self.kinds
            }
        )
        parts = []
        for kind in kinds:
            found = self._fitted(place, axis, of, self._is_kind(kind))
            parts.append((kind, found or self._shown(place, axis, of)))
        if not parts:
            parts = [("", self._shown(place, axis, of))]
        text = parts[-1][1]
        for kind, formula in reversed(parts[:-1]):
            text = f"({formula} if kind == '{kind}' else {text})"
        return self._noted(text)

    def _is_kind(self, kind: str) -> Callable[[int, int | None], bool]:
        return lambda index, member: self.kind(self.samples[index].entries, member) == kind

    def _shown(self, place: Place, axis: int, of: int) -> str:
        """The number that the first sample with such a tensor has."""
        seen = next(rows[place] for rows in self.rows if place in rows)
        number = next(iter(seen.values()))[axis] // of
        self.unknown.append(f"size {axis} of {place.prefix}{place.rest}, {number} in a sample")
        return str(number)

    def _fitted(
        self, place: Place, axis: int, of: int, wanted: Callable[[int, int | None], bool]
    ) -> str | None:
        def values(index: int) -> set[int] | None:
            seen = self.rows[index].get(place, {})
            return {shape[axis] for member, shape in seen.items() if wanted(index, member)} or None

        found = [(index, values(index)) for index in range(len(self.samples))]
        if any(sizes is not None and len(sizes) > 1 for _, sizes in found):
            return None
        there = [(index, sizes) for index, sizes in found if sizes]
        if all(self.samples[index].changed is not None for index, _ in there):
            return None  # no entry has been changed by itself where there is such a tensor
        targets = [size // of for _, sizes in there for size in sizes]
        return fit(targets, [self._scope(index) for index, _ in there], self._causes(values))

    def _noted(self, formula: str) -> str:
        self.used |= set(re.findall(r"[A-Za-z_][\w.]*", formula))
        return formula

    # --- conditions -------------------------------------------------------------------------------

    def when(self, place: Place) -> str | None:
        """When a model has a row's tensors; None for always."""
        cases = [
            (self.samples[index].entries, member, member in self.rows[index].get(place, {}))
            for index in range(len(self.samples))
            for member in (self.members(index, place.prefix) if place.prefix else (None,))
        ]
        if all(there for *_, there in cases):
            return None
        conditions = list(self._conditions(place))
        for count in (1, 2, 3):
            for chosen in combinations(conditions, count):
                met = [
                    all(c.holds(entries, member) for c in chosen) for entries, member, _ in cases
                ]
                text = " and ".join(condition.text for condition in chosen)
                if all(found is there for found, (*_, there) in zip(met, cases, strict=True)):
                    return self._noted(text)
                if all(found is not there for found, (*_, there) in zip(met, cases, strict=True)):
                    return self._noted(f"not ({text})")
        members = sorted(m for m in self.rows[0].get(place, {}) if m is not None)
        self.unknown.append(f"when there is {place.prefix}{place.rest}")
        return f"layer in {members[:_SHOWN_LAYERS]}" if place.prefix else "0"

    def _of_kind(self, kind: str, entries: Mapping[str, Any], layer: int | None) -> bool:
        return self.kind(entries, layer) == kind

    def _of_other_kind(self, kind: str, entries: Mapping[str, Any], layer: int | None) -> bool:
        return self.kind(entries, layer) != kind

    def _conditions(self, place: Place) -> Iterator[Condition]:
        if place.prefix == self.decoder and self.kinds:
            layers = self.members(0, place.prefix)
            for kind in sorted({str(self.kind(self.base.entries, layer)) for layer in layers}):
                yield Condition(f"kind == '{kind}'", partial(self._of_kind, kind))
                yield Condition(f"kind != '{kind}'", partial(self._of_other_kind, kind))
        causes = self._causes(lambda index: sorted(self.rows[index].get(place, {}), key=str))
        for name in causes:
            yield from _of_entry(name, bool(place.prefix))


def _of_entry(name: str, numbered: bool) -> Iterator[Condition]:
    """What may depend on an entry: on its being there, or on how it compares with a layer."""
    yield Condition(name, lambda entries, _: bool(entries.get(name)))
    yield Condition(f"not {name}", lambda entries, _: not entries.get(name))
    if not numbered:
        return

    def number(entries: Mapping[str, Any]) -> int:
        value = entries.get(name)
        return value if type(value) is int else 0

    def listed(entries: Mapping[str, Any]) -> Sequence[Any]:
        value = entries.get(name)
        return value if isinstance(value, list) else ()

    yield Condition(f"layer >= {name}", lambda e, i: int(i or 0) >= number(e))
    yield Condition(f"layer < {name}", lambda e, i: int(i or 0) < number(e))
    yield Condition(
        f"(layer + 1) % {name} == 0", lambda e, i: (int(i or 0) + 1) % max(number(e), 1) == 0
    )
    yield Condition(
        f"(layer + 1) % {name} != 0", lambda e, i: (int(i or 0) + 1) % max(number(e), 1) != 0
    )
    yield Condition(f"layer in {name}", lambda e, i: i in listed(e))
    yield Condition(f"layer not in {name}", lambda e, i: i not in listed(e))


def default_of(name: str, silent: Iterable[Sample]) -> str | None:
    """What an entry is by default, from configs that do not state it; None when that is unclear."""
    samples = list(silent)
    values = [sample.entries[name] for sample in samples]
    if any(type(value) is not int for value in values):
        return None
    causes = {
        str(sample.changed)
        for sample, value in zip(samples, values, strict=True)
        if value != values[0] and sample.changed
    }
    return fit(values, [sample.entries for sample in samples], sorted(causes))
