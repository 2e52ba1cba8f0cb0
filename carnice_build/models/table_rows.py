"""The tensors that a family table calls for with one config."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from carnice_build.errors import CheckpointError
from carnice_build.models.base import MOST_EXPERTS, FusedIn, Part, TensorFact
from carnice_build.models.formulas import names_in
from carnice_build.models.table_file import TableFile
from carnice_build.models.table_schema import FusedRow, Group, Row
from carnice_build.models.table_values import TableValues
from carnice_build.tensors import STACK


def _fused(row: FusedRow, prefix: str) -> FusedIn:
    turned = None if row.turned is None else prefix + row.turned
    return FusedIn(prefix + row.name, row.part, row.of, row.turns, turned)


class TableRows:
    """The rows of a table, written out for each layer that a model has.

    `layers` is the group of the decoder layers, `num_layers` how many there are, and `kinds` what
    each of them is.
    """

    def __init__(self, file: TableFile, values: TableValues, where: str) -> None:
        """The config, whose `values` these are, was found at `where`."""
        self._file = file
        self._table = file.table
        self._values = values
        self._where = where
        self.layers = self._layer_group()
        self.num_layers = values.count(self.layers.repeat, ("model",), least=1)
        self._check_lists()
        self._check_bounds()
        self.kinds = [self._kind(layer) for layer in range(self.num_layers)]

    def of_layer(self, layer: int) -> Mapping[str, Any]:
        """What names mean in a formula about a decoder layer."""
        return {"layer": layer, "kind": self.kinds[layer]}

    def _layer_group(self) -> Group:
        for item in self._table.model:
            if isinstance(item, Group) and item.part is Part.LAYERS:
                return item
        raise self._file.error(("model",), "has no decoder layers", "a group of part `layers`")

    def _check_lists(self) -> None:
        """Raise CheckpointError for a list of what each layer is that has another length."""
        for name in names_in(str(self._table.kind)) - {"layer"} - self._file.layered:
            value = self._values.named(name, {})
            if isinstance(value, list) and value and len(value) != self.num_layers:
                raise self._values.entry_error(name, f"{self.num_layers} entries")

    def _check_bounds(self) -> None:
        """Raise CheckpointError for an entry that is more than there is, or divides it not."""
        for index, bound in enumerate(self._table.bounds):
            for key, formula in (("most", bound.most), ("divides", bound.divides)):
                if formula is None:
                    continue
                count = self._values.evaluate(formula, ("bounds", index, key))
                if type(count) is not int or count < 1:
                    continue  # such as no experts at all
                value = self._values.named(bound.entry, {})
                divides = key == "divides"
                if type(value) is int and 1 <= value <= count and not (divides and count % value):
                    continue
                expected = f"a divisor of {count}" if divides else f"1 to {count}"
                raise self._values.entry_error(bound.entry, f"{expected}, by {formula}")

    def _kind(self, layer: int) -> str:
        kind = self._values.evaluate(self._table.kind, ("kind",), {"layer": layer})
        if not isinstance(kind, str):
            raise self._file.error(("kind",), f"gives {kind!r} for layer {layer}", "a name")
        return kind.removesuffix("_attention") or kind

    def prefixes(self, *parts: Part) -> Iterator[str]:
        """What the names of each layer of these parts begin with."""
        for index, item in enumerate(self._table.model):
            if not isinstance(item, Group) or item.part not in parts:
                continue
            if item.when is None or self._values.evaluate(item.when, ("model", index, "when")):
                yield from (prefix for _, prefix in self._members(item, ("model", index)))

    @cached_property
    def facts(self) -> Mapping[str, tuple[TensorFact, Row]]:
        """Every tensor by its name, in the model's order, and the row that it is of."""
        found: dict[str, tuple[TensorFact, Row]] = {}
        fused: dict[str, list[tuple[Sequence[str | int], TensorFact]]] = {}
        for path, fact, row in self._facts():
            if fact.name in found:
                raise self._file.error(
                    path, f"names the tensor {fact.name!r} once more", "each of them once"
                )
            found[fact.name] = fact, row
            if fact.fused is not None:
                fused.setdefault(fact.fused.name, []).append((path, fact))
        for name, stacks in fused.items():
            self._check_fused(name, stacks)
        return found

    def _check_fused(
        self, name: str, stacks: Sequence[tuple[Sequence[str | int], TensorFact]]
    ) -> None:
        """Raise RecipeError unless the stacks that a tensor holds are all of it, each once."""
        for path, fact in stacks:
            if not fact.stacked:
                what = f"{fact.name!r} is no stack, so that {name!r} cannot hold it"
                raise self._file.error((*path, "fused"), what, "a `*` in its name")
        path, last = stacks[-1]
        wholes = {(fact.shape, fact.fused and replace(fact.fused, part=0)) for _, fact in stacks}
        parts = sorted(fact.fused.part for _, fact in stacks if fact.fused)
        assert last.fused is not None
        if len(wholes) > 1 or parts != list(range(last.fused.of)):
            shown = ", ".join(map(str, parts))
            raise self._file.error(
                (*path, "fused"),
                f"of {name!r} there are the parts {shown}",
                "stacks of one shape that are all of it, each once",
            )

    def _facts(self) -> Iterator[tuple[Sequence[str | int], TensorFact, Row]]:
        for index, item in enumerate(self._table.model):
            path = ("model", index)
            if isinstance(item, Group):
                yield from self._group(item, path)
            elif fact := self._fact(item, path, "", item.part or Part.BODY, None, {}):
                yield path, fact, item

    def _group(
        self, group: Group, path: Sequence[str | int]
    ) -> Iterator[tuple[Sequence[str | int], TensorFact, Row]]:
        if group.when is not None and not self._values.evaluate(group.when, (*path, "when")):
            return
        rows = self._table.blocks.get(group.rows)
        if rows is None:
            raise self._file.error(
                (*path, "rows"), f"there is no block {group.rows!r}", "one of `blocks`"
            )
        for number, prefix in self._members(group, path):
            layer = number if group.part is Part.LAYERS else None
            given: dict[str, Any] = {"layer": number}
            if layer is not None:
                given["kind"] = self.kinds[layer]
            elif group.kind is not None:
                given["kind"] = self._values.evaluate(group.kind, (*path, "kind"), given)
            for place, row in enumerate(rows):
                where = ("blocks", group.rows, place)
                if fact := self._fact(row, where, prefix, group.part, layer, given):
                    yield where, fact, row

    def _members(self, group: Group, path: Sequence[str | int]) -> Iterator[tuple[int, str]]:
        """The numbers of a group, and what the names of each begin with."""
        first = self._values.count(group.first, (*path, "first"))
        for number in range(first, first + self._values.count(group.repeat, (*path, "repeat"))):
            yield number, group.prefix.replace("{}", str(number))

    def _fact(
        self,
        row: Row,
        path: Sequence[str | int],
        prefix: str,
        part: Part,
        layer: int | None,
        given: Mapping[str, Any],
    ) -> TensorFact | None:
        """The tensor of a row, None when this model has it not."""
        if row.when is not None and not self._values.evaluate(row.when, (*path, "when"), given):
            return None
        shape = tuple(
            self._values.size(size, (*path, "shape", index), given)
            for index, size in enumerate(row.shape)
        )
        if STACK in row.name and shape[0] > MOST_EXPERTS:
            raise CheckpointError(
                f"has {shape[0]} experts in a layer by {row.shape[0]}",
                where=self._where,
                expected=f"at most {MOST_EXPERTS}",
            )
        fused = None if row.fused is None else _fused(row.fused, prefix)
        name, own = prefix + row.name, row.part or part
        return TensorFact(name, shape, own, row.role, layer, fused, row.optional)
