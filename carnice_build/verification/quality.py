"""How much a quantized model differs from its source: perplexity, divergence, a continuation.

Models run in torch, all over the same sequences and one decoder layer at a time, so that any model
whose tensors can be had by name is measured in the same way.
Needs the `torch` extra; to be imported in worker processes alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from carnice_build.calibration.driver import Arithmetic
from carnice_build.calibration.text_model import (
    Ending,
    ModelSource,
    OpenModel,
    ResidentModel,
    State,
    together,
)
from carnice_build.verification.generate import PROMPT, TOKENS, Generation
from carnice_build.verification.kept import NOT_KEPT, KeptSource
from carnice_build.verification.process import tell

BATCH_TOKENS = 1024
"""So many tokens go through a layer at once, or one sequence if that is longer.

Sums are then made in another order than one by one, which moves a figure in its seventh digit.
"""

_LOGITS_BYTES = 256 << 20
"""Memory for the float32 logits of the positions that are scored at once, for one model."""


@dataclass(frozen=True)
class Quality:
    """How well a model predicts text, over `tokens` predicted tokens, two at least.

    `perplexity` is the exponential of the mean loss, `error` its standard error.
    `kl` is the mean over the same positions of KL(reference || model), in nats.
    A figure that is not finite is None.
    """

    perplexity: float | None
    error: float | None
    kl: float | None
    tokens: int


def measure(
    models: Mapping[str, ModelSource],
    sequences: Sequence[Tensor],
    arithmetic: Arithmetic,
    kept: KeptSource = NOT_KEPT,
    first: int = 0,
) -> dict[str, Quality]:
    """The quality of each model on `sequences`, int64 [length]; the first one is the reference.

    What is predicted at position `first` of a sequence, and at those behind it, counts.

    All models have one vocabulary.
    What the source's last layer gives is `kept`.
    In memory at a time: one layer of one model, the norms and heads of all, and for each model
    the hidden states of all sequences.
    """
    opened = {name: OpenModel(source, arithmetic) for name, source in models.items()}
    hidden = {
        name: _kept_hidden(kept, model, sequences)
        if name == kept.model
        else last_hidden(model, sequences)
        for name, model in opened.items()
    }
    endings = {name: model.ending() for name, model in opened.items()}
    vocabulary = next(iter(opened.values())).vocabulary
    figures: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in models}
    for index, tokens in enumerate(sequences):
        for start, stop in _blocks(first, len(tokens) - 1, vocabulary):
            targets = tokens[start + 1 : stop + 1]
            reference = None
            for name, ending in endings.items():
                found = _log_probabilities(ending, hidden[name][index][:, start:stop])
                reference = found if reference is None else reference
                figures[name].append((_losses(found, targets), _divergences(reference, found)))
    return {name: _quality(blocks) for name, blocks in figures.items()}


def generate(source: ModelSource, tokenizer: Any, arithmetic: Arithmetic) -> Generation:
    """Continue the chat prompt of check `generate` greedily, with the whole model in memory.

    `tokenizer` is one of transformers.
    Goes on after an end-of-turn token, so that as many steps are tried in every model.
    """
    if tokenizer.chat_template is None:
        prompt = tokenizer.encode(PROMPT)
    else:
        messages = [{"role": "user", "content": PROMPT}]
        prompt = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False
        )
    model = ResidentModel(OpenModel(source, arithmetic))
    text = model.continue_greedily(torch.tensor(prompt), TOKENS)
    new = text.tokens[text.prompt :]
    return Generation(tokenizer.decode(new), len(new), text.bad_step)


def _log_probabilities(ending: Ending, hidden: Tensor) -> Tensor:
    """Float32 [length, vocabulary] from the last layer's outputs [1, length, hidden]."""
    return ending.scores(ending.states(hidden))[0].float().log_softmax(dim=-1)


def _kept_hidden(kept: KeptSource, model: OpenModel, sequences: Sequence[Tensor]) -> list[Tensor]:
    """As `last_hidden`, of the source."""
    facts = {"states": [row.tolist() for row in sequences], **asdict(model.arithmetic)}
    width = model.architecture.text_config["hidden_size"]

    def make() -> Any:
        return torch.cat(last_hidden(model, sequences), dim=1)[0].cpu().numpy()

    rows = torch.from_numpy(kept.states(facts, width, make))
    found = torch.split(rows, [len(row) for row in sequences])
    return [model.arithmetic.place(states)[None] for states in found]


def last_hidden(model: OpenModel, sequences: Sequence[Tensor]) -> list[Tensor]:
    """The last layer's output [1, length, hidden] for each sequence."""
    states = [together(batch) for batch in _batches(model.embedded(sequences))]
    layers = model.architecture.num_layers
    for index in range(layers):
        _advance(model.layer(index), states)
        tell("layers", index + 1, layers)
    return [row for state in states for row in torch.split(state.hidden, 1)]


def _batches(states: Sequence[State]) -> Iterator[Sequence[State]]:
    """Neighbours of one length, as many as a layer takes at once."""
    batch: list[State] = []
    for state in states:
        length = state.hidden.shape[1]
        full = (len(batch) + 1) * length > BATCH_TOKENS
        if batch and (full or length != batch[0].hidden.shape[1]):
            yield batch
            batch = []
        batch.append(state)
    if batch:
        yield batch


def _advance(layer: Callable[[State], State], states: list[State]) -> None:
    """Put the layer's outputs in the place of its inputs, one by one to save memory."""
    for index, state in enumerate(states):
        states[index] = layer(state)


def _blocks(first: int, stop: int, vocabulary: int) -> Iterator[tuple[int, int]]:
    """Ranges that cover the positions from `first` to `stop`, each with few enough logits."""
    step = max(1, _LOGITS_BYTES // (4 * vocabulary))
    return ((start, min(start + step, stop)) for start in range(first, stop, step))


def _losses(found: Tensor, targets: Tensor) -> Tensor:
    """The loss at each position, in nats, from log-probabilities."""
    return functional.nll_loss(found, targets.to(found.device), reduction="none")


def _divergences(reference: Tensor, found: Tensor) -> Tensor:
    """KL(reference || found) at each position, in nats, from log-probabilities."""
    return functional.kl_div(found, reference, log_target=True, reduction="none").sum(dim=-1)


def _quality(blocks: Sequence[tuple[Tensor, Tensor]]) -> Quality:
    """Figures from the losses and divergences of blocks of positions."""
    losses, divergences = (torch.cat(parts).double() for parts in zip(*blocks, strict=True))
    perplexity = losses.mean().exp()
    error = perplexity * losses.std() / len(losses) ** 0.5
    return Quality(_finite(perplexity), _finite(error), _finite(divergences.mean()), len(losses))


def _finite(figure: Tensor) -> float | None:
    value = float(figure)
    return value if math.isfinite(value) else None
