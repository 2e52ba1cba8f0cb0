"""A whole text model from its tensors by name: opened a layer at a time, or kept to generate.

Needs the `torch` extra; to be imported in worker processes alone.
"""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable, Collection, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from inspect import signature
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast

from carnice_build.calibration.beginning import Beginning
from carnice_build.calibration.decoding import (
    Continuation,
    Prompt,
    continue_together,
    takes_padding,
)
from carnice_build.calibration.driver import (
    Arithmetic,
    LayerDriver,
    StandIn,
    decoder_layers,
    skeleton,
)
from carnice_build.calibration.entrance import Entrance
from carnice_build.calibration.watch import Watch, WeightPlaces
from carnice_build.calibration.weights import Owners, Placing
from carnice_build.errors import BackendError, nearest
from carnice_build.models.base import Architecture, Part, Role, TensorFact
from carnice_build.tensors import numbered

InputTransform = Callable[[Tensor], Tensor]
"""From the input of a linear to what the linear shall see, of the same shape and type."""

Transforming = Callable[[], AbstractContextManager[Any]]
"""Makes what a pass is to run in, for its linears to see transformed inputs."""

NONE: Mapping[str, nn.Embedding] = MappingProxyType({})


@dataclass(frozen=True)
class ModelSource:
    """A text model that is not open yet.

    `tensor` gives a tensor by its canonical name, dequantized, of any float type.
    `input_transforms` are by the paths of linears in decoder layers (`...layers.0.mlp.up_proj`) or
    before them, each expert's by its number; linears that are fused have one input, and need one
    transform.
    """

    architecture: Architecture
    tensor: Callable[[str], Tensor]
    input_transforms: Mapping[str, InputTransform] = field(default_factory=dict)


@dataclass(frozen=True)
class State:
    """What layers know of a sequence: `hidden` [1, length, hidden], and what is beside it.

    Of several sequences of one length that go `together`, [samples, length, hidden].

    `of_tokens` is that by the number of the layer that is given it and what it is called there,
    `shared` the mappings that layers fill for others, by what they are called.
    """

    hidden: Tensor
    of_tokens: Mapping[tuple[int, str], Tensor]
    shared: Mapping[str, MutableMapping[str, Any]]

    def beside(self, layer: int) -> dict[str, Any]:
        """What layer number `layer` is called with beside `hidden`."""
        own = {name: tensor for (index, name), tensor in self.of_tokens.items() if index == layer}
        return {**own, **self.shared}


def together(states: Sequence[State]) -> State:
    """The states of sequences of one length as one, [samples, length, ...], before any layer.

    What layers share is empty then, and each finds the samples there in the order that it has.
    """
    first = states[0]
    if len(states) == 1:
        return first
    of_tokens = {
        key: torch.cat([state.of_tokens[key] for state in states]) for key in first.of_tokens
    }
    return State(torch.cat([state.hidden for state in states]), of_tokens, first.shared)


