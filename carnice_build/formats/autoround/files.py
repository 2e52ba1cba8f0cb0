"""Folders as auto-round writes them, its traps left out.

One fact decides what is packed, what is listed and what is ignored: the modules that the
variant quantizes.  The library's own export spells `extra_config` with other names than the
tensors, turns what is plain into F32 and drops the MTP head.
"""

from __future__ import annotations

from typing import Any

from carnice_build.checkpoint.json import to_json
from carnice_build.formats.card import render_card
from carnice_build.formats.variant import Variant

VERSION = "0.15.1"
"""The version of auto-round whose format the files are in."""


class AutoRoundPackager:
    """Writes config.json and README.md."""

    def files(self, variant: Variant) -> dict[str, bytes]:
        """See `Packager.files`."""
        return {
            "config.json": to_json(_config(variant)),
            "README.md": render_card(
                "autoround.md.j2",
                variant,
                library="transformers",
                tags=("autoround", "int4", "w4a16", "vllm"),
            ),
        }


def _config(variant: Variant) -> dict[str, Any]:
    blocks = sorted({name.partition(".layers.")[0] + ".layers" for name in variant.quantized})
    plain = {"bits": 16, "data_type": "fp"}
    return {
        **variant.config,
        "quantization_config": {
            "autoround_version": VERSION,
            **variant.defaults,
            "block_name_to_quantize": ",".join(blocks),
            "data_type": "int",
            "extra_config": dict.fromkeys(variant.ignored, plain),
            "packing_format": "auto_round:auto_gptq",
            "quant_method": "auto-round",
            "sym": True,
        },
    }
