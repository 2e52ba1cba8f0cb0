"""What the tests of serving share: facts of three folders, and sections of recipes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from carnice_build.errors import PlanError
from carnice_build.formats.autoround.format import AutoRoundFormat
from carnice_build.formats.compressed_tensors.format import CompressedFormat
from carnice_build.formats.gguf.format import GgufFormat
from carnice_build.formats.nvfp4.format import Nvfp4Format
from carnice_build.formats.registry import FORMATS
from carnice_build.models.base import KvGeometry
from carnice_build.recipe.serve import ServeSpec
from carnice_build.serving.facts import ServingFacts
from carnice_build.serving.launches import Launch
from carnice_build.serving.memory import GIB
from carnice_build.serving.rules import plan_launches
from carnice_build.serving.sharding import Sharding, Split

CARNICE = Sharding(
    64,
    (
        Split("attention heads", 24),
        Split("key heads of linear attention", 16),
        Split("value heads of linear attention", 48),
        Split("KV heads", 4, repeated=True),
        Split("rows of the padded vocabulary", 248320),
        Split("inputs of mlp.down_proj", 17408, 16),
        Split("attention heads of the vision tower", 16, tower=True),
    ),
)
"""Of the 27B, in groups as NVFP4 has them."""

NVFP4 = ServingFacts(
    repo="owner/Carnice-V2-27b-NVFP4-TEXT-MTP",
    variant="nvfp4",
    quantization="modelopt",
    profiles=Nvfp4Format.serving().profiles,
    tool_call_parser="qwen3_xml",
    reasoning_parser="qwen3",
    has_mtp=True,
    text_only=True,
    weights_bytes=19_640_000_000,
    kv=KvGeometry(16, 4, 256, draft_layers=1),
    max_positions=262_144,
    sharding=CARNICE,
    packaged_sampling={"temperature": 1.0, "top_p": 0.95, "top_k": 20},
    stated_sampling={},
)
INT4 = replace(
    NVFP4,
    repo="owner/Carnice-V2-27B-INT4-BF16-MTP",
    variant="int4",
    quantization="inc",
    profiles=AutoRoundFormat.serving().profiles,
    tool_call_parser="hermes",
    text_only=False,
    weights_bytes=int(2 * 9.19 * GIB),
)
AWQ40B = replace(
    NVFP4,
    repo="owner/Deckard-40B-W4A16-AWQ",
    variant="w4a16",
    quantization="compressed-tensors",
    profiles=CompressedFormat.serving().profiles,
    schemes=("W4A16_ASYM",),
    support=CompressedFormat.serving().support,
    has_mtp=False,
    text_only=False,
    weights_bytes=38_200_000_000,
    kv=KvGeometry(24, 4, 256),
)
FP8 = replace(
    NVFP4,
    repo="owner/Carnice-V2-27b-FP8-Dynamic",
    variant="fp8-dynamic",
    quantization="compressed-tensors",
    profiles=CompressedFormat.serving().profiles,
    schemes=("FP8_DYNAMIC",),
    support=CompressedFormat.serving().support,
    weights_bytes=30_300_000_000,
)
INT8 = replace(FP8, repo="owner/Carnice-V2-27b-W8A8", variant="w8a8", schemes=("W8A8",))
FP4 = replace(
    FP8,
    repo="owner/Carnice-V2-27b-FP8-NVFP4",
    variant="fp8-nvfp4",
    schemes=("NVFP4A16", "FP8_DYNAMIC"),
    weights_bytes=22_830_000_000,
)
GGUF = replace(
    NVFP4,
    repo="owner/Carnice-V2-27b-GGUF",
    variant="gguf-q4_k_m",
    quantization="gguf",
    profiles=GgufFormat.serving().profiles,
    text_only=False,
    weights_bytes=16_810_000_000,
    model_file="Carnice-V2-27b-Q4_K_M.gguf",
    projector="mmproj-Carnice-V2-27b-F16.gguf",
    projector_bytes=930_000_000,
)
FACTS = {
    "llama-server": GGUF,
    "nvfp4-vllm": NVFP4,
    "modelopt-vllm": replace(NVFP4, weights_bytes=30_300_000_000),
    "fp8-vllm": FP8,
    "int8-vllm": INT8,
    "fp4-vllm": FP4,
    "int4-autoround-vllm": INT4,
    "w4a16-v100": AWQ40B,
    "w4a16-vllm": AWQ40B,
    "vllm": FP8,
}


PROFILES = {
    name: profile
    for number_format in FORMATS.values()
    if (serving := number_format.serving()) is not None
    for name, profile in serving.profiles.items()
}


def spec_of(profile: str, **launches: Any) -> ServeSpec:
    """A recipe's section; launches as keywords, `_` for `-`."""
    changes = {name.replace("_", "-"): change for name, change in launches.items()}
    return ServeSpec.model_validate({"profile": profile, "launches": changes})


def launch_of(spec: ServeSpec, name: str, facts: ServingFacts) -> Launch:
    """The checked launch `name`."""
    return next(launch for launch in plan_launches(spec, facts) if launch.name == name)


def refused(spec: ServeSpec, facts: ServingFacts) -> PlanError:
    """The error that planning `spec` raises."""
    with pytest.raises(PlanError) as caught:
        plan_launches(spec, facts)
    return caught.value
