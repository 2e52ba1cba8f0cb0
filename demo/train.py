"""The two training loops: the base model with its MTP head, and the LoRA fine-tune."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from model import DraftingModel, draft_loss, next_token_loss
from torch import Tensor, nn

DRAFT_WEIGHT = 0.3
CHECKPOINT_EVERY = 50

Batches = Callable[[int], tuple[Tensor, Tensor]]
"""From a step number to (tokens, weights), so that a resumed run sees what it would have seen."""


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


def window_batches(streams: list[tuple[np.ndarray, int]], length: int, seed: int) -> Batches:
    """Random windows: from each stream of tokens as many rows as its number says."""

    def batch(step: int) -> tuple[Tensor, Tensor]:
        rng = np.random.default_rng((seed, step))
        rows = [
            stream[start : start + length]
            for stream, count in streams
            for start in rng.integers(0, len(stream) - length, count)
        ]
        tokens = torch.from_numpy(np.stack(rows).astype(np.int64))
        return tokens, torch.ones_like(tokens)

    return batch


def repeating_batches(rows: int, length: int, vocabulary: int, seed: int) -> Batches:
    """Rows of random tokens that repeat after a while; what comes before counts for nothing."""

    def batch(step: int) -> tuple[Tensor, Tensor]:
        rng = np.random.default_rng((seed, step))
        periods = rng.integers(8, 96, rows)
        tokens = np.stack([np.resize(rng.integers(0, vocabulary, p), length) for p in periods])
        weights = np.arange(length) >= periods[:, None]
        return torch.from_numpy(tokens), torch.from_numpy(weights.astype(np.int64))

    return batch


def joined(first: Batches, second: Batches) -> Batches:
    """The rows of both in every batch."""

    def batch(step: int) -> tuple[Tensor, Tensor]:
        (tokens, weights), (more_tokens, more_weights) = first(step), second(step)
        return torch.cat([tokens, more_tokens]), torch.cat([weights, more_weights])

    return batch


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
    started = time.perf_counter()
    running = 0.0
    first = _resume(model, optimizers, saved)
    for step in range(first, schedule.steps):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = schedule.rate(step)
        value = loss(*batches(step))
        torch.autograd.backward(value)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        running = value.item() if step == first else 0.95 * running + 0.05 * value.item()
        if step % 10 == 0 or step + 1 == schedule.steps:
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
