"""The header of a GGUF file: read with suspicion, written as llama.cpp writes it.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
Magic, version and two counts, then metadata, then name, shape, type and place of each tensor,
then padding; tensors follow, each from a multiple of the alignment on.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from carnice_build.checkpoint.gguf_types import TYPES
from carnice_build.checkpoint.gguf_values import KINDS, LIST, Metadata, Value
from carnice_build.checkpoint.header import Entry, tensor_spec
from carnice_build.checkpoint.source import refuse_pointer
from carnice_build.dtypes import ITEM_SIZE, TensorSpec
from carnice_build.errors import CheckpointError
from carnice_build.tensors import Readable

MAGIC = b"GGUF"

SUFFIX = ".gguf"

ALIGNMENT = 32
"""Bytes that tensors begin at a multiple of, where the key `general.alignment` says no other."""

MAX_HEADER_BYTES = 256_000_000
"""A vocabulary of 250,000 tokens takes some 12 MB; more than this is no model's."""

MAX_TENSORS = 1 << 16
"""The largest models have some two thousand, and a file of importance two for each."""

MAX_NAME_BYTES = 63
"""Of a tensor's name: ggml has 64 bytes with the zero at the end (GGML_MAX_NAME)."""

_VERSION = 3
_READABLE_VERSIONS = (2, 3)
_MAX_AXES = 4
_MAX_KEY_BYTES = 65535
_MAX_KEYS = 1 << 16
_MAX_ITEMS = 1 << 23
"""Of all lists together: a vocabulary of 250,000 tokens has a million, with types and merges."""

_LEAST_ENTRY = 24
_LEAST_PAIR = 13
_FIRST_READ = 1 << 16

_FORMATS: Mapping[str, str] = {
    "u8": "<B",
    "i8": "<b",
    "u16": "<H",
    "i16": "<h",
    "u32": "<I",
    "i32": "<i",
    "f32": "<f",
    "bool": "<?",
    "u64": "<Q",
    "i64": "<q",
    "f64": "<d",
}
_KIND_OF = {number: kind for kind, number in KINDS.items()}
_TYPE_OF = {item.number: name for name, item in TYPES.items()}


class Described(NamedTuple):
    """A tensor as a header has it: `shape` has the rows' length last, as numpy has it."""

    name: str
    type: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """What a file says before its tensors: `entries` and `described` are in the order of bytes.

    An entry of blocks is the bytes of its rows, U8 [..., bytes of a row].
    """

    entries: tuple[Entry, ...]
    described: tuple[Described, ...]
    metadata: Metadata


@dataclass(frozen=True, slots=True)
class Encoded:
    """A header's bytes with the padding behind them, where each tensor begins, the file's size."""

    header: bytes
    offsets: tuple[int, ...]
    size: int


def stored_spec(type_name: str, shape: Sequence[int]) -> TensorSpec:
    """What bytes hold a tensor of `shape` in a type: its floats, or U8 [..., bytes of a row].

    ValueError where whole blocks do not make up a row.
    """
    if type_name in ITEM_SIZE:
        return TensorSpec(type_name, tuple(shape))
    *outer, columns = shape
    return TensorSpec("U8", (*outer, TYPES[type_name].row_bytes(columns)))


def encode_gguf(
    metadata: Metadata, tensors: Sequence[Described], alignment: int = ALIGNMENT
) -> Encoded:
    """The header of a file with these tensors, laid out in the given order."""
    infos: list[bytes] = []
    starts: list[int] = []
    position = 0
    for tensor in tensors:
        axes = tensor.shape or (1,)
        starts.append(position)
        infos.append(_encode_text(tensor.name))
        infos.append(struct.pack(f"<I{len(axes)}Q", len(axes), *reversed(axes)))
        infos.append(struct.pack("<IQ", TYPES[tensor.type].number, position))
        position += _padded(stored_spec(tensor.type, tensor.shape).nbytes, alignment)
    start = struct.pack("<4sIQQ", MAGIC, _VERSION, len(tensors), len(metadata))
    header = b"".join([start, *_encode_pairs(metadata), *infos])
    header += bytes(-len(header) % alignment)
    offsets = tuple(len(header) + start for start in starts)
    return Encoded(header, offsets, len(header) + position)


