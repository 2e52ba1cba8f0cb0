"""What an adapter is given to work on a decoder layer, whichever model it is of.

Libraries that quantize experts make modules of them, each with linears of its own, and call these
as in `experts.3.gate_proj` however a checkpoint calls them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

_PARTS = {"gate_up_proj": ("gate_proj", "up_proj")}
"""What libraries make of one parameter of all experts, where that is not one linear an expert."""


class LayerRunner(Protocol):
    """Makes one decoder layer of a model, and runs it as the whole model would run it.

    `config` is the text model's, as transformers has it.
    Hidden states are [samples, length, hidden]; samples that run together have one length.
    """

    config: Any
    device: str
    dtype: torch.dtype

    def layer(self, tensors: Mapping[str, Tensor]) -> nn.Module:
        """The layer with `tensors`, named as in `mlp.up_proj.weight`, and used as they are."""

    def owners(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Sequence[Sequence[str]]]:
        """By the layer's parameters, the modules of `tensors` whose weights they hold.

        A parameter of all experts has an entry for each, any other one entry.
        """

    def arguments(self, hidden: Tensor) -> dict[str, Any]:
        """What the layer is called with beside `hidden`, by the names of its parameters."""

    def run(self, layer: nn.Module, hidden: Tensor, beside: Mapping[str, Any] = ...) -> Tensor:
        """What `layer` makes of `hidden`, causally.

        `beside` holds those of its arguments that the model does not make of `hidden` alone.
        """


def module_paths(runner: LayerRunner, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Where the modules of a layer's `tensors` stand when every expert's linears are modules.

    Names are as in `block_sparse_moe.experts.3.w1`, paths as in `mlp.experts.3.gate_proj`.
    """
    paths: dict[str, str] = {}
    for parameter, owners in runner.owners(tensors).items():
        module, _, name = parameter.rpartition(".")
        if name == "weight":
            paths |= {linear: module for linears in owners for linear in linears}
            continue
        for number, linears in enumerate(owners):
            parts = zip(linears, _PARTS.get(name, (name,)), strict=True)
            paths |= {linear: f"{module}.{number}.{part}" for linear, part in parts}
    return paths
