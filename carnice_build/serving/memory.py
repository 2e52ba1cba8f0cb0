"""What a launch needs of the cards' memory, as far as it follows from numbers of the model.

Weights and the KV cache of one request of full length are counted.  Activations, CUDA graphs and
the delta net's states come on top, so a launch that does not fit here does not fit, and one that
fits may still run out.
"""

from __future__ import annotations

from dataclasses import dataclass

from carnice_build.errors import PlanError
from carnice_build.serving.facts import ServingFacts
from carnice_build.serving.launches import Launch, setting
from carnice_build.serving.options import size_in_full

GIB = 2**30


def kv_cache_bytes(
    full_attention_layers: int,
    kv_heads: int,
    head_dim: int,
    bytes_per_element: int,
    tokens: int,
) -> int:
    """Bytes of keys and values of `tokens` tokens; linear-attention layers keep none."""
    return 2 * full_attention_layers * kv_heads * head_dim * bytes_per_element * tokens


@dataclass(frozen=True)
class Memory:
    """Bytes on all cards together; `budget` is what the engine may use, None where unknown."""

    tokens: int
    kv_cache: int
    weights: int
    budget: int | None

    @property
    def needed(self) -> int:
        """The least that must fit."""
        return self.kv_cache + self.weights


def estimate(launch: Launch, facts: ServingFacts) -> Memory:
    """What `launch` needs and has; PlanError when one of its numbers is none."""
    kv = facts.kv
    tokens = whole_number(launch, "max-model-len", facts)
    parallel = whole_number(launch, "tensor-parallel-size", facts)
    share = _share(launch, facts)
    drafts = "speculative-config" in launch.flags
    # A head is not split: with more cards than heads each card holds one.
    cache = kv_cache_bytes(
        kv.full_attention_layers + (kv.draft_layers if drafts else 0),
        max(kv.kv_heads, parallel),
        kv.head_dim,
        _element_bytes(setting(launch, "kv-cache-dtype", facts)),
        tokens,
    )
    cards = launch.hardware
    memory = cards.cards * cards.vram * GIB * share if cards and cards.vram else None
    return Memory(tokens, cache, facts.weights_bytes, None if memory is None else int(memory))


def _element_bytes(dtype: object) -> int:
    return 1 if str(dtype).startswith("fp8") else 2


def whole_number(launch: Launch, flag: str, facts: ServingFacts) -> int:
    """The value of a setting that is a count, maybe as 16k; PlanError where it is none."""
    value = setting(launch, flag, facts)
    number = size_in_full(value) if isinstance(value, str) else value
    if type(number) is not int or number < 1:
        raise PlanError(
            f"{flag} {value!r} is no count",
            expected="at least 1",
            at=launch.path("flags", *flag.split(".")),
        )
    return number


def _share(launch: Launch, facts: ServingFacts) -> float:
    flag = "gpu-memory-utilization"
    value = setting(launch, flag, facts)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        raise PlanError(
            f"{flag} {value!r} is no share", expected="0 to 1", at=launch.path("flags", flag)
        )
    return value
