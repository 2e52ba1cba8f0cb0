"""A whole text model from its tensors by name: opened a layer at a time, or kept to generate.

Needs the `torch` extra; to be imported in worker processes alone.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from carnice_build.calibration.driver import Arithmetic, LayerwiseModel
from carnice_build.errors import BackendError, nearest
from carnice_build.models.base import Part, Role
from carnice_build.models.qwen3_5 import BODY, Qwen35

_EMBEDDING = f"{BODY}embed_tokens.weight"
_HEAD = "lm_head.weight"

InputTransform = Callable[[Tensor], Tensor]
"""From the input of a linear to what the linear shall see, of the same shape and type."""


@dataclass(frozen=True)
class ModelSource:
    """A text model that is not open yet.

    `tensor` gives a tensor by its canonical name, dequantized, of any float type.
    `input_transforms` are by the paths of decoder linears (`...layers.0.mlp.up_proj`).
    """

    text_config: Mapping[str, Any]
    tensor: Callable[[str], Tensor]
    input_transforms: Mapping[str, InputTransform] = field(default_factory=dict)


class OpenModel:
    """The parts of a source under one arithmetic, each loaded when it is asked for."""

    def __init__(self, source: ModelSource, arithmetic: Arithmetic) -> None:
        """BackendError when an input transform names no linear of a decoder layer."""
        self.parts = LayerwiseModel(source.text_config, arithmetic)
        self._source = source
        self._facts = Qwen35(source.text_config, "text_config").tensors
        linears = [
            fact.module
            for fact in self._facts.values()
            if fact.part is Part.LAYERS and fact.role is Role.LINEAR
        ]
        for module in source.input_transforms:
            if module not in linears:
                raise BackendError(
                    f"{module} is no linear of a layer", nearest=nearest(module, linears)
                )

    def embedding(self) -> Tensor:
        """The embedding table [vocabulary, hidden], as the source has it."""
        return self._source.tensor(_EMBEDDING)

    def layer(self, index: int) -> nn.Module:
        """Decoder layer `index`, its inputs transformed as the source says."""
        prefix = f"{BODY}layers.{index}."
        layer = self.parts.layer(self.parts.kinds[index], self.below(prefix))
        for module, transform in self._source.input_transforms.items():
            if module.startswith(prefix):
                linear = layer.get_submodule(module.removeprefix(prefix))
                linear.register_forward_pre_hook(_transforming(transform))
        return layer

    def below(self, prefix: str) -> dict[str, Tensor]:
        """The tensors under `prefix` by the rest of their names."""
        return {
            name.removeprefix(prefix): self._source.tensor(name)
            for name in self._facts
            if name.startswith(prefix)
        }

    def norm(self) -> nn.Module:
        """The norm behind the last layer."""
        return self.parts.final_norm(self._source.tensor(f"{BODY}norm.weight"))

    def head(self) -> Tensor:
        """The matrix [vocabulary, hidden] that scores tokens, ready for use."""
        name = _HEAD if _HEAD in self._facts else _EMBEDDING
        return self.parts.place(self._source.tensor(name))


def _transforming(transform: InputTransform) -> Any:
    def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
        return transform(inputs[0])

    return hook


@dataclass(frozen=True)
class Continuation:
    """A prompt of `prompt` tokens and what the model says after it, at temperature 0.

    `tokens` is [length], int64, prompt included.
    `states` is [1, length - 1, hidden]: what the model knew, after its final norm, when it
    chose each token but the first.
    `bad_step` is the first generated token, from 1, with a logit that was not finite.
    """

    prompt: int
    tokens: Tensor
    states: Tensor
    bad_step: int | None


class ResidentModel:
    """A text model wholly in memory."""

    def __init__(self, model: OpenModel) -> None:
        """Load everything that a pass through `model` needs."""
        self.parts = model.parts
        self._embedding = model.embedding()
        self._layers = [model.layer(index) for index in range(len(self.parts.kinds))]
        self._norm = model.norm()
        self._head = model.head()

    def embed(self, tokens: Tensor) -> Tensor:
        """Rows [1, length, hidden] of the embedding for `tokens` [length], which is on the CPU."""
        return self.parts.embed(self._embedding[tokens.to(self._embedding.device)])

    def scores(self, states: Tensor) -> Tensor:
        """Logits [1, length, vocabulary] of `states` that a norm has gone over."""
        return functional.linear(states, self._head)

    def continue_greedily(
        self, prompt: Tensor, count: int, ends: Collection[int] = ()
    ) -> Continuation:
        """Continue `prompt`, int64 [length], by `count` tokens, or up to one of `ends`."""
        pasts = [self.parts.start_past() for _ in self._layers]
        tokens, states, bad_step = prompt, [], None
        new = prompt
        for step in range(1, count + 1):
            hidden = self.embed(new)
            for layer, past in zip(self._layers, pasts, strict=True):
                hidden = self.parts.run(layer, hidden, past)
            states.append(self._norm(hidden))
            logits = self.scores(states[-1][:, -1:])
            if bad_step is None and not logits.isfinite().all():
                bad_step = step
            new = logits.argmax(-1)[0].cpu()
            tokens = torch.cat([tokens, new])
            if int(new) in ends:
                break
        return Continuation(len(prompt), tokens, torch.cat(states, dim=1), bad_step)
