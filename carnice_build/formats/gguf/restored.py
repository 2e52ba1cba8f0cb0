"""The tensors of GGUF files by the names of their model: undone is what the converter does to them.

Nothing is read before rows are asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import gcd, prod
from typing import NamedTuple

import numpy as np

from carnice_build.checkpoint.gguf_header import Described, read_gguf
from carnice_build.checkpoint.rows import FillRows, RowsOfTensor
from carnice_build.checkpoint.stack import slab_rows, stacked
from carnice_build.checkpoint.swapped import swapped_columns, swapped_rows
from carnice_build.checkpoint.turned import turned_stack
from carnice_build.dtypes import ITEM_SIZE, TensorSpec
from carnice_build.formats.checks import Tensors
from carnice_build.formats.gguf.named import HeadPart, HeadsSwapped, Place
from carnice_build.formats.gguf.naming import places
from carnice_build.formats.values import Floats
from carnice_build.models.base import Architecture, Role, TensorFact
from carnice_build.tensors import ByteSource, Reader, SourceTensor, members, numbered


@dataclass(frozen=True)
class BlockTensor(SourceTensor):
    """Rows of blocks of a type of ggml, U8 [..., bytes of a row].

    Their columns are those of the model, or `swapped` of these.
    """

    kind: str = ""
    swapped: HeadsSwapped | None = None


class HeldPart(NamedTuple):
    """Some rows of each head, as `part` says, and the tensor that has them.

    That is of blocks, or [heads * rows, columns] of floats, of what is turned [heads * columns,
    rows].
    """

    part: HeadPart
    tensor: SourceTensor


@dataclass(frozen=True)
class HeadsTensor(SourceTensor):
    """A matrix of which the rows of heads are in several tensors, and some of these in blocks.

    It has the first one's bytes, which say nothing alone.
    """

    heads: int = 0
    parts: Sequence[HeldPart] = ()


def restored(tensors: Tensors, architecture: Architecture) -> Mapping[str, Tensors]:
    """By the name of a tensor in files, what it is of the model, by the names of that.

    A stack of experts is one tensor for each of them.
    What has another shape than llama.cpp wants, nobody's converter has made: it stays as it is.
    """
    described = _described(tensors)
    kinds = {name: item.type for name, item in described.items() if item.type not in ITEM_SIZE}
    found: dict[str, Tensors] = {}
    for place in places(architecture):
        if all(name in tensors for name in place.names) and _fits(place, described):
            first, *others = place.names
            if place.parts:
                found[first] = {place.fact.name: _uncut(place, tensors, kinds)}
            elif place.merged is not None:
                found[first] = dict(_apart(place.fact, place.merged, tensors[first], kinds))
            else:
                found[first] = dict(_restored(place, tensors, kinds))
            found |= dict.fromkeys(others, found[first])
    return found


def _described(tensors: Tensors) -> Mapping[str, Described]:
    """What the headers of their files say of tensors."""
    files: dict[int, ByteSource] = {
        id(tensor.file): tensor.file for tensor in tensors.values() if tensor.file is not None
    }
    return {item.name: item for file in files.values() for item in read_gguf(file).described}


def _fits(place: Place, described: Mapping[str, Described]) -> bool:
    """Whether tensors have the shapes of their place, and what was computed is in F32."""
    if place.how is not None and described[place.names[0]].type != "F32":
        return False
    found = {name: described[name].shape for name in place.names}
    if place.parts:
        matrices = {name: (prod(shape[:-1]), shape[-1]) for name, shape in found.items()}
        return matrices == _matrices_of_parts(place)
    wanted = tuple(place.shape) or (1,)
    if place.fact.role is Role.EMBEDDING:
        # Some families leave out the rows that stand for no token.
        (shape,) = found.values()
        return shape[1:] == wanted[1:] and 0 < shape[0] <= wanted[0]
    return all(shape == wanted for shape in found.values())


def _matrices_of_parts(place: Place) -> Mapping[str, tuple[int, int]]:
    """Rows and columns of the tensors of a matrix whose heads were cut."""
    found: dict[str, tuple[int, int]] = {}
    own = place.fact.shape[-1]
    for part, name in zip(place.parts, place.names, strict=True):
        rows, columns = (own, part.rows) if part.turned else (part.rows, own)
        found[name] = found.get(name, (0, 0))[0] + place.heads * rows, columns
    return found


def _restored(
    place: Place, tensors: Tensors, kinds: Mapping[str, str]
) -> Iterator[tuple[str, SourceTensor]]:
    fact, swap = place.fact, place.swapped
    tensor, *others = (tensors[name] for name in place.names)
    kind = kinds.get(tensor.name)
    if others:
        tensor = _joined([tensor, *others], fact.shape)
    if place.how is not None:
        tensor = replace(tensor, file=_Undone(tensor, place.how), offset=0)
    if kind is None and tensor.spec.size == prod(fact.shape):
        tensor = replace(tensor, spec=TensorSpec(tensor.spec.dtype, fact.shape))
    if swap is not None and not swap.columns:
        tensor = swapped_rows(tensor, swap.second, swap.first, swap.size, swap.skip)
    if swap is not None and swap.columns and kind is None:
        tensor = swapped_columns(tensor, swap.second, swap.first, swap.size)
    offset = tensor.offset
    for name, spec in members(fact.name, tensor.spec):
        one = SourceTensor(name, spec, tensor.file, offset)
        offset += spec.nbytes
        if kind is not None:
            columns = swap if swap is not None and swap.columns else None
            one = BlockTensor(name, spec, tensor.file, one.offset, None, kind, columns)
        yield name, one


def _apart(
    first: TensorFact, second: TensorFact, tensor: SourceTensor, kinds: Mapping[str, str]
) -> Iterator[tuple[str, SourceTensor]]:
    """Two stacks of experts out of the one that has the rows of both."""
    experts, rows, _ = tensor.spec.shape
    kind = kinds.get(tensor.name)
    for fact, start in (first, 0), (second, rows // 2):
        for index, name in enumerate(numbered(fact.name, experts)):
            one = slab_rows(tensor, index, start, start + rows // 2)
            one = replace(one, name=name)
            yield name, one if kind is None else _in_blocks(one, kind)


def _in_blocks(tensor: SourceTensor, kind: str) -> BlockTensor:
    return BlockTensor(tensor.name, tensor.spec, tensor.file, tensor.offset, None, kind)


def _uncut(place: Place, tensors: Tensors, kinds: Mapping[str, str]) -> SourceTensor:
    """The matrix whose heads were cut."""
    held = _held(place, tensors)
    types = {tensor.spec.dtype for tensor in held}
    if len(types) == 1 and not any(name in kinds for name in place.names):
        return _heads_joined(place, held)
    parts = []
    for part, name, tensor in zip(place.parts, place.names, held, strict=True):
        *outer, columns = tensor.spec.shape
        flat = replace(tensor, spec=TensorSpec(tensor.spec.dtype, (prod(outer), columns)))
        kind = kinds.get(name)
        parts.append(HeldPart(part, flat if kind is None else _in_blocks(flat, kind)))
    first = held[0]
    name, spec = place.fact.name, TensorSpec("U8", (first.spec.nbytes,))
    return HeadsTensor(name, spec, first.file, first.offset, None, place.heads, parts)


def _held(place: Place, tensors: Tensors) -> Sequence[SourceTensor]:
    """What files have of each part: [heads, rows, columns], of what is turned [heads, columns,
    rows].

    In a tensor of several parts they lie one below another, each of all heads.
    """
    found = []
    below = dict.fromkeys(place.names, 0)
    for part, name in zip(place.parts, place.names, strict=True):
        tensor, start = tensors[name], below[name]
        columns = tensor.spec.shape[-1]
        rows = tensor.spec.shape[-2] if part.turned else part.rows
        spec = TensorSpec(tensor.spec.dtype, (place.heads, rows, columns))
        offset = tensor.offset + start * (spec.row_bytes // rows)
        found.append(SourceTensor(tensor.name, spec, tensor.file, offset, tensor.share(spec)))
        below[name] += place.heads * rows
    return found


def _heads_joined(place: Place, held: Sequence[SourceTensor]) -> SourceTensor:
    """The rows of all heads as they lay, of tensors of one type of floats."""
    shape = place.fact.shape
    # Pieces of a stack are all alike.
    size = gcd(*(part.rows for part in place.parts))
    inner = [
        turned_stack(tensor.name, tensor, 0, part.rows) if part.turned else tensor
        for part, tensor in zip(place.parts, held, strict=True)
    ]
    pieces = [
        slab_rows(tensor, head, start, start + size)
        for head in range(place.heads)
        for part, tensor in zip(place.parts, inner, strict=True)
        for start in range(0, part.rows, size)
    ]
    whole = stacked(place.fact.name, pieces)
    return replace(whole, spec=TensorSpec(whole.spec.dtype, shape))


def _joined(frames: list[SourceTensor], shape: tuple[int, ...]) -> SourceTensor:
    """A convolution [out, in, frames, height, width] of those over one frame each."""
    out, channels, count, *rest = shape
    piece = TensorSpec(frames[0].spec.dtype, tuple(rest))
    pieces = [
        SourceTensor(frame.name, piece, frame.file, frame.offset + index * piece.nbytes)
        for index in range(out * channels)
        for frame in frames
    ]
    whole = stacked(frames[0].name, pieces)
    return replace(whole, spec=TensorSpec(piece.dtype, (out, channels, count, *rest)))


class _Undone(RowsOfTensor):
    """Numbers in F32 of which a file has a function's values; see `ByteSource`."""

    def __init__(self, tensor: SourceTensor, how: str) -> None:
        """`tensor` is F32 and has bytes; `how` is one of `ops.Values`."""
        super().__init__(tensor, ITEM_SIZE["F32"])
        self._how = how

    @property
    def size(self) -> int:
        """That of the tensor."""
        return self.tensor.spec.nbytes

    @property
    def identity(self) -> str:
        """The tensor's, and what was done to it."""
        return f"undone|{self._how}|{self.tensor.identity}"

    def _span(self, first: int, stop: int) -> tuple[int, int]:
        return self.tensor.offset + first * self._row_bytes, (stop - first) * self._row_bytes

    def _filled_from(self, read: Reader, first: int, stop: int) -> FillRows:
        def fill(buffer: memoryview) -> None:
            read(buffer)
            values = np.frombuffer(buffer, "<f4")
            with np.errstate(invalid="ignore", divide="ignore"):
                values[:] = _UNDO[self._how](values)

        return fill


def _minus_one(values: Floats) -> Floats:
    return values - np.float32(1)


def _log_of_negative(values: Floats) -> Floats:
    found: Floats = np.log(-values)
    return found


def _softplus_undone(values: Floats) -> Floats:
    # Of large values log(e^y - 1) would be none.
    found: Floats = values + np.log(-np.expm1(-values))
    return found


_UNDO = {
    "add_one": _minus_one,
    "negative_exp": _log_of_negative,
    "softplus": _softplus_undone,
}
