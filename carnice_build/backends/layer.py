"""What an adapter is given to work on a decoder layer, whichever model it is of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn


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

    def arguments(self, hidden: Tensor) -> dict[str, Any]:
        """What the layer is called with beside `hidden`, by the names of its parameters."""

    def run(self, layer: nn.Module, hidden: Tensor, beside: Mapping[str, Any] = ...) -> Tensor:
        """What `layer` makes of `hidden`, causally.

        `beside` holds those of its arguments that the model does not make of `hidden` alone.
        """
