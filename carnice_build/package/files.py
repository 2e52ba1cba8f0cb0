"""The small files of a published folder: those of its format, and those that all have."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from carnice_build.checkpoint.checkpoint import INDEX_NAME
from carnice_build.checkpoint.containers import has_index
from carnice_build.checkpoint.json import to_json
from carnice_build.formats.base import Format
from carnice_build.formats.card import CARD_NAME, render_card
from carnice_build.formats.folder import BUILD_NAME
from carnice_build.formats.measured import Measured
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


Figures = Callable[[str], Measured | None]
"""What was measured of a folder, by the key of its content."""


def nothing_measured(content: str) -> Measured | None:
    """Of no folder anything was measured."""
    return None


def decides(name: str) -> bool:
    """Whether a file of a folder can change what its model does: pages and launches cannot."""
    return not (name.endswith(".md") or name.startswith("serve/"))


def content_key(record: Mapping[str, Any]) -> str:
    """A digest of what figures of a folder depend on, by its build.json.

    These are its sources and all files that decide something; the card may tell the figures.
    Empty where build.json does not say it.
    """
    files, sources = record.get("files"), record.get("sources")
    if not isinstance(files, dict):
        return ""
    held = {name: item for name, item in files.items() if decides(name)}
    return digest_bytes(canonical_json({"files": held, "sources": sources}).encode())


def render_files(
    variant: Variant, number_format: Format, figures: Figures = nothing_measured
) -> Rendered:
    """Every file of the folder but the shards; deterministic.

    The card tells what `figures` has of the others.
    ValueError for a format that names a file as a shard is, or one that is made for all of them.
    """
    own = number_format.files(variant)
    common = {INDEX_NAME, CARD_NAME, BUILD_NAME, *(shard.name for shard in variant.shards)}
    if taken := sorted(common.intersection(own)):
        raise ValueError(f"files gave {taken[0]!r}, which is no file of a format's")
    others = {
        **variant.copied,
        **variant.serve,
        **own,
    }
    if has_index(shard.name for shard in variant.shards):
        others[INDEX_NAME] = _index(variant)
    records = _records(variant, others)
    measured = figures(content_key({"files": records, "sources": source_records(variant)}))
    card = render_card(number_format.card(), number_format, variant, measured)
    records |= _small_records({CARD_NAME: card})
    return Rendered({**others, CARD_NAME: card}, _provenance(variant, records))


def differs_in_card_alone(rendered: Rendered, record: Mapping[str, Any]) -> bool:
    """Whether a folder's build.json says the same but for the card, and of that something else."""
    said = {name: item for name, item in record.items() if name != "key"}
    card = rendered.record["files"][CARD_NAME]
    files = said.get("files")
    if not isinstance(files, dict) or files.get(CARD_NAME) == card:
        return False
    said["files"] = {**files, CARD_NAME: card}
    return canonical_json(said) == canonical_json(rendered.record)


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


def _records(variant: Variant, files: Mapping[str, bytes]) -> dict[str, Any]:
    """What build.json says of the shards and of these small files."""
    shards = {shard.name: {"size": shard.size, "pack": shard.pack} for shard in variant.shards}
    return shards | _small_records(files)


def _small_records(files: Mapping[str, bytes]) -> dict[str, Any]:
    return {
        name: {"size": len(content), "digest": digest_bytes(content)}
        for name, content in sorted(files.items())
    }


def _provenance(variant: Variant, records: Mapping[str, Any]) -> dict[str, Any]:
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
        "files": dict(records),
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
