"""What every packager is given, and the files that all targets have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from carnice_build import __version__
from carnice_build.checkpoint.checkpoint import INDEX_NAME, Checkpoint
from carnice_build.checkpoint.datasets import Dataset
from carnice_build.checkpoint.json import to_json
from carnice_build.checkpoint.profiles import Source
from carnice_build.dtypes import TensorSpec
from carnice_build.keys import canonical_json
from carnice_build.models.base import Architecture
from carnice_build.recipe.schema import CalibrationSpec, CardSpec
from carnice_build.store.digests import digest_bytes

BUILD_NAME = "build.json"


@dataclass(frozen=True)
class Shard:
    """A file of weights: its name in the folder, the pack it is, and what it holds in order."""

    name: str
    pack: str
    path: Path
    size: int
    tensors: Sequence[tuple[str, TensorSpec, str]]


@dataclass(frozen=True)
class Variant:
    """All that the files of a folder may speak of.

    `config` is the model's config.json but for its quantization.
    `copied` holds the small files that come from the checkpoint, as the steps left them;
    `serve` those that say how to serve it.  `figures` are numbers that actions measured.
    `calibration` and `dataset` are None when nothing was calibrated, whatever the recipe says.
    """

    name: str
    description: str
    recipe: Mapping[str, Any]
    card: CardSpec
    sources: Mapping[str, Source]
    body: str
    config: Mapping[str, Any]
    tools: Mapping[str, str]
    defaults: Mapping[str, Any]
    quantized: Mapping[str, Mapping[str, Any]]
    ignored: Sequence[str]
    parameters: int
    shards: Sequence[Shard]
    copied: Mapping[str, bytes]
    architecture: Architecture
    serve: Mapping[str, bytes]
    figures: Mapping[str, Sequence[float]]
    calibration: CalibrationSpec | None
    dataset: Dataset | None

    @property
    def checkpoint(self) -> Checkpoint:
        """The checkpoint that the variant is made from."""
        return self.sources[self.body].checkpoint

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(spec.nbytes for shard in self.shards for _, spec, _ in shard.tensors)

    @property
    def bits_per_weight(self) -> float:
        """Bits of all tensors over the elements of the source tensors they stand for."""
        return 8 * self.tensor_bytes / self.parameters


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


class Packager(Protocol):
    """Writes what is particular to one target."""

    def files(self, variant: Variant) -> dict[str, bytes]:
        """Contents by file name: config.json and README.md at least."""


def render_files(variant: Variant, packager: Packager) -> Rendered:
    """Every file of the folder but the shards; deterministic."""
    others = {
        **variant.copied,
        **variant.serve,
        INDEX_NAME: _index(variant),
        **packager.files(variant),
    }
    return Rendered(others, _provenance(variant, others))


def _index(variant: Variant) -> bytes:
    weight_map = {name: shard.name for shard in variant.shards for name, _, _ in shard.tensors}
    return to_json(
        {
            "metadata": {
                "total_size": variant.tensor_bytes,
                "total_parameters": variant.parameters,
            },
            "weight_map": dict(sorted(weight_map.items())),
        }
    )


def source_records(variant: Variant) -> dict[str, Any]:
    """What a build says of its sources; nothing that tells where on this machine they are."""
    records: dict[str, Any] = {}
    for name, source in variant.sources.items():
        records[name] = {
            "model": source.spec.model,
            "revision": source.spec.revision,
            "profile": source.profile or "given on the command line",
        }
        if source.revision is not None:
            records[name]["commit"] = source.revision
    return records


def dataset_record(variant: Variant) -> dict[str, Any]:
    """What a build says of a dataset on the hub that it was calibrated on."""
    dataset = variant.dataset
    if dataset is None or dataset.commit is None:
        return {}
    return {"dataset": {"name": dataset.name, "commit": dataset.commit}}


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
