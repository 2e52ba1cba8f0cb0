"""Folders as auto-round writes them, its traps left out.

One fact decides what is packed, what is listed and what is ignored: the modules that the
variant quantizes.  They are spelled as engines build them, which is not always as tensors are.
The library's own export turns what is plain into F32, drops the MTP head and spells `extra_config`
as the model in memory, whichever class that was.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from carnice_build.checkpoint.json import to_json
from carnice_build.formats.exclusions import engine_names
from carnice_build.formats.variant import Variant

if TYPE_CHECKING:
    from carnice_build.formats.autoround.format import AutoRoundFormat

VERSION = "0.15.1"
"""The version of auto-round whose format the files are in."""


def autoround_files(knobs: AutoRoundFormat, variant: Variant) -> dict[str, bytes]:
    """config.json."""
    return {"config.json": to_json(_config(knobs, variant))}


def _config(knobs: AutoRoundFormat, variant: Variant) -> dict[str, Any]:
    plain = {"bits": 16, "data_type": "fp"}
    return {
        **variant.config,
        "quantization_config": {
            "autoround_version": VERSION,
            **_provenance(knobs),
            "bits": 4,
            "group_size": knobs.group_size,
            "block_name_to_quantize": ",".join(_blocks(variant)),
            "data_type": "int",
            "extra_config": dict.fromkeys(
                engine_names(variant.architecture, variant.ignored), plain
            ),
            "packing_format": "auto_round:auto_gptq",
            "quant_method": "auto-round",
            "sym": True,
        },
    }


def _blocks(variant: Variant) -> list[str]:
    """The lists of layers in which something is packed, as `model.layers`."""
    architecture = variant.architecture
    packed = [fact for fact in architecture.tensors.values() if fact.module in variant.quantized]
    return sorted(
        {
            name.partition(f".{fact.layer}.")[0]
            for fact in packed
            for name in architecture.engine_names(fact.module)
        }
    )


def _provenance(knobs: AutoRoundFormat) -> dict[str, Any]:
    """What the library's config says of how the codes were found."""
    if knobs.method != "tune":
        return {"iters": 0}
    tuning = knobs.tuning
    return {"iters": tuning.iters, "batch_size": tuning.batch_size, "seed": tuning.seed}
