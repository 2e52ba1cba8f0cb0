"""What of a variant its serving engine splits over cards: vLLM's rules, applied to a plan.

Each rule says where it stands in vLLM 0.32, below `vllm/`.
What linears with split outputs are wide is heads times a head's size, or what the next linear
reads, so that they need no rule of their own; eight of them share a word of packed zero points,
and a head's size and a group are multiples of that.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from carnice_build.formats.base import Conversion
from carnice_build.formats.scheme import Scheme
from carnice_build.models.base import Architecture, Part
from carnice_build.serving.sharding import Sharding, Split

_HEADS = {
    # `config/model.py`: verify_with_parallel_config.
    "num_attention_heads": "attention heads",
    # `model_executor/layers/mamba/gdn/base.py`: each card has whole heads of both.
    "linear_num_key_heads": "key heads of linear attention",
    "linear_num_value_heads": "value heads of linear attention",
}
"""Entries of the text model's config as vLLM reads them."""

_VOCABULARY_PADDING = 64
"""`model_executor/layers/vocab_parallel_embedding.py`: DEFAULT_VOCAB_PADDING_SIZE."""


def sharding_of(architecture: Architecture, conversion: Conversion) -> Sharding:
    """What of the folder that is published is split, and by what."""
    config = architecture.text_config
    return Sharding(
        architecture.num_layers,
        (
            *(Split(name, config[key]) for key, name in _HEADS.items() if _count(config, key)),
            # `model_executor/models/qwen3_next.py`, and so in others: a head is copied, not cut.
            Split("KV heads", architecture.kv_geometry.kv_heads, repeated=True),
            *_vocabulary(config),
            *_linears(architecture, conversion.quantized),
            *_tower(architecture),
        ),
    )


def _vocabulary(config: Mapping[str, Any]) -> Iterator[Split]:
    if size := _count(config, "vocab_size"):
        padded = -(-size // _VOCABULARY_PADDING) * _VOCABULARY_PADDING
        yield Split("rows of the padded vocabulary", padded)


def _linears(architecture: Architecture, quantized: Mapping[str, Scheme]) -> Iterator[Split]:
    """The inputs of linears that read what other linears were split to write.

    `model_executor/layers/linear.py`: RowParallelLinear divides them, and its quantization wants
    whole groups in each part: verify_group_size_divides_partition in
    `layers/quantization/utils/marlin_utils.py`, can_implement in `kernels/linear/mixed_precision`,
    `modelopt.py` for blocks of 16, validate_fp8_block_shape in `utils/fp8_utils.py`.
    """
    hidden = _count(architecture.text_config, "hidden_size")
    facts = {fact.module: fact for fact in architecture.tensors.values()}
    seen: set[tuple[int, int, bool]] = set()
    for layer in range(architecture.num_layers):
        for group in architecture.shared_inputs(layer):
            fact = facts[group[0]]
            # What alone reads its input and writes hidden states is the end of a block.
            if len(group) > 1 or fact.shape[-2] != hidden:
                continue
            scheme = quantized.get(fact.module)
            unit = (scheme.group_size if scheme else None) or 1
            columns = fact.shape[-1]
            if (columns, unit, fact.stacked) not in seen:
                seen.add((columns, unit, fact.stacked))
                # A group as wide as the input is none: `group_size < input_size` there.
                whole = unit if unit < columns else 1
                yield Split(f"inputs of {fact.module}", columns, whole, experts=fact.stacked)


def _tower(architecture: Architecture) -> Iterator[Split]:
    """`model_executor/models/qwen3_vl.py`: vision heads are divided like the text model's."""
    if any(fact.part is Part.TOWER for fact in architecture.built.values()):
        vision = architecture.published_config({Part.TOWER}).get("vision_config")
        for key in ("num_heads", "num_attention_heads"):
            if isinstance(vision, Mapping) and (heads := _count(vision, key)):
                yield Split("attention heads of the vision tower", heads, tower=True)


def _count(config: Mapping[str, Any], key: str) -> int:
    """Entry `key`, 0 where there is none."""
    value = config.get(key)
    return value if type(value) is int and value > 0 else 0
