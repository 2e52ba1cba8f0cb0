"""What of a packaged folder its serving follows from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from carnice_build.models.base import KvGeometry
from carnice_build.serving.profile import ServingProfile, Support
from carnice_build.serving.sharding import Sharding


@dataclass(frozen=True)
class ServingFacts:
    """Facts of one packaged folder.

    `repo` is where it is published, as owner/name; `quantization` is the engine's name for its
    format (`modelopt`, `compressed-tensors`, `inc`), `profiles` are its launches;
    `schemes` are the format's schemes that it has, none where the format has but one, and `support`
    is what engines make of each;
    the parsers are those that read what the packaged chat template makes the model write, None
    where it has no such form;
    `text_only` says that the model has a vision tower which the folder lacks;
    `weights_bytes` counts all shards; `max_positions` is the longest context in tokens;
    `sharding` is what several cards share;
    `packaged_sampling` is what its generation_config.json says of sampling, as vLLM reads it, and
    `stated_sampling` what the recipe says, which is none where it says nothing;
    `kv_cache_dtype` is the type of a cache whose scales are in the folder, None without any;
    `model_file` is what is served where an engine loads no folder, the first of split files, and
    `projector` that of the towers, which has `projector_bytes` beside `weights_bytes`, and `hears`
    if one of them is for sound.
    """

    repo: str
    variant: str
    quantization: str
    profiles: Mapping[str, ServingProfile]
    tool_call_parser: str | None
    reasoning_parser: str | None
    has_mtp: bool
    text_only: bool
    weights_bytes: int
    kv: KvGeometry
    max_positions: int
    sharding: Sharding
    packaged_sampling: Mapping[str, int | float]
    stated_sampling: Mapping[str, int | float]
    schemes: tuple[str, ...] = ()
    support: Mapping[str, Mapping[str, Support]] = field(default_factory=dict)
    kv_cache_dtype: str | None = None
    model_file: str | None = None
    projector: str | None = None
    projector_bytes: int = 0
    hears: bool = False
