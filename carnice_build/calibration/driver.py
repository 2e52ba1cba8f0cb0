"""A decoder layer of any text model of transformers, run as its whole model would run it.

transformers builds the model without weights, with one decoder layer; a stand-in for the layer
learns from one pass what the model calls it with: masks, positions and what else there is.
So hidden states have the bits that the whole model gives for one sample without padding, at the
same arithmetic, while no more is held than the tensors of one layer: the caller gathers rows of
the embedding, makes a layer, runs its samples through it and drops it.
Needs the `torch` extra; to be imported in worker processes alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.configuration_utils import ALLOWED_LAYER_TYPES

from carnice_build.errors import BackendError


class NonFiniteInput(Exception):
    """The input of `linear`, a module's name relative to its layer, held NaN or infinity."""

    def __init__(self, linear: str) -> None:
        super().__init__(linear)
        self.linear = linear


@dataclass(frozen=True)
class Arithmetic:
    """How a forward pass computes; all of it but `device` belongs into the key of what follows."""

    dtype: Literal["bfloat16", "float32"]
    attention: Literal["sdpa", "eager"]
    threads: int
    device: str = "cpu"

    @property
    def torch_dtype(self) -> torch.dtype:
        """The type of weights and hidden states."""
        return {"bfloat16": torch.bfloat16, "float32": torch.float32}[self.dtype]

    def place(self, tensor: Tensor) -> Tensor:
        """`tensor` in the arithmetic's type and on its device; the same one if it is there."""
        return tensor.to(self.device, self.torch_dtype)

    def fill(self, module: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
        """Give `module`, ready for use, its tensors by their names in it.

        RuntimeError, which names them, when one is missing, left over or of another shape.
        """
        placed = {name: self.place(tensor) for name, tensor in tensors.items()}
        module.load_state_dict(placed, strict=True, assign=True)
        return module.requires_grad_(False).eval()


def skeleton(text_config: Mapping[str, Any], arithmetic: Arithmetic) -> Any:
    """transformers' causal language model of a checkpoint's `text_config`, without its weights.

    What no checkpoint holds, as the frequencies of rotary embeddings, is there; BackendError when
    transformers can make it only together with all weights.
    Sets the threads of this process's torch.
    """
    torch.set_num_threads(arithmetic.threads)
    config_class = CONFIG_MAPPING[text_config["model_type"]]
    config = config_class(**text_config)
    # None would mean eager, which without a mask is silently not causal.
    config._attn_implementation = arithmetic.attention
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[config_class]
    with torch.device("meta"):
        model = model_class(config)
    for path, module in model.named_modules():
        if module._non_persistent_buffers_set:
            _revive(model, path, module.to_empty(device=arithmetic.device, recurse=False))
    return model.requires_grad_(False).eval()


def _revive(model: Any, path: str, module: nn.Module) -> None:
    """Compute the buffers of a module, as transformers does when no checkpoint holds them."""
    buffers = [item for item in module.buffers(recurse=False) if item.is_floating_point()]
    for buffer in buffers:
        buffer.fill_(torch.nan)
    model._init_weights(module)
    if any(buffer.isnan().any() for buffer in buffers):
        raise BackendError(f"transformers does not say how to make the buffers of {path}")


def decoder_layers(model: Any) -> nn.ModuleList:
    """The list of the model's decoder layers."""
    classes = model._no_split_modules or ()
    return next(
        module
        for module in model.modules()
        if isinstance(module, nn.ModuleList) and len(module) and type(module[0]).__name__ in classes
    )


class LayerDriver:
    """Decoder layers of one kind; see `backends.layer.LayerRunner`.

    Hidden states are [samples, length, hidden] of the arithmetic's type.
    Samples that run together have one length: there is no padding anywhere.
    """

    def __init__(self, text_config: Mapping[str, Any], kind: str, arithmetic: Arithmetic) -> None:
        """Take a checkpoint's `text_config`; `kind` is as `Architecture.layer_kind` has it."""
        self.kind = kind
        self.arithmetic = arithmetic
        self.device = arithmetic.device
        self.dtype = arithmetic.torch_dtype
        # transformers asks a config by index for a layer's type.
        layer_type = kind if kind in ALLOWED_LAYER_TYPES else f"{kind}_attention"
        one_layer = {"num_hidden_layers": 1, "layer_types": [layer_type]}
        self._model = skeleton({**text_config, **one_layer}, arithmetic)
        self.config = self._model.config
        layers = decoder_layers(self._model)
        self._blank = layers[0]
        layers[0] = _StandIn()

    def layer(self, tensors: Mapping[str, Tensor]) -> nn.Module:
        """A decoder layer with `tensors`, named as in `mlp.up_proj.weight`.

        RuntimeError, which names them, when a tensor is missing, left over or of another shape.
        """
        return self.arithmetic.fill(deepcopy(self._blank), tensors)

    def arguments(self, hidden: Tensor) -> dict[str, Any]:
        """What the model calls a layer with beside `hidden`, by the names of its parameters."""
        try:
            with torch.no_grad():
                self._model.base_model(inputs_embeds=hidden, use_cache=False)
        except _Called as call:
            return call.arguments
        raise AssertionError("the model never called its layer")

    @torch.no_grad()
    def run(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        """What `layer` makes of `hidden`, which begins at position 0, causally."""
        result: Tensor = layer(hidden, **self.arguments(hidden))
        return result


class _Called(Exception):
    """Ends a pass where a decoder layer would begin."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        super().__init__()
        self.arguments = arguments


class _StandIn(nn.Module):
    """In the place of a decoder layer: tells what it was called with."""

    def forward(self, hidden: Tensor, **arguments: Any) -> NoReturn:
        raise _Called(arguments)


@contextmanager
def input_amax(layer: nn.Module) -> Iterator[dict[str, float]]:
    """While this is open, collect the largest magnitude that each linear of `layer` is given.

    Names are relative to the layer (`mlp.up_proj`).
    The figures are those of modelopt's max calibrator, per tensor.
    A pass raises NonFiniteInput on NaN or infinity.
    """
    found: dict[str, float] = {}

    def watch(name: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            low, high = (end.item() for end in torch.aminmax(inputs[0]))
            amax = max(-low, high)
            if not amax < float("inf"):
                raise NonFiniteInput(name)
            found[name] = max(amax, found.get(name, 0.0))

        return hook

    handles = [
        module.register_forward_pre_hook(watch(name))
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
