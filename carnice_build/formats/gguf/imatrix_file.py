"""Files of importance matrices, as llama-imatrix writes them: GGUF, and the older form.

In GGUF a tensor NAME has NAME.in_sum2, the sums F32 [matrices, columns] of the squares of what it
was multiplied by, and NAME.counts, F32 [matrices, 1], of how many vectors; a stack has a matrix for
each expert.  The older form, mostly in files called `.dat`, is a list of names with means times
the number of passes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from carnice_build.checkpoint.gguf_header import (
    MAGIC,
    MAX_TENSORS,
    Described,
    GgufHeader,
    read_gguf,
)
from carnice_build.checkpoint.gguf_values import Metadata, Value
from carnice_build.checkpoint.source import refuse_pointer
from carnice_build.dtypes import TensorSpec
from carnice_build.errors import CheckpointError
from carnice_build.tensors import ByteSource, SourceTensor

SUMS, COUNTS = ".in_sum2", ".counts"

_DATASETS = "imatrix.datasets"
_CHUNKS = "imatrix.chunk_count"
_CHUNK_SIZE = "imatrix.chunk_size"

_MAX_NAME = 1024
_MAX_DATASET = 1 << 16
_LEAST_ENTRY = 17
"""Bytes of an entry of the older form: its name's length, a letter, two numbers and a value."""


@dataclass(frozen=True)
class Entry:
    """What a file has of one tensor: sums F32 [values], and counts F32 [matrices].

    A file of the older form has no counts, but the number of `calls` for all values.
    """

    sums: SourceTensor
    counts: SourceTensor | None
    calls: int | None = None


@dataclass(frozen=True)
class Imatrix:
    """A file of an importance matrix, whose sums are not read yet.

    `datasets` are what it calls the texts that it was computed from; `chunks` is in how many passes
    and `chunk_size` of how many tokens each, 0 where it does not say.
    """

    name: str
    entries: Mapping[str, Entry]
    datasets: tuple[str, ...]
    chunks: int
    chunk_size: int


def read_imatrix(file: ByteSource) -> Imatrix:
    """What is in a file of either form; CheckpointError for any other, and for a damaged one."""
    refuse_pointer(file)
    start = bytearray(min(len(MAGIC), file.size))
    file.read_into(0, memoryview(start))
    return _read_gguf(file) if bytes(start) == MAGIC else _Old(file).imatrix()


def _read_gguf(file: ByteSource) -> Imatrix:
    header = read_gguf(file)
    entries = dict(_entries(file, header))
    if not entries:
        raise _no_imatrix(file, f"it has no tensor named *{SUMS}")
    for key in (_DATASETS, _CHUNKS, _CHUNK_SIZE):
        if key not in header.metadata:
            raise _no_imatrix(file, f"it has no {key}, which llama-quantize needs")
    datasets = header.metadata[_DATASETS]
    if datasets.kind != "[str]":
        raise CheckpointError(f"has no list of texts at {_DATASETS!r}", where=file.name)
    chunks, size = (_number(file, header.metadata, key) for key in (_CHUNKS, _CHUNK_SIZE))
    return Imatrix(file.name, entries, tuple(datasets.value), chunks, size)


def _number(file: ByteSource, metadata: Metadata, key: str) -> int:
    kind, value = metadata[key]
    if kind != "u32":
        raise CheckpointError(f"has no whole number at {key!r}", where=file.name, expected="a u32")
    return int(value)


def _entries(file: ByteSource, header: GgufHeader) -> Iterator[tuple[str, Entry]]:
    places = {entry.name: entry.offset for entry in header.entries}
    types = {item.name: item for item in header.described}
    ends = (SUMS, COUNTS)
    names = (name.removesuffix(end) for name in types for end in ends if name.endswith(end))
    for name in dict.fromkeys(names):
        found = []
        for end in ends:
            item = types.get(name + end)
            if item is None or item.type != "F32":
                what = f"has no {name}{end}" if item is None else f"has {name}{end} in {item.type}"
                raise CheckpointError(what, where=file.name, expected="one of F32")
            spec = TensorSpec("F32", (TensorSpec("F32", item.shape).size,))
            found.append(SourceTensor(item.name, spec, file, places[item.name]))
        sums, counts = found
        if not counts.spec.size or not sums.spec.size or sums.spec.size % counts.spec.size:
            raise CheckpointError(
                f"has {sums.spec.size} sums and {counts.spec.size} counts for {name!r}",
                where=file.name,
                expected="as many sums for each count",
            )
        yield name, Entry(sums, counts)


def _no_imatrix(file: ByteSource, why: str) -> CheckpointError:
    return CheckpointError(
        f"is no importance matrix: {why}",
        where=file.name,
        expected="a file that llama-imatrix has written",
    )


class _Old:
    """A walk over a file of the older form, which reads all but the values."""

    def __init__(self, file: ByteSource) -> None:
        self._file = file
        self._at = 0

    def imatrix(self) -> Imatrix:
        count = self._number()
        if not 0 < count <= min(self._file.size // _LEAST_ENTRY, MAX_TENSORS):
            raise _no_imatrix(self._file, f"it would have {count} entries")
        entries: dict[str, Entry] = {}
        for _ in range(count):
            name, entry = self._entry()
            if name in entries:
                raise CheckpointError(f"has {name!r} twice", where=self._file.name)
            entries[name] = entry
        chunks = self._number() if self._left else 0
        dataset = self._text(_MAX_DATASET, "the dataset") if self._left else ""
        return Imatrix(self._file.name, entries, (dataset,) if dataset else (), max(0, chunks), 0)

    @property
    def _left(self) -> int:
        return self._file.size - self._at

    def _entry(self) -> tuple[str, Entry]:
        name = self._text(_MAX_NAME, "a tensor")
        if not name:
            raise _no_imatrix(self._file, "a tensor has no name")
        calls, values = self._number(), self._number()
        if not 0 < 4 * values <= self._left:
            raise _no_imatrix(self._file, f"it would have {values} values for {name!r}")
        sums = SourceTensor(name, TensorSpec("F32", (values,)), self._file, self._at)
        self._at += sums.spec.nbytes
        return name, Entry(sums, None, calls)

    def _text(self, most: int, what: str) -> str:
        length = self._number()
        if not 0 <= length <= most:
            raise _no_imatrix(self._file, f"the name of {what} would have {length} bytes")
        try:
            text = self._take(length).decode()
        except UnicodeDecodeError:
            text = "\0"
        if "\0" in text:
            raise _no_imatrix(self._file, f"the name of {what} is no text")
        return text

    def _number(self) -> int:
        (number,) = struct.unpack("<i", self._take(4))
        return int(number)

    def _take(self, count: int) -> bytes:
        if count > self._left:
            raise _no_imatrix(self._file, f"it ends at byte {self._file.size}, within an entry")
        piece = bytearray(count)
        self._file.read_into(self._at, memoryview(piece))
        self._at += count
        return bytes(piece)


def imatrix_metadata(datasets: Sequence[str], chunks: int, chunk_size: int) -> Metadata:
    """What a file says of itself, in llama-imatrix's order."""
    return {
        "general.type": Value("str", "imatrix"),
        _DATASETS: Value("[str]", list(datasets)),
        _CHUNKS: Value("u32", chunks),
        _CHUNK_SIZE: Value("u32", chunk_size),
    }


def described(name: str, matrices: int, columns: int) -> tuple[Described, Described]:
    """The sums and the counts of a tensor, as a header has them."""
    return (
        Described(name + SUMS, "F32", (matrices, columns)),
        Described(name + COUNTS, "F32", (matrices, 1)),
    )