class OpenModel:
    """The parts of a source under one arithmetic, each loaded when it is asked for."""

    def __init__(self, source: ModelSource, arithmetic: Arithmetic) -> None:
        """BackendError when an input transform names no linear of the model's body."""
        self.architecture = source.architecture
        self.arithmetic = arithmetic
        self._source = source
        facts = self._facts(Part.LAYERS, Part.BODY)
        linears = [
            module
            for fact in facts
            if fact.role is Role.LINEAR
            for module in numbered(fact.module, fact.shape[0])
        ]
        for module in source.input_transforms:
            if module not in linears:
                raise BackendError(
                    f"{module} is no linear of the body", nearest=nearest(module, linears)
                )

    @property
    def vocabulary(self) -> int:
        """How many tokens are scored."""
        return self._table.shape[0]

    def embedded(self, sequences: Sequence[Tensor]) -> list[State]:
        """What the first layer takes for each of `sequences`, int64 [length].

        Rows of the embedding, with what the model makes of tokens for its layers.
        Inputs of linears are transformed as the source says.
        """
        passed = [
            (layer, item)
            for layer in range(self.architecture.num_layers)
            for item in self.architecture.passed(layer)
        ]
        wanted = [(layer, item.argument) for layer, item in passed if item.maker is None]
        shared = {item.argument for _, item in passed if item.maker is not None}
        names = [fact.name for fact in self._facts(Part.EMBED)] if wanted else [self._table.name]
        tables = {name: self._source.tensor(name) for name in names}
        given = self._given(wanted) if wanted else lambda _: ()
        states = []
        for tokens in sequences:
            rows = {
                name: table[tokens.to(table.device)].unsqueeze(0) for name, table in tables.items()
            }
            states.append(
                State(
                    self.arithmetic.place(rows[self._table.name]),
                    dict(zip(wanted, given(rows), strict=True)),
                    {name: UserDict() for name in shared},
                )
            )
        return states

    def _given(
        self, wanted: Sequence[tuple[int, str]]
    ) -> Callable[[Mapping[str, Tensor]], Sequence[Tensor]]:
        """What layers are `wanted` to be given, by the rows of all tables; see `Beginning`."""
        config = self.architecture.text_config
        beginning = Beginning(config, self.arithmetic, self._tensors(Part.BODY))
        transforming = self._transforming(beginning.model, beginning.owners)

        def given(rows: Mapping[str, Tensor]) -> Sequence[Tensor]:
            with transforming():
                return beginning.given(rows, wanted)

        return given

    def layer(self, index: int) -> Callable[[State], State]:
        """Decoder layer `index`, from states to states.

        The first takes rows of the embedding.
        Inputs of linears are transformed as the source says.
        """
        driver = LayerDriver(self.architecture.text_config, index, self.arithmetic)
        prefix = self.architecture.layer_prefix(index)
        facts = [fact for fact in self._facts(Part.LAYERS) if fact.layer == index]
        named = {fact.name.removeprefix(prefix): self._source.tensor(fact.name) for fact in facts}
        layer = driver.layer(named)
        transforming = self._transforming(layer, driver.owners(named), prefix)

        def run(state: State) -> State:
            with transforming():
                hidden = driver.run(layer, driver.enter(state.hidden), state.beside(index))
            return replace(state, hidden=hidden)

        return run

    def ending(self) -> Ending:
        """What stands behind the last layer."""
        model = skeleton(self.architecture.text_config, self.arithmetic)
        layers, _ = decoder_layers(model)
        entrance, carry = Entrance(model, layers), _Carry(model)
        self._fill(model, self._tensors(Part.BODY) | self._head(model), entrance.others)
        return Ending(model, entrance, carry)

    def whole(self) -> tuple[Any, Transforming]:
        """All of the model as transformers has it, and what its passes are to run in."""
        model = skeleton(self.architecture.text_config, self.arithmetic)
        tensors = self._tensors(Part.EMBED, Part.LAYERS, Part.BODY) | self._head(model)
        owners = Placing(model, whole=True).owners(tensors)
        self._fill(model, tensors)
        return model, self._transforming(model, owners)

    def draft_head(self) -> nn.Module:
        """The head that drafts tokens, as its family computes it."""
        place, tensor = self.arithmetic.place, self._source.tensor
        head: nn.Module = self.architecture.draft_head(
            self.arithmetic.attention,
            {fact.name: place(tensor(fact.name)) for fact in self._facts(Part.MTP)},
        )
        return head.to(self.arithmetic.device)

    @property
    def _table(self) -> TensorFact:
        return self._facts(Part.EMBED)[0]

    def _facts(self, *parts: Part) -> list[TensorFact]:
        return [fact for fact in self.architecture.tensors.values() if fact.part in parts]

    def _tensors(self, *parts: Part) -> dict[str, Tensor]:
        return {fact.name: self._source.tensor(fact.name) for fact in self._facts(*parts)}

    def _fill(
        self, model: Any, tensors: Mapping[str, Tensor], absent: Mapping[str, nn.Embedding] = NONE
    ) -> None:
        """Load all weights but those of `absent`, tables by their paths."""
        placed = Placing(model, whole=True).place(tensors, self.arithmetic.device)
        placed |= {f"{path}.weight": table.weight for path, table in absent.items()}
        model.load_state_dict(placed, strict=True, assign=True)
        model.requires_grad_(False)

    def _head(self, model: Any) -> dict[str, Tensor]:
        """What scores tokens: a part of its own, or the embedding once more."""
        found = self._tensors(Part.HEAD)
        if found:
            return found
        head = model.get_output_embeddings()
        path = next(path for path, module in model.named_modules() if module is head)
        return {f"{path}.weight": self._source.tensor(self._table.name)}

    def _transforming(
        self, module: nn.Module, owners: Mapping[str, Owners], prefix: str = ""
    ) -> Transforming:
        transforms = self._source.input_transforms

        def watch(linears: Sequence[str], given: Tensor) -> Tensor:
            for linear in linears:
                if prefix + linear in transforms:
                    return transforms[prefix + linear](given)
            return given

        return partial(Watch, WeightPlaces(module, owners), watch) if transforms else nullcontext


