"""What a model of transformers does before its decoder layers, without its embedding in memory.

Needs the `torch` extra; to be imported in worker processes alone.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only


class _Absent(TorchFunctionMode):
    """While this is open, what is computed with a tensor without content has no content either."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Calls `func`; RuntimeError where it would change a tensor that has content."""
        given = (args, kwargs or {})
        absent = [leaf.is_meta for leaf in tree_leaves(given) if isinstance(leaf, Tensor)]
        if any(absent) and not all(absent):
            if _in_place(func.__name__):
                raise RuntimeError(f"{func.__name__} with a tensor without content")
            given = tree_map_only(Tensor, lambda tensor: tensor.to("meta"), given)
        args, named = given
        return func(*args, **named)


def _in_place(name: str) -> bool:
    if name.startswith("__"):
        return name == "__setitem__" or name.startswith("__i")
    return name.endswith("_")


class _Rows(nn.Module):
    """In the place of an embedding, whose rows it is given before it is asked for them."""

    rows: Tensor

    def forward(self, _: Tensor) -> Tensor:
        return self.rows


class Entrance:
    """The body of a model, which reads rows of its embedding.

    Where weights are missing that are used before the layers, what follows from them is on meta.
    """

    def __init__(self, model: Any, layers: str) -> None:
        """Take the embedding, `table`, out of `model`; `others` are further tables, by path.

        `layers` is the path of the list of decoder layers.
        """
        self.table: nn.Embedding = model.get_input_embeddings()
        self.others = {
            path: module
            for path, module in model.named_modules()
            if isinstance(module, nn.Embedding) and not path.startswith(f"{layers}.")
        }
        self.path = next(path for path, table in self.others.items() if table is self.table)
        del self.others[self.path]
        self._body = model.base_model
        self._rows = _Rows()
        model.set_input_embeddings(self._rows)

    @torch.no_grad()
    def read(self, embedded: Tensor, tokens: Tensor | None = None) -> Any:
        """What the body makes of rows [samples, length, hidden] of the embedding.

        `tokens` are what it looks up in its other tables; without them, their rows are missing.
        """
        with _Absent():
            if not self.others:
                return self._body(inputs_embeds=embedded, use_cache=False)
            self._rows.rows = embedded
            if tokens is None:
                tokens = torch.zeros(embedded.shape[:2], dtype=torch.long, device=embedded.device)
            return self._body(input_ids=tokens, use_cache=False)


def looked_up(table: nn.Embedding, rows: Tensor) -> Tensor:
    """What a model has of rows [samples, length, width] of `table`, for it may scale them."""
    table = deepcopy(table)
    hold(table, rows)
    found: Tensor = table(places(rows))
    return found


def hold(table: nn.Embedding, rows: Tensor) -> None:
    """Leave `table` with rows [samples, length, width] and no others, in their order."""
    table.weight = nn.Parameter(rows.flatten(0, 1), requires_grad=False)
    # It changes nothing without training, and may be the number of a row that is not here.
    table.padding_idx = None


def places(rows: Tensor) -> Tensor:
    """The numbers [samples, length] of rows [samples, length, width] when these are all."""
    return torch.arange(rows.shape[:2].numel(), device=rows.device).view(rows.shape[:2])
