"""What a launch needs of the cards' memory, as far as it follows from numbers of the model.

Weights and the KV cache of one request of full length are counted.  Activations, CUDA graphs and
the delta net's states come on top, so a launch that does not fit here does not fit, and one that
fits may still run out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

from carnice_build.checkpoint.gguf_types import TYPES
from carnice_build.errors import PlanError
from carnice_build.serving.facts import ServingFacts
from carnice_build.serving.launches import Launch, setting
from carnice_build.serving.options import size_in_full

GIB = 2**30


def kv_cache_bytes(
    full_attention_layers: int,
    kv_heads: int,
    head_dim: int,
    bytes_per_element: Fraction | int,
    tokens: int,
) -> int:
    """Bytes of keys and values of `tokens` tokens; linear-attention layers keep none."""
    return int(2 * full_attention_layers * kv_heads * head_dim * bytes_per_element * tokens)


@dataclass(frozen=True)
class Memory:
    """Bytes on all cards together; `budget` is what the engine may use, None where unknown.

    `cache_types` are those of keys and values, once where they are the same.
    """

    tokens: int
    cache_types: tuple[str, ...]
    kv_cache: int
    weights: int
    budget: int | None

    @property
    def needed(self) -> int:
        """The least that must fit."""
        return self.kv_cache + self.weights


def estimate(launch: Launch, facts: ServingFacts) -> Memory:
    """What `launch` needs and has; PlanError when one of its numbers is none."""
    words = launch.engine.words
    tokens = whole_number(launch, words.context, facts)
    share = _share(launch, words.share, facts)
    pair = [str(setting(launch, flag, facts)) for flag in (words.keys, words.values)]
    cache = _cache_bytes(launch, facts, tokens, sum(map(_element_bytes, pair)) / Fraction(2))
    cards = launch.hardware
    memory = cards.cards * cards.vram * GIB * share if cards and cards.vram else None
    projector = any(name in launch.flags for name in launch.engine.files)
    return Memory(
        tokens,
        tuple(dict.fromkeys(_NAMES.get(kind, kind) for kind in pair)),
        cache,
        facts.weights_bytes + (facts.projector_bytes if projector else 0),
        None if memory is None else int(memory),
    )


def caches_by_type(launch: Launch, facts: ServingFacts) -> Iterator[tuple[str, int]]:
    """Each type that keys and values may both be cached in, and the bytes of a whole context."""
    fact = launch.engine.fact(launch.engine.words.keys)
    for kind in map(str, fact.choices if fact else ()):
        yield kind, _cache_bytes(launch, facts, facts.max_positions, _element_bytes(kind))


def _cache_bytes(
    launch: Launch, facts: ServingFacts, tokens: int, bytes_per_element: Fraction
) -> int:
    kv, words = facts.kv, launch.engine.words
    parallel = whole_number(launch, words.parallel, facts) if words.parallel else 1
    return kv_cache_bytes(
        kv.full_attention_layers + (kv.draft_layers if words.drafts in launch.flags else 0),
        # A head is not split: with more cards than heads each card holds one.
        max(kv.kv_heads, parallel),
        kv.head_dim,
        bytes_per_element,
        tokens,
    )


_NAMES = {"None": "BF16", "auto": "BF16"}
"""What a cache is of where the engine takes the type of the model."""


def _element_bytes(kind: str) -> Fraction:
    """Those of an element, as vLLM and ggml name types; blocks have their scales within."""
    found = TYPES.get(kind.upper())
    if found is not None:
        return Fraction(found.nbytes, found.elements)
    return Fraction(1 if kind.startswith("fp8") else 2)


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


def _share(launch: Launch, flag: str | None, facts: ServingFacts) -> float:
    if flag is None:
        return 1
    value = setting(launch, flag, facts)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        raise PlanError(
            f"{flag} {value!r} is no share", expected="0 to 1", at=launch.path("flags", flag)
        )
    return value
