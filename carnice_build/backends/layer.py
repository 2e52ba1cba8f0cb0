"""What an adapter is given to work on a decoder layer, whichever model it is of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class LayerRunner(Protocol):
    """Makes decoder layers of one kind, and runs them as their whole model would.

    `config` is the config of a transformers model with such a layer alone.
    Hidden states are [samples, length, hidden]; samples that run together have one length.
    """

    config: Any
    kind: str
    device: str
    dtype: torch.dtype

    def layer(self, tensors: Mapping[str, Tensor]) -> nn.Module:
        """A layer with `tensors`, named as in `mlp.up_proj.weight`, and used as they are."""

    def arguments(self, hidden: Tensor) -> dict[str, Any]:
        """What a layer is called with beside `hidden`, by the names of its parameters."""

    def run(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        """What `layer` makes of `hidden`, causally."""
