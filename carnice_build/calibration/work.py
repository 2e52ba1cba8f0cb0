"""How many operations passes through a decoder layer are, by its weights and its config."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from carnice_build.dtypes import TensorSpec
from carnice_build.rates import Kind, Work
from carnice_build.tensors import STACK

_TOP_K = ("num_experts_per_tok", "experts_per_token", "top_k_experts", "moe_topk")
"""What configs call the number of experts that a token is sent to."""

_LINEAR = "linear_attention"
_SLIDING = "sliding_attention"


def _always(name: str) -> bool:
    del name
    return True


def pass_work(params: Mapping[str, Any], inputs: Sequence[TensorSpec], first: int = 2) -> Work:
    """One pass of all samples through the layer whose tensors begin at input `first`."""
    kind = Kind.RECURRENT if _layer_type(params) == _LINEAR else Kind.FORWARD
    return Work(kind, layer_operations(params, inputs, first))


def layer_operations(
    params: Mapping[str, Any],
    inputs: Sequence[TensorSpec],
    first: int = 2,
    *,
    within: Callable[[str], bool] = _always,
    everyone: bool = False,
) -> float:
    """Operations of one pass of all samples, each as long as it may be, through a layer.

    `inputs` are tokens [samples, length], and the layer's tensors from number `first` on; of these
    only those count whose names within the layer `within` takes.
    A token is sent to as many experts as the config says, or with `everyone` to all.
    What is no product with a weight is left out but for attention, whose scores count where a
    token looks back; that of layers with linear attention is not known.
    """
    samples, length = inputs[0].shape
    config = params["config"]
    share = 1.0 if everyone else _share(config, params, inputs, first)
    weights = 0.0
    attends = False
    for name, spec in zip(params["names"], inputs[first:], strict=False):
        if len(spec.shape) > 1 and within(name):
            weights += spec.size * (share if STACK in name else 1)
            attends |= "attn" in name or "attention" in name
    operations = 2.0 * weights * samples * length
    return operations + (samples * _attention(params, length) if attends else 0)


def _share(
    config: Mapping[str, Any], params: Mapping[str, Any], inputs: Sequence[TensorSpec], first: int
) -> float:
    """The part of all experts that a token is sent to."""
    named = zip(params["names"], inputs[first:], strict=False)
    experts = max((spec.shape[0] for name, spec in named if STACK in name), default=1)
    chosen = next((config[name] for name in _TOP_K if isinstance(config.get(name), int)), experts)
    return min(1.0, chosen / max(1, experts))


def _layer_type(params: Mapping[str, Any]) -> str | None:
    types = params["config"].get("layer_types") or ()
    return types[params["layer"]] if params["layer"] < len(types) else None


def _attention(params: Mapping[str, Any], length: int) -> float:
    """Operations of the scores of a sample, and of what they weigh."""
    config, kind = params["config"], _layer_type(params)
    heads = config.get("num_attention_heads")
    if kind == _LINEAR or not isinstance(heads, int):
        return 0
    window = config.get("sliding_window") if kind == _SLIDING else None
    back = min(length, window) if isinstance(window, int) else length
    pairs = back * length - back * back / 2
    return 2.0 * pairs * heads * _head_sizes(config, heads)


def _head_sizes(config: Mapping[str, Any], heads: int) -> int:
    """Of a key and a value together."""
    if "qk_nope_head_dim" in config:
        key = config["qk_nope_head_dim"] + config["qk_rope_head_dim"]
        return int(key + config["v_head_dim"])
    size = config.get("head_dim") or config.get("hidden_size", 0) // max(1, heads)
    return 2 * int(size)


def everyone_work(params: Mapping[str, Any], inputs: Sequence[TensorSpec]) -> Work:
    """One pass of all samples through a layer, and every expert for every token beside it."""
    once = layer_operations(params, inputs)
    everyone = layer_operations(params, inputs, within=lambda name: STACK in name, everyone=True)
    return Work(Kind.FORWARD, once + everyone)


def search_work(params: Mapping[str, Any], inputs: Sequence[TensorSpec]) -> Work:
    """AWQ's search: for each mapping, passes through what its linears are in, and two of the layer.

    One pass says what should come out, and one for each point of the grid what does.
    Every expert reads every token.
    """
    operations = 2 * layer_operations(params, inputs, everyone=True)
    for _, balance in params["mappings"]:
        parent = _parent(balance)
        once = layer_operations(
            params,
            inputs,
            within=lambda name, parent=parent: name.startswith(parent),  # type: ignore[misc]
            everyone=True,
        )
        operations += (params["n_grid"] + 1) * once
    return Work(Kind.AWQ, operations)


def _parent(modules: Sequence[str]) -> str:
    """The module that holds them all, or the only one, as names of its tensors begin."""
    if len(modules) == 1:
        return f"{modules[0]}."
    paths = [module.split(".") for module in modules]
    common = []
    for parts in zip(*paths, strict=False):
        if len({*parts}) > 1:
            break
        common.append(parts[0])
    # Experts are modules of their own, which only all of them together hold.
    while common and common[-1] == STACK:
        common.pop()
    return "".join(f"{part}." for part in common)


def tuning_work(params: Mapping[str, Any], inputs: Sequence[TensorSpec]) -> Work:
    """AutoRound's tuning: each iteration there and back, which is three passes of a batch.

    Before it, all samples pass through the layer twice.
    """
    samples, settings = inputs[0].shape[0], params["settings"]
    once = layer_operations(params, inputs, 3)
    batch = min(1.0, settings["batch_size"] / samples) * settings["gradient_accumulate_steps"]
    return Work(Kind.AUTOROUND, (3 * settings["iters"] * batch + 2) * once)


_FLOAT32 = 3.5
"""Products in BF16 that a core computes in the time of one in float32."""

_IN_BLOCK = 200
"""Operations in the time that one column of a block takes to bring a weight of it up to date."""


def hessian_work(
    params: Mapping[str, Any], inputs: Sequence[TensorSpec], hessians: Sequence[TensorSpec]
) -> Work:
    """GPTQ's statistics: a pass with all experts for all tokens, and products of inputs."""
    samples, length = inputs[0].shape
    products = sum(2.0 * spec.size for spec in hessians) * samples * length
    once = layer_operations(params, inputs, everyone=True)
    return Work(Kind.FORWARD, once + _FLOAT32 * products)


def compensation_work(weight: TensorSpec, block_size: int) -> Work:
    """GPTQ of a weight: the factors of its Hessian, then its columns, in blocks.

    Memory bounds what happens in a block, products what follows each.
    """
    rows, columns = weight.shape[-2:]
    matrices = weight.size // (rows * columns)
    products = 4 / 3 * columns**3 + rows * columns**2
    in_blocks = float(_IN_BLOCK * block_size * rows * columns)
    return Work(Kind.FORWARD, matrices * (_FLOAT32 * products + in_blocks))
