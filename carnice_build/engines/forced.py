"""What engines on a processor cannot do of a launch for cards: tables, with a reason for each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from carnice_build.serving.launches import Launch, Option

CONTEXT = 4096
"""Tokens of one request; all that is asked here is shorter."""

Options = Mapping[str, Any]
"""An engine's options by name, with the value that the launch gives each."""


@dataclass(frozen=True)
class Forced:
    """An option that a launch for cards gets another value of on a processor, None for none.

    `when` looks at the launch's own options; without it the value is forced on all.
    """

    flag: str
    value: Any
    reason: str
    when: Callable[[Options], bool] | None = None


def _cache_in_fp8(options: Options) -> bool:
    return str(options.get("kv-cache-dtype")).startswith("fp8")


FORCED: tuple[Forced, ...] = (
    Forced("tensor-parallel-size", 1, "there is one processor"),
    Forced("pipeline-parallel-size", None, "there is one processor"),
    Forced("data-parallel-size", None, "there is one processor"),
    Forced("disable-custom-all-reduce", None, "nothing is reduced on one processor"),
    Forced("max-model-len", CONTEXT, "what is asked is short, and memory is the machine's"),
    Forced("max-num-batched-tokens", None, "it goes with the launch's own context"),
    Forced("gpu-memory-utilization", None, "it is a share of a card's memory"),
    Forced("kv-cache-dtype", "auto", "a processor's attention has no FP8 cache", _cache_in_fp8),
    Forced("dtype", "bfloat16", "the kernels for processors compute in BF16"),
    Forced("attention-backend", None, "it names kernels for cards"),
    Forced("compilation-config", None, "there are no CUDA graphs on a processor"),
    Forced("enforce-eager", True, "to compile takes longer than to answer"),
    Forced("enable-prefix-caching", None, "vLLM 0.32 crashes with it beside drafts on a processor"),
    Forced("no-enable-prefix-caching", True, "as above, and it is on where it is left out"),
    Forced("max-num-seqs", 4, "questions are asked one at a time"),
)

LLAMA_FORCED: tuple[Forced, ...] = (
    Forced("ctx-size", CONTEXT, "what is asked is short, and memory is the machine's"),
    Forced("gpu-layers", None, "there is no card"),
    Forced("device", None, "there is no card"),
    Forced("split-mode", None, "there is no card"),
    Forced("tensor-split", None, "there is no card"),
    Forced("parallel", 1, "questions are asked one at a time"),
    Forced("no-ui", True, "nobody looks at it"),
)
"""The same of llama.cpp."""

ENVIRONMENT: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "OMP_NUM_THREADS": ("1", "more threads than that wait for one another in a small model"),
        "VLLM_CPU_KVCACHE_SPACE": ("1", "GiB of cache; left out, it is most of the memory"),
        "VLLM_CPU_OMP_THREADS_BIND": ("nobind", "cores are shared with whoever asks"),
        "VLLM_NO_USAGE_STATS": ("1", "nothing is told to anybody"),
        "HF_HUB_OFFLINE": ("1", "a folder is complete in itself"),
    }
)
"""Variables of the environment: value and reason."""


def options_on_processor(
    launch: Launch | None, forced: tuple[Forced, ...] = FORCED
) -> dict[str, str | None]:
    """The launch's own options as arguments, None for no value, with what is forced on them."""
    flags = launch.flags if launch else {}
    own = {name: option.value for name, option in flags.items()}
    found = {name: option.text for name, option in flags.items()}
    for name in launch.engine.own_options if launch else ():
        found.pop(name, None)
    for item in forced:
        if item.when is not None and not item.when(own):
            continue
        found.pop(item.flag, None)
        if item.value is not None:
            found[item.flag] = Option(item.value, item.reason, load_bearing=False).text
    return found
