"""What the files of a published folder may speak of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from carnice_build.checkpoint.containers import is_statistics
from carnice_build.checkpoint.datasets import Dataset
from carnice_build.checkpoint.profiles import Source
from carnice_build.dtypes import TensorSpec
from carnice_build.formats.scheme import Scheme
from carnice_build.models.base import Architecture
from carnice_build.recipe.schema import CalibrationSpec, CardSpec


@dataclass(frozen=True)
class Shard:
    """A file of weights: its name in the folder, the pack it is, and what it holds in order.

    `tensors` are name, spec and digest; a `*` in a name is as in `tensors.members`.
    """

    name: str
    pack: str
    path: Path
    size: int
    tensors: Sequence[tuple[str, TensorSpec, str]]


@dataclass(frozen=True)
class Parent:
    """A source of the recipe, and what of the folder comes from it, in words."""

    source: str
    parts: str


@dataclass(frozen=True)
class PackagedTemplate:
    """What the packaged chat template makes a model write, and vLLM's parsers that read it.

    `patched` says that it writes tool calls otherwise than the source's own.
    """

    patched: bool
    tool_call_parser: str | None
    reasoning_parser: str | None
    flags: Sequence[str]


@dataclass(frozen=True)
class Variant:
    """All that the files of a folder may speak of.

    `config` is the model's config.json but for its quantization.
    `stated` is what else the format's files state; see `Conversion`.
    `copied` holds the small files that come from the checkpoint, as the steps left them;
    `serve` those that say how to serve it, and `launch` is the first way, as a shell takes it.
    `parents` has the body first; `template` is None where there is none or it cannot be used.
    `figures` are numbers that actions measured.
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
    quantized: Mapping[str, Scheme]
    stated: Mapping[str, Any]
    ignored: Sequence[str]
    parameters: int
    shards: Sequence[Shard]
    copied: Mapping[str, bytes]
    architecture: Architecture
    serve: Mapping[str, bytes]
    launch: str
    parents: Sequence[Parent]
    template: PackagedTemplate | None
    figures: Mapping[str, Sequence[float]]
    calibration: CalibrationSpec | None
    dataset: Dataset | None

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(
            spec.nbytes
            for shard in self.shards
            if not is_statistics(shard.name)
            for _, spec, _ in shard.tensors
        )

    @property
    def bits_per_weight(self) -> float:
        """Bits of all tensors over the elements of the source tensors they stand for."""
        return 8 * self.tensor_bytes / self.parameters


def source_records(variant: Variant) -> dict[str, Any]:
    """What a build says of its sources; nothing that tells where on this machine they are."""
    records: dict[str, Any] = {}
    for name, source in variant.sources.items():
        records[name] = {
            "model": source.spec.model,
            "revision": source.spec.revision,
            "profile": source.origin,
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
