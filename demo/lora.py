"""Low-rank updates of the linear weights of some layers, and merging them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from model import DraftingModel
from torch import Tensor, nn
from torch.nn.utils import parametrize

RANK = 16
SCALE = 2.0
TUNED_LAYERS = range(2, 8)
TUNED_MODULES = frozenset(
    (
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        *("in_proj_qkv", "in_proj_z", "out_proj"),
    )
)


class LowRankUpdate(nn.Module):
    """Adds `SCALE / RANK * up @ down` to a weight; it begins as nothing."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        rows, columns = weight.shape
        device = weight.device
        self.down = nn.Parameter(torch.randn(RANK, columns, device=device) / columns**0.5)
        self.up = nn.Parameter(torch.zeros(rows, RANK, device=device))

    def forward(self, weight: Tensor) -> Tensor:
        """The updated weight."""
        return weight + (SCALE / RANK) * (self.up @ self.down)


def add_adapters(model: DraftingModel) -> list[nn.Parameter]:
    """Freezes the model and returns the parameters of the updates put onto it."""
    model.requires_grad_(False)
    adapters: list[nn.Parameter] = []
    for linear in _tuned_linears(model):
        update = LowRankUpdate(linear.weight)
        parametrize.register_parametrization(linear, "weight", update)
        adapters += update.parameters()
    return adapters


def merge_adapters(model: DraftingModel) -> None:
    """Makes every update part of its weight."""
    for linear in _tuned_linears(model):
        parametrize.remove_parametrizations(linear, "weight", leave_parametrized=True)


def _tuned_linears(model: DraftingModel) -> Iterator[nn.Linear]:
    layers = model.main.model.language_model.layers
    for index in TUNED_LAYERS:
        for name, module in layers[index].named_modules():
            if name.rpartition(".")[2] in TUNED_MODULES:
                yield module
