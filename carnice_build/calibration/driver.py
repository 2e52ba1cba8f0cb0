"""A decoder layer of any text model of transformers, run as its whole model would run it.

transformers builds the model without weights, layers and all; stand-ins for the layers learn from
one pass what the model calls one of them with: masks, positions and what else there is.
What follows from weights elsewhere, or from what other layers made, is given beside hidden states.
So hidden states have the bits that the whole model gives for one sample without padding, at the
same arithmetic, while no more is held than the tensors of one layer: the caller gathers rows of
the embedding, makes a layer, runs its samples through it and drops it.
Needs the `torch` extra; to be imported in worker processes alone.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping, MutableMapping
from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

from carnice_build.calibration.entrance import Entrance, looked_up
from carnice_build.calibration.refusal import refused
from carnice_build.calibration.weights import Owners, Placing
from carnice_build.errors import BackendError, CarniceError

Beside = Mapping[str, Any]
"""What a layer is called with for one sample, beside hidden states, by the names of its parameters.

Only what the model makes with weights before its layers, and the mappings that layers fill.
"""

NOTHING: Beside = MappingProxyType({})


@dataclass(frozen=True)
class Arithmetic:
    """How a forward pass computes; all of it but `device` belongs into the key of what follows.

    Experts are always run one after the other, as in transformers' `eager`.
    """

    dtype: Literal["bfloat16", "float32"]
    attention: Literal["sdpa", "eager"]
    threads: int
    device: str = "cpu"

    @classmethod
    def of(cls, params: Mapping[str, Any]) -> Arithmetic:
        """That of an action with these parameters; see `passes.Forward`."""
        return cls(params["dtype"], params["attention"], params["threads"], params["device"])

    @property
    def torch_dtype(self) -> torch.dtype:
        """The type of weights and hidden states."""
        return {"bfloat16": torch.bfloat16, "float32": torch.float32}[self.dtype]

    def place(self, tensor: Tensor) -> Tensor:
        """`tensor` in the arithmetic's type and on its device; the same one if it is there."""
        return tensor.to(self.device, self.torch_dtype)


def skeleton(text_config: Mapping[str, Any], arithmetic: Arithmetic) -> Any:
    """transformers' causal language model of a checkpoint's `text_config`, without its weights.

    What no checkpoint holds, as the frequencies of rotary embeddings, is there; BackendError when
    transformers does not say how to make it, or lacks the attention for this model, CheckpointError
    when it does not take the config.
    """
    try:
        return _skeleton(text_config, arithmetic)
    except (CarniceError, ImportError, MemoryError, OSError):
        raise
    except Exception as error:
        raise refused(text_config, error, lambda config: _skeleton(config, arithmetic)) from error


def _skeleton(text_config: Mapping[str, Any], arithmetic: Arithmetic) -> Any:
    config_class, model_class = _classes(text_config)
    if arithmetic.attention == "sdpa" and not model_class._supports_sdpa:
        raise BackendError(f"transformers has no attention sdpa for {model_class.__name__}")
    with torch.device("meta"):
        model = model_class._from_config(
            # What JSON has no number for is an object there.
            config_class.from_dict(config_class._decode_special_floats(dict(text_config))),
            dtype=arithmetic.torch_dtype,
            # None would mean eager, which without a mask is silently not causal.
            attn_implementation=arithmetic.attention,
            experts_implementation="eager",
        )
    for path, module in model.named_modules():
        _revive(model, path, module, arithmetic.device)
    return model.requires_grad_(False).eval()


def usual_attention(text_config: Mapping[str, Any]) -> Literal["sdpa", "eager"]:
    """The attention that transformers takes for the model when nobody says which."""
    return "sdpa" if _classes(text_config)[1]._supports_sdpa else "eager"


def _classes(text_config: Mapping[str, Any]) -> tuple[Any, Any]:
    """transformers' config and causal language model of a `text_config`."""
    model_type = text_config["model_type"]
    try:
        config_class: Any = CONFIG_MAPPING[model_type]
        return config_class, MODEL_FOR_CAUSAL_LM_MAPPING[config_class]
    except KeyError:
        raise BackendError(f"transformers has no causal language model {model_type!r}") from None


