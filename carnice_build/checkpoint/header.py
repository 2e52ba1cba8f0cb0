"""The header of a safetensors file: read with suspicion, written in one canonical form.

Format: https://github.com/huggingface/safetensors#format.
Eight bytes of little-endian header length, a JSON object, then the tensors' bytes without gaps.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from json.encoder import encode_basestring
from typing import Any, NamedTuple

from carnice_build.checkpoint.json import DuplicateKey, parse_json
from carnice_build.checkpoint.source import refuse_pointer
from carnice_build.dtypes import ITEM_SIZE, TensorSpec, shared_spec
from carnice_build.errors import CheckpointError, nearest
from carnice_build.recipe.patterns import MAX_NAME
from carnice_build.tensors import STACK, Readable

MAX_HEADER_BYTES = 100_000_000
"""The safetensors library's own limit."""

_MAX_DIMENSIONS = 16
_ENTRY_KEYS = frozenset({"dtype", "shape", "data_offsets"})


class Entry(NamedTuple):
    """One tensor of a file: what it is and where its bytes lie, counted from the file's start."""

    name: str
    spec: TensorSpec
    offset: int


@dataclass(frozen=True, slots=True)
class Header:
    """The tensors of a file in the order of their bytes, and its metadata."""

    entries: tuple[Entry, ...]
    metadata: Mapping[str, str]


def read_header(source: Readable) -> Header:
    """Parse and check the header of `source`.

    Raises CheckpointError for every way in which a header can lie: a Git LFS pointer in place of
    the file, too short a file, a length past the end, text that is not a JSON object of tensors,
    a name twice, an unknown dtype, a negative or huge shape, offsets that do not fit the shape,
    overlap, leave a gap or do not end with the file.
    """
    length = _header_length(source)
    raw = bytearray(length)
    source.read_into(8, memoryview(raw))
    table = _parse(source.name, bytes(raw))
    metadata = _metadata(source.name, table.pop("__metadata__", {}))
    entries = [_entry(source.name, name, item, 8 + length) for name, item in table.items()]
    entries.sort(key=lambda entry: (entry.offset, entry.spec.nbytes))
    _check_coverage(source, entries, 8 + length)
    return Header(tuple(entries), metadata)


def _header_length(source: Readable) -> int:
    if source.size < 8:
        raise CheckpointError(
            f"has {source.size} bytes, too few for a safetensors file", where=source.name
        )
    refuse_pointer(source)
    raw = bytearray(8)
    source.read_into(0, memoryview(raw))
    length = int.from_bytes(raw, "little")
    if length > source.size - 8:
        raise CheckpointError(
            f"says that its header has {length} bytes, but the file has {source.size}: "
            "truncated, or not a safetensors file",
            where=source.name,
        )
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"has a header of {length} bytes", where=source.name, expected="at most 100 MB"
        )
    return length


def _parse(where: str, raw: bytes) -> dict[str, Any]:
    try:
        table = parse_json(raw)
    except DuplicateKey as error:
        raise CheckpointError(f"header names {error.key!r} twice", where=where) from None
    except (ValueError, RecursionError):
        raise CheckpointError("header is not valid JSON", where=where) from None
    if not isinstance(table, dict):
        raise CheckpointError("header is not a JSON object", where=where)
    return table


def _metadata(where: str, item: object) -> dict[str, str]:
    if not isinstance(item, dict) or not all(isinstance(value, str) for value in item.values()):
        raise CheckpointError("header's __metadata__ is not a map of strings", where=where)
    return item


def _entry(where: str, name: str, item: object, data_start: int) -> Entry:
    if not isinstance(item, dict) or item.keys() != _ENTRY_KEYS:
        raise CheckpointError(
            f"header entry {name!r} is malformed",
            where=where,
            expected="dtype, shape and data_offsets",
        )
    spec = tensor_spec(where, name, item["dtype"], item["shape"])
    begin, end = _offsets(where, name, item["data_offsets"])
    if end - begin != spec.nbytes:
        raise CheckpointError(
            f"tensor {name!r} takes {end - begin} bytes, "
            f"but {spec.dtype} {list(spec.shape)} needs {spec.nbytes}",
            where=where,
        )
    return Entry(name, spec, data_start + begin)


def tensor_spec(where: str, name: str, dtype: object, shape: object) -> TensorSpec:
    """What a file says of tensor `name`, checked; CheckpointError when it cannot be."""
    if not 0 < len(name) <= MAX_NAME:
        raise CheckpointError(
            f"has a tensor with a name of {len(name)} characters",
            where=where,
            expected=f"1 to {MAX_NAME}",
        )
    if STACK in name:
        # In names of ours it stands for the numbers of experts.
        raise CheckpointError(f"has a tensor {name!r}", where=where, expected="names without *")
    if not isinstance(dtype, str) or dtype not in ITEM_SIZE:
        raise CheckpointError(
            f"tensor {name!r} has the unknown dtype {dtype!r}",
            where=where,
            nearest=nearest(dtype, ITEM_SIZE) if isinstance(dtype, str) else None,
        )
    return shared_spec(dtype, _shape(where, name, shape))


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**62


def _shape(where: str, name: str, value: object) -> tuple[int, ...]:
    if (
        not isinstance(value, list)
        or len(value) > _MAX_DIMENSIONS
        or not all(map(_is_count, value))
    ):
        raise CheckpointError(f"tensor {name!r} has no valid shape", where=where)
    return tuple(value)


def _offsets(where: str, name: str, value: object) -> tuple[int, int]:
    if not isinstance(value, list) or len(value) != 2 or not all(map(_is_count, value)):
        raise CheckpointError(f"tensor {name!r} has no valid data_offsets", where=where)
    begin, end = value
    if begin > end:
        raise CheckpointError(f"tensor {name!r} ends before it begins", where=where)
    return begin, end


def _check_coverage(source: Readable, entries: list[Entry], data_start: int) -> None:
    position = data_start
    for entry in entries:
        if entry.offset < position:
            raise CheckpointError(
                f"tensor {entry.name!r} overlaps the one before it", where=source.name
            )
        if entry.offset > position:
            raise CheckpointError(
                f"{entry.offset - position} bytes before tensor {entry.name!r} belong to no tensor",
                where=source.name,
            )
        position += entry.spec.nbytes
    if position > source.size:
        raise CheckpointError(
            f"is truncated: its tensors end at byte {position}, the file at {source.size}",
            where=source.name,
        )
    if position < source.size:
        raise CheckpointError(
            f"has {source.size - position} bytes after its last tensor", where=source.name
        )


def encode_header(tensors: Iterable[tuple[str, TensorSpec]], metadata: Mapping[str, str]) -> bytes:
    """Header bytes, length field included, for tensors laid out in the given order.

    The header is padded with spaces to a multiple of eight bytes, as the safetensors library does.
    """
    # A header of experts has some 100,000 entries: a text of each is quicker than a map.
    entries = []
    if metadata:
        text = json.dumps(dict(metadata), separators=(",", ":"), ensure_ascii=False)
        entries.append(f'"__metadata__":{text}')
    position = 0
    for name, spec in tensors:
        end = position + spec.nbytes
        shape = ",".join(map(str, spec.shape))
        entries.append(
            f'{encode_basestring(name)}:{{"dtype":"{spec.dtype}","shape":[{shape}],'
            f'"data_offsets":[{position},{end}]}}'
        )
        position = end
    raw = f"{{{','.join(entries)}}}".encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw
