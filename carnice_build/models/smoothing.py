"""Which modules of a decoder layer AWQ may smooth, and what balances them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SmoothingMapping:
    """The output of module `smooth` is divided, and what the modules `balance` read multiplied.

    Names are relative to the decoder layer, as in `mlp.up_proj`.
    """

    smooth: str
    balance: tuple[str, ...]


HYBRID_MAPPINGS = (
    SmoothingMapping(
        "input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    ),
    SmoothingMapping(
        "input_layernorm",
        tuple(f"linear_attn.in_proj_{part}" for part in ("qkv", "z", "b", "a")),
    ),
    SmoothingMapping("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    SmoothingMapping("mlp.up_proj", ("mlp.down_proj",)),
)
"""What llm-compressor takes for a model of full and linear attention without experts.

Source: `awq.dynamic_mappings.build_hybrid_attention_mappings`.
"""


def mappings_of_layer(
    mappings: Sequence[SmoothingMapping], modules: Collection[str], quantized: Collection[str]
) -> Iterator[SmoothingMapping]:
    """Those of `mappings` that smooth a layer made of `modules`, of which some are `quantized`.

    All of a mapping's modules must be there, and one of them quantized.
    """
    for mapping in mappings:
        names = (mapping.smooth, *mapping.balance)
        if all(name in modules for name in names) and any(name in quantized for name in names):
            yield mapping
