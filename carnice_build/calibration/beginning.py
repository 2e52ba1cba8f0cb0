"""What a model makes of tokens before its layers, to give it to them beside hidden states.

Needs the `torch` extra; to be imported in worker processes alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from carnice_build.calibration.driver import Arithmetic, Outline
from carnice_build.calibration.entrance import hold, looked_up, places


class Beginning:
    """The part of a model before its layers; of its tables it holds the rows of one sample.

    `owners` are, by the parameters of `model`, the linears whose weights they hold.
    """

    def __init__(
        self, text_config: Mapping[str, Any], arithmetic: Arithmetic, tensors: Mapping[str, Tensor]
    ) -> None:
        """`tensors` are what it holds but its tables, named as checkpoints have them.

        Sets the threads of this process's torch.
        """
        torch.set_num_threads(arithmetic.threads)
        self._device = arithmetic.device
        self._outline = Outline(text_config, arithmetic, whole=True)
        self.model = self._outline.model
        self.owners = self._outline.placing.owners(tensors)
        for name, tensor in self._outline.placing.place(tensors, self._device).items():
            path, _, last = name.rpartition(".")
            owner = self.model.get_submodule(path)
            setattr(owner, last, nn.Parameter(tensor, requires_grad=False))

    def given(self, rows: Mapping[str, Tensor], wanted: Sequence[tuple[int, str]]) -> list[Tensor]:
        """What layers are given of a sample, `wanted` by their numbers and names of parameters.

        `rows` are [1, length, width], of the tensors of all tables, for each token.
        BackendError for what needs more weights than are here.
        """
        outline, entrance = self._outline, self._outline.entrance
        placed = outline.placing.place(rows, self._device)
        own = placed[f"{entrance.path}.weight"]
        for path, table in entrance.others.items():
            hold(table, placed[f"{path}.weight"])
        last = max(layer for layer, _ in wanted)
        calls = outline.calls(last, looked_up(entrance.table, own), places(own))
        found = []
        for layer, argument in wanted:
            tensor = calls[layer][1].get(argument)
            if not isinstance(tensor, Tensor) or tensor.is_meta:
                raise outline.refusal(f"makes no {argument} for layer {layer} of tokens")
            found.append(tensor)
        return found
