"""The files that tensors of a model go into: one GGUF, or llama.cpp's split files, and a projector.

A split is as llama.cpp's converter makes it (`--split-max-size`): tensors in their order, a file
closed before the one that would make it too large, all metadata in the first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from carnice_build.checkpoint.gguf_header import ALIGNMENT as DEFAULT_ALIGNMENT
from carnice_build.checkpoint.gguf_header import SUFFIX, Described, encode_gguf
from carnice_build.checkpoint.gguf_values import Metadata, Value
from carnice_build.errors import PlanError
from carnice_build.formats.base import OutputTensor
from carnice_build.formats.layout import PackLayout, Slot
from carnice_build.units import format_size, parse_size


@dataclass(frozen=True)
class GgufFile:
    """What a file is to hold, before it is split.

    `prefix` comes before the model's name in that of the file, `ending` after it.
    `described` says by the tensors' names of which type and shape they are to ggml.
    """

    prefix: str
    ending: str
    metadata: Metadata
    tensors: Sequence[OutputTensor]
    described: Mapping[str, Described]
    may_split: bool


def gguf_layouts(file: GgufFile, model: str, most_bytes: int | None) -> list[PackLayout]:
    """The file itself, or as many as it takes so that the tensors of each fit into `most_bytes`.

    PlanError for a tensor that fits into none.
    """
    if file.may_split and most_bytes is not None:
        _check_fits(file.tensors, most_bytes)
    parts = list(_parts(file.tensors, most_bytes if file.may_split else None))
    stem = f"{file.prefix}{model}{file.ending}"
    if len(parts) == 1:
        return [_layout(stem + SUFFIX, file, file.metadata, parts[0])]
    count = len(file.tensors)
    return [
        _layout(
            f"{stem}-{index + 1:05}-of-{len(parts):05}{SUFFIX}",
            file,
            {**(file.metadata if index == 0 else {}), **_split(index, len(parts), count)},
            part,
        )
        for index, part in enumerate(parts)
    ]


def _check_fits(tensors: Sequence[OutputTensor], most_bytes: int) -> None:
    largest = max(tensors, key=lambda tensor: tensor.ref.spec.nbytes)
    size = largest.ref.spec.nbytes
    if size > most_bytes:
        raise PlanError(
            f"files of {format_size(most_bytes)} are too small for {largest.name}",
            expected=f"{_as_much(size)} or more",
            at=("shard",),
        )


def _as_much(size: int) -> str:
    """A size as people write it, or in bytes where that would be less."""
    return found if parse_size(found := format_size(size)) >= size else f"{size} B"


def _split(index: int, files: int, tensors: int) -> dict[str, Value]:
    return {
        "split.no": Value("u16", index),
        "split.count": Value("u16", files),
        "split.tensors.count": Value("i32", tensors),
    }


def _parts(
    tensors: Sequence[OutputTensor], most_bytes: int | None
) -> Iterator[Sequence[OutputTensor]]:
    part: list[OutputTensor] = []
    size = 0
    for tensor in tensors:
        nbytes = tensor.ref.spec.nbytes
        if most_bytes is not None and part and size + nbytes > most_bytes:
            yield part
            part, size = [], 0
        part.append(tensor)
        size += nbytes
    yield part


def _layout(
    name: str, file: GgufFile, metadata: Metadata, tensors: Sequence[OutputTensor]
) -> PackLayout:
    stated = metadata.get("general.alignment")
    alignment = int(stated.value) if stated else DEFAULT_ALIGNMENT
    encoded = encode_gguf(metadata, [file.described[item.name] for item in tensors], alignment)
    slots = tuple(map(Slot, tensors, encoded.offsets))
    return PackLayout(name, encoded.header, slots, alignment)
