"""Which decoder layers keep keys and values that a cache may hold in fewer bits."""

from __future__ import annotations

from collections.abc import Mapping

from carnice_build.models.base import Architecture, Part, Role, TensorFact

_KEYS = ("k_proj", "qkv_proj")
"""What transformers calls linears that make keys, by which compressed-tensors tells attention.

Not `kv_b_proj`: engines cache the latent vectors before it, and not what it makes of them.
"""


def key_linears(architecture: Architecture) -> Mapping[int, TensorFact]:
    """By the number of the layer, the linear that makes the keys of a layer that caches its own.

    A layer with linear or latent attention has none, nor has one that is given another's keys.
    """
    return {
        fact.layer: fact
        for fact in architecture.tensors.values()
        if fact.part is Part.LAYERS
        and fact.role is Role.LINEAR
        and fact.layer is not None
        and fact.module.rpartition(".")[2] in _KEYS
    }


def borrowed_keys(architecture: Architecture) -> Mapping[int, int]:
    """By the number of a layer that is given another's keys and values, the layer that has them."""
    own = key_linears(architecture)
    return {
        layer: item.maker
        for layer in range(architecture.num_layers)
        if layer not in own
        for item in architecture.passed(layer)
        if item.maker is not None and item.maker in own
    }


def attention_of(key_linear: TensorFact) -> str:
    """The path of the module that such a linear is in."""
    return key_linear.module.rpartition(".")[0]
