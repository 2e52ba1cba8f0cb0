"""The two training loops: the base model with its MTP head, and the LoRA fine-tune."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from model import DraftingModel, draft_loss, next_token_loss
from torch import Tensor, nn

DRAFT_WEIGHT = 0.3
CHECKPOINT_EVERY = 100

Batches = Callable[[int], tuple[Tensor, Tensor]]
"""From a step number to (tokens, weights), so that a resumed run sees what it would have seen."""

Draw = Callable[[np.random.Generator], tuple[np.ndarray, np.ndarray]]
"""From a generator to one row: tokens [length] and the weight of each."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """How many steps, and a learning rate that warms up and then falls as a cosine to a twentieth.

    `horizon` is the step at which it would end; training may stop before that.
    """

    steps: int
    peak: float
    horizon: int
    warm_up: int

    def rate(self, step: int) -> float:
        """The learning rate at `step`."""
        if step < self.warm_up:
            return self.peak * (step + 1) / self.warm_up
        done = min(1.0, (step - self.warm_up) / (self.horizon - self.warm_up))
        return self.peak * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done)))


def mixed_batches(draws: Sequence[tuple[Draw, float]], rows: int, seed: int) -> Batches:
    """Batches of `rows` rows, each drawn from one of `draws` with the probability beside it."""
    chances = np.array([chance for _, chance in draws])

    def batch(step: int) -> tuple[Tensor, Tensor]:
        rng = np.random.default_rng((seed, step))
        chosen = rng.choice(len(draws), rows, p=chances)
        tokens, weights = zip(*(draws[index][0](rng) for index in chosen), strict=True)
        return (
            torch.from_numpy(np.stack(tokens).astype(np.int64)),
            torch.from_numpy(np.stack(weights).astype(np.float32)),
        )

    return batch


def windows(stream: np.ndarray, length: int) -> Draw:
    """Windows of a stream of tokens, of which each counts."""

    def draw(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        start = rng.integers(0, len(stream) - length)
        return stream[start : start + length], np.ones(length)

    return draw


def rows_of(tokens: np.ndarray, spoken: np.ndarray, unspoken: float) -> Draw:
    """Rows of dialogues; what the assistant does not say counts as much as `unspoken`."""

    def draw(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        row = rng.integers(0, len(tokens))
        return tokens[row], np.where(spoken[row], 1.0, unspoken)

    return draw


def repeats(length: int, vocabulary: int) -> Draw:
    """Random tokens that repeat after a while; what comes before counts for nothing."""

    def draw(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        period = int(8 * 64 ** rng.random())
        tokens = np.resize(rng.integers(0, vocabulary, period), length)
        return tokens, np.arange(length) >= period

    return draw


def in_phases(phases: dict[int, Batches]) -> Batches:
    """Batches of the last of the phases that have begun; the keys are their first steps."""

    def batch(step: int) -> tuple[Tensor, Tensor]:
        return phases[max(start for start in phases if start <= step)](step)

    return batch


def train_base(model: DraftingModel, batches: Batches, schedule: Schedule, saved: Path) -> None:
    """Trains all but the vision tower; the MTP head learns on every other row of a batch."""
    model.main.model.visual.requires_grad_(False)
    matrices, others = _split_parameters(model)
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.01),
    ]

    def loss(tokens: Tensor, weights: Tensor) -> Tensor:
        states = model.hidden_states(tokens)
        half = slice(None, None, 2)
        drafted = draft_loss(model, tokens[half], states[half])
        return next_token_loss(model, tokens, weights, states) + DRAFT_WEIGHT * drafted

    _run(model, optimizers, loss, batches, schedule, saved)


def train_adapters(
    model: DraftingModel,
    adapters: list[nn.Parameter],
    batches: Batches,
    schedule: Schedule,
    saved: Path,
) -> None:
    """Trains `adapters` alone, on the tokens that have a weight."""
    optimizer = torch.optim.AdamW(adapters, betas=(0.9, 0.95), weight_decay=0.0)

    def loss(tokens: Tensor, weights: Tensor) -> Tensor:
        return next_token_loss(model, tokens, weights, model.hidden_states(tokens))

    _run(model, [optimizer], loss, batches, schedule, saved)


def _split_parameters(model: DraftingModel) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            hidden = parameter.ndim == 2 and "embed_tokens" not in name and "lm_head" not in name
            (matrices if hidden else others).append(parameter)
    return matrices, others


def _run(
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    loss: Callable[[Tensor, Tensor], Tensor],
    batches: Batches,
    schedule: Schedule,
    saved: Path,
) -> None:
    trained = [p for optimizer in optimizers for g in optimizer.param_groups for p in g["params"]]
    device = trained[0].device
    started = time.perf_counter()
    running = 0.0
    first = _resume(model, optimizers, saved)
    for step in range(first, schedule.steps):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = schedule.rate(step)
        tokens, weights = (part.to(device) for part in batches(step))
        with torch.autocast(device.type, torch.bfloat16):
            value = loss(tokens, weights)
        torch.autograd.backward(value)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if step % 10 == 0 or step + 1 == schedule.steps:
            running = value.item() if step == first else 0.8 * running + 0.2 * value.item()
            seconds = time.perf_counter() - started
            print(f"step {step} loss {running:.3f} after {seconds:.0f} s", flush=True)
        if (step + 1) % CHECKPOINT_EVERY == 0 or step + 1 == schedule.steps:
            _save(model, optimizers, step + 1, saved)


def _save(
    model: nn.Module, optimizers: list[torch.optim.Optimizer], step: int, saved: Path
) -> None:
    partial = saved.with_suffix(".partial")
    states = [optimizer.state_dict() for optimizer in optimizers]
    torch.save({"step": step, "model": model.state_dict(), "optimizers": states}, partial)
    partial.replace(saved)


def _resume(model: nn.Module, optimizers: list[torch.optim.Optimizer], saved: Path) -> int:
    if not saved.exists():
        return 0
    state = torch.load(saved, weights_only=True)
    model.load_state_dict(state["model"])
    for optimizer, kept in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(kept)
    return int(state["step"])
