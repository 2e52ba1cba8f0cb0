"""Format `gguf`: what headers must say, and the numbers of blocks.

Modules have their canonical names here, and their heads and norms are as the checkpoint has them:
see `restored`.  The bound of a weight is derived in `blocks`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from carnice_build.checkpoint.gguf_header import SUFFIX, GgufHeader, read_gguf
from carnice_build.checkpoint.gguf_types import TYPES
from carnice_build.checkpoint.source import LocalFile
from carnice_build.dtypes import NUMPY_NAME
from carnice_build.errors import CheckpointError
from carnice_build.formats.checks import FolderReader, QuantizedValues, Tensors, TorchChecks
from carnice_build.formats.folder import ModelFolder
from carnice_build.formats.gguf.blocks import KINDS, Bytes, Groups, allowed, unpacked
from carnice_build.formats.gguf.mix_rules import MIXES
from carnice_build.formats.gguf.mixes import FLOATS, fitting
from carnice_build.formats.gguf.named import HeadPart
from carnice_build.formats.gguf.restored import BlockTensor, HeadsTensor, restored
from carnice_build.formats.gguf.tensors import scheme_of
from carnice_build.formats.layout import PackLayout
from carnice_build.formats.library import Library
from carnice_build.formats.scheme import Scheme
from carnice_build.formats.values import (
    HALF_PLACE,
    HALF_SMALLEST,
    Floats,
    Incomparable,
    PlainValues,
    as_float32,
    matrix,
    read_rows,
)
from carnice_build.graph import TensorData
from carnice_build.kernels.ggml import dequantize, quantize
from carnice_build.models.base import QUANTIZATION, Architecture
from carnice_build.tensors import SourceTensor

_SHOWN = 60
"""Characters of a value in a problem."""


class GgufReader(FolderReader):
    """Folders of GGUF files, whose headers say what each tensor is."""

    suffixes = ("weight",)

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        self._kinds: dict[str, str] = {}

    @classmethod
    def reads(cls, config: Mapping[str, Any]) -> bool:
        """None by its config.json: see `takes`."""
        return False

    @classmethod
    def takes(cls, folder: ModelFolder) -> bool:
        """Folders that hold a GGUF file."""
        return any(name.endswith(SUFFIX) for name in folder.shards)

    def parts(self, tensors: Tensors, architecture: Architecture) -> Mapping[str, Tensors]:
        """See `FolderReader.parts`."""
        found = restored(tensors, architecture)
        for tensor in chain.from_iterable(parts.values() for parts in found.values()):
            kinds = _kinds_of(tensor)
            if kinds:
                self._kinds[tensor.name.rpartition(".")[0]] = kinds[0]
        return found

    def scheme(self, module: str) -> Scheme | None:
        """That of the type of its blocks."""
        kind = self._kinds.get(module)
        return None if kind is None else scheme_of(kind)

    def values(self, tensors: Tensors, module: str) -> BlockValues | HeadsValues:
        """See `FolderReader.values`."""
        return block_values(tensors, module)


class GgufChecks(TorchChecks):
    """GGUF files of a mix; `weighted` says that an importance matrix chose the steps."""

    library = Library.LLAMA_CPP

    def __init__(self, mix: str = "Q4_K_M", *, weighted: bool = False) -> None:
        self.mix, self.weighted = mix, weighted

    def config_problems(self, folder: ModelFolder, architecture: Architecture) -> Iterator[str]:
        """What is quantized is said by headers alone."""
        for key in QUANTIZATION:
            if folder.config.get(key):
                yield f"config.json states {key}, of which a GGUF file has none"

    def pack_problems(self, pack: PackLayout, folder: Path) -> Iterator[str]:
        """The header of a file, key by key and tensor by tensor, beside that of the plan."""
        try:
            found = read_gguf(LocalFile(folder / pack.name))
        except CheckpointError as error:
            yield f"{pack.name}: {error.what}"
            return
        yield from _differences(pack.name, found, read_gguf(_Planned(pack)))

    def by_module(self, tensors: Tensors, architecture: Architecture) -> Tensors:
        """See `FormatChecks.by_module`."""
        found = restored(tensors, architecture)
        named = {name: part for parts in found.values() for name, part in parts.items()}
        return {name: item for name, item in tensors.items() if name not in found} | named

    def values(self, tensors: Tensors, module: str, scheme: Scheme) -> QuantizedValues:
        """See `FormatChecks.values`."""
        values = block_values(tensors, module, weighted=self.weighted)
        if scheme.name not in values.kinds:
            kinds = " and ".join(values.kinds)
            raise CheckpointError(f"is {kinds} instead of {scheme.name}", where=module)
        return values

    def rounded(self, weights: Sequence[Floats]) -> list[Floats]:
        """See `TorchChecks.rounded`: in the mix's own type, or what it falls back to.

        Types that no kernel of ours makes are taken for those of as many bits.
        """
        mix = MIXES[self.mix]
        kind = "Q8_0" if mix.stacks else mix.default
        if kind not in KINDS and kind not in FLOATS:
            kind = "Q3_K" if kind.startswith("IQ3") else "Q2_K"
        return [_round_trip(fitting(kind, weight.shape[1]), weight) for weight in weights]


def _round_trip(kind: str, weight: Floats) -> Floats:
    raw, _ = quantize(kind, weight)
    if kind in FLOATS:
        return as_float32(TensorData(kind, raw.view(NUMPY_NAME[kind])))
    return dequantize(kind, raw)


class _Planned:
    """A file that a plan has the header of; what follows it is zeros."""

    def __init__(self, pack: PackLayout) -> None:
        self._header = pack.header
        self.name, self.size = pack.name, pack.size

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """See `Readable.read_into`."""
        piece = self._header[offset : offset + len(buffer)]
        buffer[:] = piece + bytes(len(buffer) - len(piece))


def _differences(file: str, found: GgufHeader, planned: GgufHeader) -> Iterator[str]:
    for key, value in planned.metadata.items():
        own = found.metadata.get(key)
        if own is None:
            yield f"{file} has no {key}"
        elif own != value:
            yield f"{file} has {key} {_shown(own)} instead of {_shown(value)}"
    for key in found.metadata.keys() - planned.metadata.keys():
        yield f"{file} has {key}, which nobody asked for"
    if list(found.metadata) != list(planned.metadata) and not (
        found.metadata.keys() ^ planned.metadata.keys()
    ):
        yield f"{file} has its keys in another order"
    wanted = {item.name: item for item in planned.described}
    for item in found.described:
        if item.name in wanted and item != wanted[item.name]:
            other = wanted[item.name]
            yield (
                f"{file} has {item.name} as {item.type} {list(item.shape)} "
                f"instead of {other.type} {list(other.shape)}"
            )
    names = [item.name for item in found.described]
    if names != list(wanted) and set(names) == set(wanted):
        yield f"{file} has its tensors in another order"


def _shown(value: object) -> str:
    text = str(getattr(value, "value", value))
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


class BlockValues:
    """The numbers of a weight in blocks; see `QuantizedValues`."""

    def __init__(self, tensor: BlockTensor, *, weighted: bool) -> None:
        self._tensor = tensor
        self._weighted = weighted
        self.kind = tensor.kind
        self.kinds = (tensor.kind,)
        how = KINDS[self.kind]
        self.tolerated = how.tolerated_weighted if weighted else how.tolerated
        rows, row_bytes = matrix(tensor.spec)
        kind = TYPES[self.kind]
        self.shape = rows, row_bytes // kind.nbytes * kind.elements

    def rows(self, start: int, stop: int) -> Floats:
        """The rows from `start` to `stop`, as ggml dequantizes them."""
        return self._in_order(dequantize(self.kind, self._raw(start, stop)))

    def allowance(self, source: Floats, start: int) -> Floats:
        """See `QuantizedValues.allowance`."""
        groups = self._groups(start, start + len(source))
        ordered = self._as_stored(source).reshape(groups.levels.shape)
        return self._in_order(allowed(self.kind, groups, ordered, weighted=self._weighted))

    def _groups(self, start: int, stop: int) -> Groups:
        return unpacked(self.kind, self._raw(start, stop))

    def _raw(self, start: int, stop: int) -> Bytes:
        return read_rows(self._tensor, self._tensor.spec, start, stop).array

    def _in_order(self, values: Floats) -> Floats:
        """Columns as the model has them."""
        values = values.reshape(-1, self.shape[1])
        heads = self._tensor.swapped
        return values if heads is None else _swapped(values, heads.second, heads.first, heads.size)

    def _as_stored(self, values: Floats) -> Floats:
        heads = self._tensor.swapped
        return values if heads is None else _swapped(values, heads.first, heads.second, heads.size)


def _swapped(values: Floats, first: int, second: int, size: int) -> Floats:
    """Columns in blocks [first, second] of so many as ones in blocks [second, first]."""
    shape = len(values), -1, first, second, size
    return np.ascontiguousarray(values.reshape(shape).swapaxes(2, 3)).reshape(values.shape)


class CastValues:
    """The numbers of a matrix of floats [rows, columns], which were cast; see `QuantizedValues`."""

    tolerated = 0.0
    kinds = ()

    def __init__(self, tensor: SourceTensor) -> None:
        self._values = PlainValues(tensor)
        self._dtype = tensor.spec.dtype
        self.shape = self._values.shape

    def rows(self, start: int, stop: int) -> Floats:
        """The rows from `start` to `stop`."""
        return self._values.rows(start, stop)

    def allowance(self, source: Floats, start: int) -> Floats:
        """Half a unit in the last place."""
        found: Floats = np.abs(source) * np.float32(HALF_PLACE[self._dtype])
        found += np.float32(HALF_SMALLEST[self._dtype])
        return found


class HeadsValues:
    """The numbers of a matrix whose heads were cut; see `QuantizedValues`.

    Blocks of what is turned span rows of the matrix, so whole heads are read.
    """

    def __init__(self, tensor: HeadsTensor, *, weighted: bool) -> None:
        self._parts = [(part, _of_tensor(held, weighted=weighted)) for part, held in tensor.parts]
        self.kinds = _kinds_of(tensor)
        self.tolerated = max(values.tolerated for _, values in self._parts)
        self._size = sum(part.rows for part, _ in self._parts)
        (part, values) = self._parts[0]
        columns = values.shape[0] // tensor.heads if part.turned else values.shape[1]
        self.shape = tensor.heads * self._size, columns

    def rows(self, start: int, stop: int) -> Floats:
        """The rows from `start` to `stop`."""
        first, last = start // self._size, -(-stop // self._size)
        found = [self._head(head) for head in range(first, last)]
        return np.concatenate(found)[start - first * self._size :][: stop - start]

    def allowance(self, source: Floats, start: int) -> Floats:
        """See `QuantizedValues.allowance`."""
        first, last = start // self._size, -(-(start + len(source)) // self._size)
        # What a weight may be off follows from that weight alone: of others nothing is asked.
        whole = np.zeros(((last - first) * self._size, self.shape[1]), np.float32)
        asked = slice(start - first * self._size, start - first * self._size + len(source))
        whole[asked] = source
        heads = whole.reshape(last - first, self._size, -1)
        found = [self._allowed(head, of) for head, of in enumerate(heads, first)]
        return np.concatenate(found)[asked]

    def _head(self, head: int) -> Floats:
        found = np.empty((self._size, self.shape[1]), np.float32)
        for part, values in self._parts:
            first, last = self._lines(part, head)
            made = values.rows(first, last)
            found[part.start : part.start + part.rows] = made.T if part.turned else made
        return found

    def _allowed(self, head: int, source: Floats) -> Floats:
        found = np.empty_like(source)
        for part, values in self._parts:
            rows = slice(part.start, part.start + part.rows)
            own = np.ascontiguousarray(source[rows].T) if part.turned else source[rows]
            made = values.allowance(own, self._lines(part, head)[0])
            found[rows] = made.T if part.turned else made
        return found

    def _lines(self, part: HeadPart, head: int) -> tuple[int, int]:
        """Where a head is in the tensor of a part."""
        count = self.shape[1] if part.turned else part.rows
        return head * count, (head + 1) * count


def _of_tensor(tensor: SourceTensor, *, weighted: bool) -> BlockValues | CastValues:
    if not isinstance(tensor, BlockTensor):
        return CastValues(tensor)
    if tensor.kind not in KINDS:
        raise Incomparable(f"the blocks of {tensor.kind} are not known")
    return BlockValues(tensor, weighted=weighted)


def _kinds_of(tensor: SourceTensor) -> Sequence[str]:
    """The types of the blocks that a tensor is in."""
    if isinstance(tensor, BlockTensor):
        return (tensor.kind,)
    held = tensor.parts if isinstance(tensor, HeadsTensor) else ()
    found = (kind for part in held for kind in _kinds_of(part.tensor))
    return tuple(dict.fromkeys(found))


def block_values(
    tensors: Tensors, module: str, *, weighted: bool = False
) -> BlockValues | HeadsValues:
    """The numbers of a module; Incomparable where it is in no blocks that are known."""
    tensor = tensors.get(f"{module}.weight")
    if isinstance(tensor, HeadsTensor):
        return HeadsValues(tensor, weighted=weighted)
    if not isinstance(tensor, BlockTensor):
        raise Incomparable(f"{module} is not in blocks")
    found = _of_tensor(tensor, weighted=weighted)
    assert isinstance(found, BlockValues)
    return found