def _revive(model: Any, path: str, module: nn.Module, device: str) -> None:
    """Compute the buffers of a module, as transformers does when no checkpoint holds them."""
    made = []
    for name in module._non_persistent_buffers_set:
        buffer = module._buffers[name]
        if buffer is not None:
            blank = torch.nan if buffer.is_floating_point() else 0
            module._buffers[name] = torch.full_like(buffer, blank, device=device)
            made.append(module._buffers[name])
    if made:
        model._init_weights(module)
    if any(buffer is not None and buffer.isnan().any() for buffer in made):
        raise BackendError(f"transformers does not say how to make the buffers of {path}")


def decoder_layers(model: Any) -> tuple[str, nn.ModuleList]:
    """The list of the model's decoder layers, and its path."""
    classes = model._no_split_modules or ()
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and module and type(module[0]).__name__ in classes:
            return path, module
    raise BackendError(f"{type(model).__name__} of transformers has no list of decoder layers")


class StandIn(nn.Module):
    """In the place of a decoder layer, of which it has the attributes but not the tensors."""

    def __init__(self, layer: nn.Module, forward: Callable[..., Any]) -> None:
        """Compute `forward` when called."""
        super().__init__()
        self._layer = (layer,)
        self.forward = forward

    def __getattr__(self, name: str) -> Any:
        """What a model asks of its layers, as for a layer's type."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._layer[0], name)


class _Called(Exception):
    """Ends a pass where a decoder layer would begin."""


class Outline:
    """A model without weights, whose layers only tell what they are called with."""

    def __init__(
        self, text_config: Mapping[str, Any], arithmetic: Arithmetic, whole: bool = False
    ) -> None:
        """`whole` is that of `Placing`."""
        self.model = skeleton(text_config, arithmetic)
        self.placing = Placing(self.model, whole)
        self.path, layers = decoder_layers(self.model)
        self.blanks = list(layers)
        self.entrance = Entrance(self.model, self.path)
        self._wanted = 0
        self._calls: list[tuple[Tensor, dict[str, Any]]] = []
        for index, layer in enumerate(self.blanks):
            layers[index] = StandIn(layer, self._stand_in(index))
        self._untouched = [
            (module, dict(vars(module)), _copied(module._buffers))
            for module in self.model.modules()
        ]

    def _forget(self) -> None:
        """Make the model what it was before any call.

        Rotary embeddings that follow the length, as `dynamic` ones, remember the longest sample.
        """
        for module, attributes, buffers in self._untouched:
            vars(module).clear()
            vars(module).update(attributes)
            module._buffers.clear()
            module._buffers.update(_copied(buffers))

    def _stand_in(self, index: int) -> Callable[..., Tensor]:
        names = list(inspect.signature(self.blanks[index].forward).parameters)

        def forward(*given: Any, **named: Any) -> Tensor:
            arguments = {**dict(zip(names, given, strict=False)), **named}
            hidden: Tensor = arguments.pop(names[0])
            self._calls.append((hidden, arguments))
            if index == self._wanted:
                raise _Called
            return hidden

        return forward

    def calls(
        self, last: int, embedded: Tensor, tokens: Tensor | None = None
    ) -> list[tuple[Tensor, dict[str, Any]]]:
        """What each layer up to number `last` is called with: hidden states, and what else.

        See `Entrance.read`; as no layer does anything, all have the same hidden states.
        """
        self._forget()
        self._wanted, self._calls = last, []
        try:
            self.entrance.read(embedded, tokens)
        except _Called:
            calls, self._calls = self._calls, []
            return calls
        except RuntimeError as error:  # of tensors without content
            raise self.refusal(f"uses weights before its layers: {error}") from None
        raise self.refusal("never calls its layers")

    def refusal(self, what: str) -> BackendError:
        """The error for a model whose layers cannot run one by one."""
        return BackendError(
            f"{type(self.model).__name__} of transformers {what}",
            expected="a family whose layers are given nothing but what the layer before them made, "
            "or whose table tells what else (`passed`)",
        )


def _copied(buffers: Mapping[str, Tensor | None]) -> dict[str, Tensor | None]:
    return {name: None if buffer is None else buffer.clone() for name, buffer in buffers.items()}


@lru_cache(maxsize=1)
def _outline(text_config: str, arithmetic: Arithmetic) -> Outline:
    """The layers of one model follow each other in a process, and all have one outline."""
    return Outline(json.loads(text_config), arithmetic)


class LayerDriver:
    """Decoder layer number `layer` of a model; see `backends.layer.LayerRunner`.

    Hidden states are [samples, length, hidden] of the arithmetic's type.
    Samples that run together have one length: there is no padding anywhere.
    """

    def __init__(self, text_config: Mapping[str, Any], layer: int, arithmetic: Arithmetic) -> None:
        """Take a checkpoint's `text_config`.

        Sets the threads of this process's torch.
        """
        torch.set_num_threads(arithmetic.threads)
        self.number = layer
        self.arithmetic = arithmetic
        self.device = arithmetic.device
        self.dtype = arithmetic.torch_dtype
        self._outline = _outline(json.dumps(text_config, sort_keys=True), arithmetic)
        self._blank = self._outline.blanks[layer]
        self.config = self._outline.model.config
        self._prefix = f"{self._outline.path}.{layer}."

    def layer(self, tensors: Mapping[str, Tensor]) -> nn.Module:
        """The decoder layer with `tensors`, named as in `mlp.up_proj.weight`.

        All experts of a projection may come as one, as in `mlp.experts.*.up_proj.weight`.
        RuntimeError, which names them, when a tensor is missing, left over or of another shape.
        """
        layer = deepcopy(self._blank)
        placed = self._outline.placing.place(self._prefixed(tensors), self.device)
        named = {name.removeprefix(self._prefix): tensor for name, tensor in placed.items()}
        layer.load_state_dict(named, strict=True, assign=True)
        return layer.requires_grad_(False).eval()

    def owners(self, tensors: Mapping[str, Tensor]) -> dict[str, Owners]:
        """By the layer's parameters, the linears whose weights they hold; see `Placing.owners`."""
        owners = self._outline.placing.owners(self._prefixed(tensors))
        cut = len(self._prefix)
        return {
            parameter[cut:]: tuple(tuple(name[cut:] for name in names) for names in linears)
            for parameter, linears in owners.items()
        }

    def enter(self, hidden: Tensor) -> Tensor:
        """What the layer is called with, given rows of the embedding or what a layer made.

        A model may scale the former before its first layer reads them.
        """
        hidden = self.arithmetic.place(hidden)
        if self.number:
            return hidden
        outline = self._outline
        ((entered, _),) = outline.calls(0, looked_up(outline.entrance.table, hidden))
        if entered.is_meta:
            raise outline.refusal("makes hidden states with weights of no layer")
        return entered

    def arguments(self, hidden: Tensor, beside: Beside = NOTHING) -> dict[str, Any]:
        """What the model calls the layer with beside `hidden`, by the names of its parameters.

        Of these, `beside` holds what the model does not make of hidden states alone.
        """
        *_, (_, arguments) = self._outline.calls(self.number, hidden)
        arguments |= {name: beside[name] for name in beside.keys() & arguments.keys()}
        for name, argument in arguments.items():
            if any(isinstance(leaf, Tensor) and leaf.is_meta for leaf in tree_leaves(argument)):
                what = f"makes {name} of layer {self.number} with weights of no layer"
                raise self._outline.refusal(what)
        return arguments

    @torch.no_grad()
    def run(self, layer: nn.Module, hidden: Tensor, beside: Beside = NOTHING) -> Tensor:
        """What `layer` makes of `hidden`, which begins at position 0, causally.

        It may put into the mappings of `beside`, and get from them, what is for other layers.
        """
        arguments = self.arguments(hidden, beside)
        try:
            result = layer(hidden, **arguments)
        except KeyError as missing:
            shared = [
                name for name, given in arguments.items() if isinstance(given, MutableMapping)
            ]
            if not shared:
                raise
            what = f"gives layer {self.number} {missing} of other layers in {shared[0]}"
            raise self._outline.refusal(what) from None
        made: Tensor = result[0] if isinstance(result, tuple) else result
        return made

    def _prefixed(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {self._prefix + name: tensor for name, tensor in tensors.items()}