def _padded(size: int, alignment: int) -> int:
    return size + -size % alignment


def _encode_text(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _encode_pairs(metadata: Metadata) -> Iterator[bytes]:
    for key, value in metadata.items():
        yield _encode_text(key)
        if not value.kind.startswith("["):
            yield struct.pack("<I", KINDS[value.kind])
            yield _encode_one(value.kind, value.value)
            continue
        kind = value.kind[1:-1]
        yield struct.pack("<IIQ", LIST, KINDS[kind], len(value.value))
        yield encode_list(kind, value.value)


def _encode_one(kind: str, value: Any) -> bytes:
    return _encode_text(value) if kind == "str" else struct.pack(_FORMATS[kind], value)


def encode_list(kind: str, items: Sequence[Any]) -> bytes:
    """The items of a list, end to end."""
    if kind != "str":
        return struct.pack(f"<{len(items)}{_FORMATS[kind][1]}", *items)
    # Vocabularies have hundreds of thousands: no call for each but the two that it takes.
    texts = [item.encode() for item in items]
    lengths = struct.pack(f"<{len(texts)}Q", *map(len, texts))
    parts = [b""] * (2 * len(texts))
    parts[::2] = [lengths[at : at + 8] for at in range(0, len(lengths), 8)]
    parts[1::2] = texts
    return b"".join(parts)


def read_gguf(source: Readable) -> GgufHeader:
    """Parse and check the header of `source`.

    Raises CheckpointError for every way in which a header can lie: counts and lengths past the
    end, lists of lists, an unknown kind or type, a key or a name twice, rows of no whole blocks,
    tensors that overlap, leave a gap, are not aligned or do not end with the file.
    """
    return _Parser(source).header()


class _Parser:
    """A walk over a header; more of the file is read as it is come to."""

    def __init__(self, source: Readable) -> None:
        self._source = source
        self._raw = bytearray()
        self._at = 0
        self._items_left = _MAX_ITEMS

    def header(self) -> GgufHeader:
        refuse_pointer(self._source)
        if self._source.size < 24 or self._take(4) != MAGIC:
            raise self._error("is no GGUF file")
        (version,) = self._unpack("<I")
        if version not in _READABLE_VERSIONS:
            raise self._error(f"is of GGUF version {version}", "version 2 or 3, little-endian")
        tensors, pairs = self._unpack("<QQ")
        self._expect(tensors, _LEAST_ENTRY, "tensors", MAX_TENSORS)
        self._expect(pairs, _LEAST_PAIR, "keys", _MAX_KEYS)
        metadata = self._metadata(pairs)
        infos = [self._info() for _ in range(tensors)]
        alignment = self._alignment(metadata)
        start = _padded(self._at, alignment)
        described = tuple(item for item, _ in infos)
        entries = tuple(self._entries(infos, start, alignment))
        return GgufHeader(entries, described, metadata)

    def _metadata(self, count: int) -> dict[str, Value]:
        found: dict[str, Value] = {}
        for _ in range(count):
            key = self._text("a key", _MAX_KEY_BYTES)
            if key in found:
                raise self._error(f"has the key {key!r} twice")
            found[key] = self._value(key)
        return found

    def _value(self, key: str) -> Value:
        kind = self._kind(key)
        if kind != "list":
            return Value(kind, self._one(kind, key))
        kind = self._kind(key)
        if kind == "list":
            raise self._error(f"has lists in a list at {key!r}")
        (count,) = self._unpack("<Q")
        size = 8 if kind == "str" else struct.calcsize(_FORMATS[kind])
        self._expect(count, size, f"items of {key!r}", self._items_left)
        self._items_left -= count
        if kind == "str":
            return Value("[str]", [self._text(key) for _ in range(count)])
        raw = self._take(count * size)
        return Value(f"[{kind}]", list(struct.unpack(f"<{count}{_FORMATS[kind][1]}", raw)))

    def _kind(self, key: str) -> str:
        (number,) = self._unpack("<I")
        if number == LIST:
            return "list"
        if number not in _KIND_OF:
            raise self._error(f"has a value of the unknown kind {number} at {key!r}")
        return _KIND_OF[number]

    def _one(self, kind: str, key: str) -> Any:
        if kind == "str":
            return self._text(key)
        (value,) = self._unpack(_FORMATS[kind])
        return value

    def _info(self) -> tuple[Described, int]:
        name = self._text("a tensor's name", MAX_NAME_BYTES)
        (axes,) = self._unpack("<I")
        if not 1 <= axes <= _MAX_AXES:
            raise self._error(f"has a tensor {name!r} of {axes} axes", "1 to 4")
        shape = tuple(reversed(self._unpack(f"<{axes}Q")))
        number, offset = self._unpack("<IQ")
        if number not in _TYPE_OF:
            raise self._error(f"has a tensor {name!r} of the unknown type {number}")
        if math.prod(max(1, side) for side in shape) >= 2**62:
            raise self._error(f"has a tensor {name!r} of {list(shape)}")
        return Described(name, _TYPE_OF[number], shape), offset

    def _alignment(self, metadata: Metadata) -> int:
        stated = metadata.get("general.alignment", Value("u32", ALIGNMENT))
        size = int(stated.value) if stated.kind == "u32" else 0
        if not 8 <= size <= 1 << 20 or size & (size - 1):
            raise self._error(f"is aligned to {str(stated.value)[:20]}", "a power of two from 8 on")
        return size

    def _entries(
        self, infos: Iterable[tuple[Described, int]], start: int, alignment: int
    ) -> Iterator[Entry]:
        position, names = start, set()
        end = start
        for item, offset in infos:
            if item.name in names:
                raise self._error(f"has the tensor {item.name!r} twice")
            names.add(item.name)
            if start + offset != position:
                raise self._error(
                    f"tensor {item.name!r} begins at byte {start + offset}", f"{position}"
                )
            spec = self._spec(item)
            yield Entry(item.name, spec, position)
            end = position + spec.nbytes
            position += _padded(spec.nbytes, alignment)
        if not end <= self._source.size <= position:
            raise self._error(
                f"has {self._source.size} bytes, and its tensors end at byte {position}"
            )

    def _spec(self, item: Described) -> TensorSpec:
        try:
            spec = stored_spec(item.type, item.shape)
        except ValueError as error:
            raise self._error(f"tensor {item.name!r} of {item.type}: {error}") from None
        return tensor_spec(self._source.name, item.name, spec.dtype, list(spec.shape))

    def _text(self, what: str, limit: int = MAX_HEADER_BYTES) -> str:
        (length,) = self._unpack("<Q")
        if length > limit:
            raise self._error(f"has {length} bytes of text for {what!r}", f"at most {limit}")
        try:
            return self._take(length).decode()
        except UnicodeDecodeError:
            raise self._error(f"has bytes that are no text for {what!r}") from None

    def _unpack(self, layout: str) -> tuple[Any, ...]:
        return struct.unpack(layout, self._take(struct.calcsize(layout)))

    def _expect(self, count: int, least: int, what: str, most: int) -> None:
        """Refuse a count of things that the rest of the file cannot hold, or nobody has."""
        if count * least > min(self._source.size, MAX_HEADER_BYTES) - self._at:
            raise self._error(f"says that it has {count} {what}, more than fit into it")
        if count > most:
            # Memory and time would follow such a number, of which a file may be a few blocks.
            raise self._error(f"says that it has {count} {what}", f"{most} at most")

    def _take(self, count: int) -> bytes:
        end = self._at + count
        if end > self._source.size:
            raise self._error("is truncated within its header")
        if end > MAX_HEADER_BYTES:
            raise self._error(f"has a header of more than {MAX_HEADER_BYTES} bytes")
        if end > len(self._raw):
            self._read_on(end)
        taken = bytes(memoryview(self._raw)[self._at : end])
        self._at = end
        return taken

    def _read_on(self, end: int) -> None:
        """Read at least up to `end`, and as much again as is there, so that reads are few."""
        have = len(self._raw)
        wanted = min(self._source.size, max(end, 2 * have, _FIRST_READ))
        piece = bytearray(wanted - have)
        self._source.read_into(have, memoryview(piece))
        self._raw += piece

    def _error(self, what: str, expected: str | None = None) -> CheckpointError:
        return CheckpointError(what, where=self._source.name, expected=expected)
