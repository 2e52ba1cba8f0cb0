"""The tensors of a model's own GGUF file, out of those of its architecture."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from carnice_build.checkpoint.known import known_floats
from carnice_build.errors import PlanError
from carnice_build.formats.gguf.constants import constant_numbers
from carnice_build.formats.gguf.named import HeadPart, HeadsSwapped, Kind, Named, Place, spelled
from carnice_build.formats.gguf.parameters import ConfigScope
from carnice_build.formats.gguf.refs import (
    computed_ref,
    cut_ref,
    first_rows,
    merged_stacks,
    packed_codes,
    source_of,
    swapped_ref,
)
from carnice_build.formats.gguf.table import Swap, Table
from carnice_build.graph import ActionGraph, TensorRef, View
from carnice_build.models.base import Architecture, Part, Role, TensorFact
from carnice_build.steps.base import Codes

_WHOLE = frozenset({"ffn_gate_inp", "ffn_gate_inp_shexp", "ssm_conv1d", "shortconv.conv"})
"""Matrices of layers that stay F32."""

_EMBEDDING = "embed_tokens.weight"
"""How the names of the tensors end that lose rows; others have one for each token, too."""


class Block(NamedTuple):
    """A block of llama.cpp's, and what a name says behind its prefix."""

    number: int
    rest: str


def plain(name: str) -> str:
    return name.replace("language_model.", "")