class _Carry:
    """In the place of all layers of a model: what comes out is `hidden`, whatever goes in."""

    hidden: Tensor

    def __init__(self, model: Any) -> None:
        _, layers = decoder_layers(model)
        for index, layer in enumerate(layers):
            layers[index] = StandIn(layer, lambda *_, **__: self.hidden)


class Ending:
    """The end of a model, in two pieces.

    The first goes from the body's last layer to the states that tokens are chosen from, the second
    from them to the choice.
    """

    def __init__(self, model: Any, entrance: Entrance, carry: _Carry) -> None:
        """Cut `model` in two, in which `carry` is in the place of the layers."""
        self._entrance = entrance
        self._carry = carry
        self._scoring = Scoring(model)

    def states(self, hidden: Tensor) -> Tensor:
        """What the model knows [1, length, hidden], after its final norm."""
        self._carry.hidden = hidden
        result: Tensor = self._entrance.read(hidden).last_hidden_state
        return result

    def scores(self, states: Tensor) -> Tensor:
        """Logits [1, length, vocabulary] of states."""
        return self._scoring.scores(states)


class Scoring:
    """What a model does with the states that tokens are chosen from."""

    def __init__(self, model: Any) -> None:
        """Take the body out of `model`, which is of no other use then; the body is."""
        self._model = model
        setattr(model, model.base_model_prefix, _Given())

    @torch.no_grad()
    def scores(self, states: Tensor) -> Tensor:
        """Logits [1, length, vocabulary] of states."""
        result: Tensor = self._model(inputs_embeds=states, use_cache=False).logits
        return result


class _Given(nn.Module):
    """In the place of a model's body: its states are what it is given."""

    def forward(self, inputs_embeds: Tensor, **_: Any) -> BaseModelOutputWithPast:
        return _States(last_hidden_state=inputs_embeds)  # type: ignore[arg-type]


class _States(BaseModelOutputWithPast):
    """What else a family's body gives, as the scores of its routers, is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)


class ResidentModel:
    """A text model wholly in memory."""

    def __init__(self, model: OpenModel) -> None:
        """Load everything that a pass through `model` needs."""
        torch.set_num_threads(model.arithmetic.threads)
        whole, self._transforming = model.whole()
        self._config = whole.config
        self._body = whole.base_model
        self._device = model.arithmetic.device
        self._scoring = Scoring(whole)
        self._padding: bool | None = None

    def embed(self, tokens: Tensor) -> Tensor:
        """Rows [1, length, hidden] of the embedding for `tokens` [length], which is on the CPU."""
        rows: Tensor = self._body.get_input_embeddings()(tokens.to(self._device)[None])
        return rows

    def scores(self, states: Tensor) -> Tensor:
        """Logits [1, length, vocabulary] of `states` that a norm has gone over."""
        return self._scoring.scores(states)

    def cache(self) -> Any:
        """What is to hold what the model has read."""
        return DynamicCache(config=self._config)

    @torch.no_grad()
    def known(self, tokens: Tensor) -> Tensor:
        """States [samples, length, hidden], after the final norm, of `tokens` [samples, length].

        Nothing is masked, so that rows may be filled up behind their ends alone.
        """
        with self._transforming():
            passed = self._body(input_ids=tokens.to(self._device), use_cache=False)
        states: Tensor = passed.last_hidden_state
        return states

    @torch.no_grad()
    def read(self, tokens: Tensor, cache: Any, seen: Tensor | None = None) -> Tensor:
        """What the model knows at each of `tokens` [rows, new]; see `decoding.Decoder`."""
        padding: dict[str, Tensor] = {}
        if seen is not None:
            seen = seen.to(self._device)
            positions = (seen.cumsum(dim=1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
            padding = {"attention_mask": seen, "position_ids": positions}
        with self._transforming():
            # Not rows: the model may look tokens up in more than one table.
            states: Tensor = self._body(
                input_ids=tokens.to(self._device), past_key_values=cache, use_cache=True, **padding
            ).last_hidden_state
        return states

    def continue_greedily(
        self, prompt: Tensor, count: int, ends: Collection[int] = ()
    ) -> Continuation:
        """Continue `prompt`, int64 [length], by `count` tokens, or up to one of `ends`."""
        return self.continue_all([Prompt(prompt, count, ends)])[0]

    def continue_all(self, prompts: Sequence[Prompt]) -> list[Continuation]:
        """Continue the prompts, many at once."""
        uneven = len({len(prompt.tokens) for prompt in prompts}) > 1
        if uneven and self._padding is None:
            named = signature(self._body.forward).parameters
            takes = "attention_mask" in named and "position_ids" in named
            self._padding = takes and takes_padding(self, prompts)
        return continue_together(self, prompts, padding=bool(uneven and self._padding))
