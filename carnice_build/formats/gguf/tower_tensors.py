"""The tensors of the file of a model's towers, which llama.cpp calls a projector."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from carnice_build.checkpoint.json import json_object
from carnice_build.errors import CheckpointError, PlanError
from carnice_build.formats.gguf.model_tensors import heads_of
from carnice_build.formats.gguf.named import Kind, Named, Place, spelled
from carnice_build.formats.gguf.parameters import ConfigScope
from carnice_build.formats.gguf.refs import computed_ref, frame_of, row_of, swapped_ref
from carnice_build.formats.gguf.table import Projector
from carnice_build.formats.gguf.tokenizer_file import CONFIG, NAME
from carnice_build.graph import ActionGraph, TensorRef, View
from carnice_build.models.base import Architecture, Part, TensorFact

_FRAMES = 2

_NUMBER = re.compile(r"\d{1,9}", re.ASCII)


class _Spot(NamedTuple):
    """What a table calls a tensor, what it calls it in GGUF, and GGUF's whole name; see
    `Projector`."""

    key: str
    end: str
    name: str


class TowerTensors:
    """Makes the tensors of the file of the towers."""

    def __init__(
        self,
        table: Projector,
        architecture: Architecture,
        graph: ActionGraph,
        scope: ConfigScope,
    ) -> None:
        self._table = table
        self._scope = scope
        self._architecture = architecture
        self._graph = graph

    def named(self, fact: TensorFact, ref: TensorRef) -> Sequence[Named]:
        """The tensors of the file that a tensor of the view becomes."""
        table = self._table
        if table.unread is not None and fact.name.startswith(table.unread):
            return []
        spot = self._spot(fact)
        ref = self._made(ref, fact, spot)
        name = spot.name
        if fact.name not in table.frames:
            small = len(ref.spec.shape) <= 1 or name == "v.position_embd.weight"
            kind: Kind = table.kinds.get(spot.end, "F32" if small else "matrix")
            return [Named(name, ref, fact, kind)]
        if ref.spec.shape[2] != _FRAMES:
            raise PlanError(
                f"the tower looks at {ref.spec.shape[2]} frames at once",
                expected=f"{_FRAMES}, as llama.cpp does",
                at=("format",),
            )
        names = frame_names(name, ref.spec.shape)
        return [
            Named(each, frame_of(ref, number), fact, "half") for number, each in enumerate(names)
        ]

    def place(self, fact: TensorFact) -> Place:
        """See `places`."""
        spot = self._spot(fact)
        frames = fact.name in self._table.frames
        swap = self._table.swaps.get(spot.key)
        heads = heads_of(swap, self._scope) if swap else None
        how = self._how(fact, spot)
        if not frames:
            return Place(fact, [spot.name], self._shape(fact.shape, spot), heads, how)
        shape = fact.shape[:2] + fact.shape[3:]
        return Place(fact, frame_names(spot.name, fact.shape), shape, heads, how)

    def _made(self, ref: TensorRef, fact: TensorFact, spot: _Spot) -> TensorRef:
        """A tensor as llama.cpp has it, still of any float type."""
        if (swap := self._table.swaps.get(spot.key)) is not None:
            ref = swapped_ref(ref, swap, self._scope)
        ref = ref.reshaped(*self._shape(ref.spec.shape, spot))
        return computed_ref(self._graph, ref, self._how(fact, spot))

    def _shape(self, shape: tuple[int, ...], spot: _Spot) -> tuple[int, ...]:
        """What llama.cpp has for the `shape` of a tensor of the model."""
        if (stated := self._table.shapes.get(spot.key)) is not None:
            shape = tuple(map(self._scope.size, stated))
        return shape or (1,)

    def _how(self, fact: TensorFact, spot: _Spot) -> str | None:
        if self._architecture.offset_norm(fact.name):
            return "add_one"
        return self._table.functions.get(spot.key)

    def _spot(self, fact: TensorFact) -> _Spot:
        for blocks in self._table.blocks:
            if fact.name.startswith(blocks.prefix):
                number, _, key = fact.name.removeprefix(blocks.prefix).partition(".")
                if (end := spelled(blocks.modules, key)) is not None:
                    return _Spot(key, end, f"{blocks.name}.{number}.{end}")
        if (name := spelled(self._table.tensors, fact.name)) is not None:
            return _Spot(fact.name, name, name)
        raise PlanError(f"GGUF has no name for tensor {fact.name!r}", at=("format",))


def frame_names(name: str, shape: Sequence[int]) -> Sequence[str]:
    """By the shape of a convolution [out, in, frames, ...]."""
    return [name, *(f"{name}.{number}" for number in range(1, shape[2]))]


def token_rows(
    table: Projector,
    view: View,
    facts: Mapping[str, TensorFact],
    files: Mapping[str, bytes],
    where: str,
) -> Iterable[Named]:
    """The rows of the embedding that a tower brings along."""
    for name, token in table.tokens.items():
        fact = next(facts[tensor] for tensor in view if facts[tensor].part is Part.EMBED)
        number, rows = _token_number(token, files, where), fact.shape[0]
        if not 0 <= number < rows:
            raise CheckpointError(f"{token} is token {number} of {rows}", where=where)
        made = row_of(view[fact.name], number)
        yield Named(name, made, replace(fact, part=Part.TOWER), "F32")


def _token_number(token: str, files: Mapping[str, bytes], where: str) -> int:
    """The number of an added token; CheckpointError where the tokenizer does not have it."""
    for file in (CONFIG, NAME):
        entries = json_object(f"{where}/{file}", files.get(file, b"{}"))
        listed = entries.get("added_tokens_decoder", entries.get("added_tokens"))
        if isinstance(listed, dict):
            items = [(key, item) for key, item in listed.items() if _NUMBER.fullmatch(key)]
            listed = [{**item, "id": int(key)} for key, item in items if isinstance(item, dict)]
        for item in listed if isinstance(listed, list) else ():
            if isinstance(item, dict) and item.get("content") == token:
                number = item.get("id")
                if type(number) is int:
                    return number
    raise CheckpointError(f"the tokenizer has no token {token}", where=where)