def block_of(name: str, architecture: Architecture, table: Table) -> Block | None:
    """The block that a tensor belongs to; those of the MTP head follow on the model's."""
    found = _LAYER.fullmatch(plain(name))
    if found is None:
        return None
    head, number, rest = found.groups()
    if head == "mtp":
        return Block(architecture.num_layers + int(number) // table.rounds, rest)
    return Block(int(number), rest)


_LAYER = re.compile(r"(mtp|model|backbone)\.layers\.(\d{1,6})\.(.+)")


class ModelTensors:
    """Makes the tensors of a model's own file."""

    def __init__(
        self,
        table: Table,
        architecture: Architecture,
        graph: ActionGraph,
        scope: ConfigScope,
        tokens: int | None,
        view: View,
    ) -> None:
        """Of the embedding no more rows are kept than there are `tokens`, if that is known."""
        self._table = table
        self._architecture = architecture
        self._graph = graph
        self._scope = scope
        self._tokens = tokens
        self._view = view

    def constants(self) -> Iterable[Named]:
        """What no checkpoint holds, which comes before all that it does."""
        for name, constant in self._table.constants.items():
            if self._scope.evaluated(constant.when):
                made = known_floats(name, constant_numbers(constant.how, self._scope))
                fact = TensorFact(name, made.spec.shape, Part.BODY, Role.STATE)
                yield Named(name, TensorRef(made.spec, made), fact, "F32")

    def coded(self, tensor: str, ref: TensorRef, codes: Codes) -> Named:
        """A tensor with the codes that it has; they come before all others."""
        fact = self._architecture.tensors[tensor]
        name = self._name(fact, block_of(tensor, self._architecture, self._table))
        return Named(name, ref, fact, "MXFP4", codes=packed_codes(codes, self._graph))

    def named(self, tensor: str, ref: TensorRef) -> Iterable[Named]:
        """The tensors of the file that a tensor of the view becomes."""
        table, fact = self._table, self._architecture.tensors[tensor]
        block = block_of(tensor, self._architecture, table)
        rest = block.rest if block else ""
        if block is not None and rest in table.cuts:
            for name, made in cut_ref(ref, table.cuts[rest], self._scope):
                yield Named(f"blk.{block.number}.{name}", made, fact, _kind(name, made.spec.shape))
        elif block is not None and rest in table.merges:
            merge = table.merges[rest]
            other = self._followed(fact, rest)
            made = merged_stacks(source_of(ref), source_of(self._view[other.name]))
            name = f"blk.{block.number}.{merge.name}"
            yield Named(name, made, fact, "matrix", merged=other)
        elif rest not in [merge.other for merge in table.merges.values()]:
            name, made = self._name(fact, block), self._made(fact, ref, rest)
            kind = _kind(name, made.spec.shape)
            if kind == "F32" and self._moved(tensor) and _by_number(name):
                kind = "matrix"
            swap = table.swaps.get(rest)
            heads = heads_of(swap, self._scope) if swap is not None and swap.columns else None
            yield Named(name, made, fact, kind, heads)

    def place(self, fact: TensorFact) -> Place:
        """See `places`."""
        table, size = self._table, self._scope.size
        block = block_of(fact.name, self._architecture, table)
        rest = block.rest if block else ""
        if block is not None and rest in table.cuts:
            parts = table.cuts[rest].parts
            rows = [HeadPart(size(part.start), size(part.rows), part.turned) for part in parts]
            names = [f"blk.{block.number}.{part.name}" for part in parts]
            return Place(fact, names, heads=size(table.cuts[rest].heads), parts=rows)
        if block is not None and rest in table.merges:
            name = f"blk.{block.number}.{table.merges[rest].name}"
            experts, count, columns = fact.shape
            other = self._followed(fact, rest)
            return Place(fact, [name], (experts, 2 * count, columns), merged=other)
        swap = table.swaps.get(rest)
        heads = heads_of(swap, self._scope) if swap else None
        shape = self._shape(fact.shape, rest)
        return Place(fact, [self._name(fact, block)], shape, heads, self._how(fact, rest))

    def _followed(self, fact: TensorFact, rest: str) -> TensorFact:
        """The stack whose rows follow on those of `fact`, whose name ends with `rest`."""
        name = fact.name.removesuffix(rest) + self._table.merges[rest].other
        return self._architecture.tensors[name]

    def _moved(self, tensor: str) -> bool:
        """Whether the converter gives the tensor the number of a block after it knew its kind."""
        return self._table.rounds > 1 and self._architecture.tensors[tensor].part is Part.MTP

    def _name(self, fact: TensorFact, block: Block | None) -> str:
        table, name = self._table, plain(fact.name)
        if (found := spelled(table.mtp, name)) is not None:
            number = self._architecture.num_layers
        elif block is not None:
            found = spelled(table.layer, block.rest)
            number = block.number
        else:
            found, number = spelled(table.model, name), -1
        if found is None:
            raise PlanError(f"GGUF has no name for tensor {fact.name!r}", at=("format",))
        return found if number < 0 else f"blk.{number}.{found}"

    def _made(self, fact: TensorFact, ref: TensorRef, rest: str) -> TensorRef:
        """A tensor as llama.cpp has it, still of any float type."""
        table = self._table
        if (swap := table.swaps.get(rest)) is not None:
            ref = swapped_ref(ref, swap, self._scope)
        if self._tokens is not None and fact.name.endswith(_EMBEDDING):
            ref = first_rows(ref, self._tokens)
        ref = ref.reshaped(*self._shape(ref.spec.shape, rest))
        return computed_ref(self._graph, ref, self._how(fact, rest))

    def _shape(self, shape: tuple[int, ...], rest: str) -> tuple[int, ...]:
        """What llama.cpp has for the `shape` of a tensor of the model."""
        if (stated := self._table.shapes.get(rest)) is not None:
            shape = tuple(map(self._scope.size, stated))
        return tuple(size for size in shape if size != 1) if rest in self._table.squeezed else shape

    def _how(self, fact: TensorFact, rest: str) -> str | None:
        table = self._table
        how = table.functions.get(rest)
        if how is None and table.offsets and self._architecture.offset_norm(fact.name):
            how = "add_one"
        return how


def heads_of(swap: Swap, scope: ConfigScope) -> HeadsSwapped:
    size = scope.size
    counts = size(swap.first), size(swap.second), size(swap.size)
    return HeadsSwapped(*counts, size(swap.skip), swap.columns)


def _kind(name: str, shape: Sequence[int]) -> Kind:
    """What the converter writes of a tensor of a model's own file."""
    module, _, end = name.rpartition(".")
    small = len(shape) <= 1 or end != "weight" or module.endswith("_norm")
    return "F32" if small or _by_number(name) else "matrix"


def _by_number(name: str) -> bool:
    """Whether it is a matrix that stays F32; the converter knows it by its block's number."""
    module, _, end = name.rpartition(".")
    return end == "weight" and module.split(".", 2)[-1] in _WHOLE
