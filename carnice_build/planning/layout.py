"""Which tensors share a shard, and where each one lies in it.

Shards follow the source's modules, never the sizes after quantization, so that the same modules
are together in every variant and a change of bits moves nothing from one shard to another.
Linear layers of neighbouring decoder layers form shards; the embedding, the head, the MTP head,
the vision tower and all small tensors (norms, convolutions, states, scalars) each have their own,
so that what variants have in common is one file, and scales of activations, which follow from the
calibration, are not among the weights.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from math import prod

from carnice_build.checkpoint.header import encode_header
from carnice_build.dtypes import ITEM_SIZE
from carnice_build.formats.base import OutputTensor
from carnice_build.formats.layout import PackLayout, Slot
from carnice_build.models.base import Part, Role

_BF16_BYTES = 2

SHARD_BYTES = 5_000_000_000
"""Most that the modules of one shard weigh in BF16 where the recipe does not say."""


def pack_layouts(
    tensors: Sequence[OutputTensor], shard_bytes: int, metadata: Mapping[str, str]
) -> list[PackLayout]:
    """The shards of a variant, in the order of their file names."""
    groups = _groups(tensors, shard_bytes)
    return [
        _layout(f"model-{index + 1:05}-of-{len(groups):05}.safetensors", group, metadata)
        for index, group in enumerate(groups)
    ]


def _groups(tensors: Sequence[OutputTensor], shard_bytes: int) -> list[list[OutputTensor]]:
    per_shard = _layers_per_shard(tensors, shard_bytes)
    groups: dict[tuple[int, int], list[OutputTensor]] = {}
    for tensor in tensors:
        groups.setdefault(_group(tensor, per_shard), []).append(tensor)
    return [groups[group] for group in sorted(groups)]


def _layers_per_shard(tensors: Sequence[OutputTensor], shard_bytes: int) -> int:
    weights: dict[int, int] = {}
    seen: set[str] = set()
    for tensor in tensors:
        fact = tensor.fact
        if fact.layer is None or fact.role is not Role.LINEAR or fact.name in seen:
            continue
        seen.add(fact.name)
        weight = prod(fact.shape) * _BF16_BYTES
        weights[fact.layer] = weights.get(fact.layer, 0) + weight
    return max(1, shard_bytes // max(weights.values(), default=1))


_ORDER = {Part.EMBED: 0, Part.LAYERS: 1, Part.BODY: 2, Part.HEAD: 3, Part.MTP: 4, Part.TOWER: 5}


def _group(tensor: OutputTensor, layers_per_shard: int) -> tuple[int, int]:
    fact = tensor.fact
    if fact.part is Part.LAYERS and (fact.role is not Role.LINEAR or not tensor.ref.spec.shape):
        return _ORDER[Part.BODY], 0
    chunk = fact.layer // layers_per_shard if fact.layer is not None else 0
    return _ORDER[fact.part], chunk


def _layout(name: str, tensors: Sequence[OutputTensor], metadata: Mapping[str, str]) -> PackLayout:
    ordered = sorted(tensors, key=_slot_order)
    members = [member for tensor in ordered for member in tensor.members]
    header = encode_header(members, metadata)
    slots, start = [], len(header)
    for tensor in ordered:
        slots.append(Slot(tensor, start))
        start += tensor.ref.spec.nbytes
    return PackLayout(name, header, tuple(slots))


def _slot_order(tensor: OutputTensor) -> tuple[int, list[tuple[int, str]]]:
    # Wide types first keeps every tensor aligned to its own item size.
    return -ITEM_SIZE[tensor.ref.spec.dtype], natural_key(tensor.name)


def natural_key(name: str) -> list[tuple[int, str]]:
    """A sort key that puts layer 10 after layer 9."""
    parts = re.split(r"(\d+)", name)
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts]
