"""The small files of a published folder: those of its format, and those that all have."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from carnice_build.checkpoint.checkpoint import INDEX_NAME
from carnice_build.checkpoint.json import to_json
from carnice_build.formats.base import Format
from carnice_build.formats.card import CARD_NAME, render_card
from carnice_build.formats.folder import BUILD_NAME
from carnice_build.formats.variant import Variant, dataset_record, source_records
from carnice_build.keys import canonical_json
from carnice_build.store.digests import digest_bytes
from carnice_build.tensors import members
from carnice_build.version import __version__


@dataclass(frozen=True)
class Rendered:
    """The small files of a folder as text and bytes: `others` by name, `record` for build.json."""

    others: Mapping[str, bytes]
    record: Mapping[str, Any]

    @cached_property
    def key(self) -> str:
        """A digest of `record`, which names every file with its digest and every shard's pack.

        So a folder that would hold anything else has another key.
        """
        return digest_bytes(canonical_json(self.record).encode())

    @property
    def files(self) -> dict[str, bytes]:
        """All of them, by name."""
        return {**self.others, BUILD_NAME: to_json({"key": self.key, **self.record})}


def render_files(variant: Variant, number_format: Format) -> Rendered:
    """Every file of the folder but the shards; deterministic.

    ValueError for a format that names a file as a shard is, or one that is made for all of them.
    """
    own = number_format.files(variant)
    common = {INDEX_NAME, CARD_NAME, BUILD_NAME, *(shard.name for shard in variant.shards)}
    if taken := sorted(common.intersection(own)):
        raise ValueError(f"files gave {taken[0]!r}, which is no file of a format's")
    others = {
        **variant.copied,
        **variant.serve,
        INDEX_NAME: _index(variant),
        **own,
        CARD_NAME: render_card(number_format.card(), number_format, variant),
    }
    return Rendered(others, _provenance(variant, others))


def _index(variant: Variant) -> bytes:
    weight_map = {
        member: shard.name
        for shard in variant.shards
        for name, spec, _ in shard.tensors
        for member, _ in members(name, spec)
    }
    metadata = {
        "total_size": variant.tensor_bytes,
        "total_parameters": variant.parameters,
    }
    # Python indents item by item, which of 100,000 takes as long as all else that is rendered.
    entries = json.dumps(
        dict(sorted(weight_map.items())), separators=(",\n    ", ": "), ensure_ascii=False
    )
    start, end = to_json({"metadata": metadata, "weight_map": {}}).split(b"{}")
    return start + f"{{\n    {entries[1:-1]}\n  }}".encode() + end


def _provenance(variant: Variant, files: Mapping[str, bytes]) -> dict[str, Any]:
    sizes = {shard.name: {"size": shard.size, "pack": shard.pack} for shard in variant.shards}
    for name, content in sorted(files.items()):
        sizes[name] = {"size": len(content), "digest": digest_bytes(content)}
    return {
        "variant": variant.name,
        "carnice_build": __version__,
        "tools": dict(variant.tools),
        "sources": source_records(variant),
        **dataset_record(variant),
        "recipe": variant.recipe,
        "parameters": variant.parameters,
        "bits_per_weight": round(variant.bits_per_weight, 4),
        "figures": dict(variant.figures),
        "files": sizes,
        "tensors": {
            name: {
                "dtype": spec.dtype,
                "shape": list(spec.shape),
                "file": shard.name,
                "digest": digest,
            }
            for shard in variant.shards
            for name, spec, digest in shard.tensors
        },
    }
