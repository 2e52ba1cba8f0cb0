"""Greedy continuations of many prompts at once.

Prompts of other lengths are padded on their left; that a model takes padding is tried and not
looked up, and one that does not is given prompts of one length at a time.
Needs the `torch` extra; to be imported in worker processes alone.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Protocol

import torch
from torch import Tensor

TOKENS_AT_ONCE = 16384
"""Of all prompts of a batch, padding included; what attention needs grows with it."""

_TOLERANCE = 1e-3
"""Of a state, by its norm: what padding may change in float32, where sums have another order."""


@dataclass(frozen=True)
class Prompt:
    """`tokens`, int64 [length], to be continued by `count` tokens, or up to one of `ends`."""

    tokens: Tensor
    count: int
    ends: Collection[int] = field(default=())


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


class Decoder(Protocol):
    """A model that reads tokens behind those that it has read."""

    def cache(self) -> Any:
        """What is to hold what the model has read."""

    def read(self, tokens: Tensor, cache: Any, seen: Tensor | None = None) -> Tensor:
        """States [rows, new, hidden], after the final norm, of `tokens` [rows, new].

        `seen` [rows, read + new], int64, is 0 for padding, which stands before a row's tokens.
        """

    def scores(self, states: Tensor) -> Tensor:
        """Logits [rows, new, vocabulary] of states."""


def continue_together(
    model: Decoder, prompts: Sequence[Prompt], *, padding: bool
) -> list[Continuation]:
    """What the model says after each prompt; with `padding`, of different lengths at once."""
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index].tokens))
    found: dict[int, Continuation] = {}
    for batch in _batches(prompts, order, padding=padding):
        said = _continued(model, [prompts[index] for index in batch])
        found.update(zip(batch, said, strict=True))
    return [found[index] for index in range(len(prompts))]


@torch.no_grad()
def takes_padding(model: Decoder, prompts: Sequence[Prompt]) -> bool:
    """True when padding changes nothing: the shortest prompt is read with and without it.

    A token more is read behind it, for what a cache holds is padded, too.
    """
    short = min((prompt.tokens for prompt in prompts), key=len)
    long = max((prompt.tokens for prompt in prompts), key=len)
    rows, seen = _padded([short, long])
    more = torch.stack([short[:1], long[:1]])
    alone, padded = model.cache(), model.cache()
    for new, count in ((rows, len(short)), (more, 1)):
        found = model.read(new, padded, seen)[0, -1]
        expected = model.read(new[:1, -count:], alone)[0, -1]
        if not (found - expected).norm() <= _TOLERANCE * expected.norm():
            return False
        seen = _with_one_more(seen)
    return True


def _batches(
    prompts: Sequence[Prompt], order: Sequence[int], *, padding: bool
) -> Iterator[list[int]]:
    """Indices of prompts that are continued at once, from `order`, which begins with the shortest.

    Without `padding`, they are of one length.
    """
    by_length = groupby(order, key=lambda index: len(prompts[index].tokens))
    for group in [order] if padding else [list(same) for _, same in by_length]:
        batch: list[int] = []
        for index in group:
            if batch and (len(batch) + 1) * len(prompts[index].tokens) > TOKENS_AT_ONCE:
                yield batch
                batch = []
            batch.append(index)
        yield batch


@torch.no_grad()
def _continued(model: Decoder, prompts: Sequence[Prompt]) -> list[Continuation]:
    """What the model says after prompts that fit into one batch."""
    lengths = [len(prompt.tokens) for prompt in prompts]
    new, seen = _padded([prompt.tokens for prompt in prompts])
    # A mask that hides nothing is left out: without one, kernels are faster and every model runs.
    mask = None if seen.all() else seen
    cache, read, states = model.cache(), [new], []
    said = [0] * len(prompts)
    bad: list[int | None] = [None] * len(prompts)
    going = set(range(len(prompts)))
    step = 0
    while going:
        step += 1
        states.append(model.read(new, cache, mask))
        logits = model.scores(states[-1][:, -1:])
        finite = logits.isfinite().flatten(1).all(dim=1).tolist()
        new = logits.argmax(dim=-1).cpu()
        read.append(new)
        for row in list(going):
            said[row] = step
            if bad[row] is None and not finite[row]:
                bad[row] = step
            if step == prompts[row].count or int(new[row]) in prompts[row].ends:
                going.remove(row)
        mask = None if mask is None else _with_one_more(mask)
    tokens, known = torch.cat(read, dim=1), torch.cat(states, dim=1)
    first = [max(lengths) - length for length in lengths]
    last = [max(lengths) + count for count in said]
    return [
        Continuation(
            lengths[row], tokens[row, start:stop], known[row : row + 1, start : stop - 1], bad[row]
        )
        for row, (start, stop) in enumerate(zip(first, last, strict=True))
    ]


def _padded(prompts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Tokens [rows, longest], and 1 for each but padding, which repeats a row's first token."""
    longest = max(map(len, prompts))
    rows = [torch.cat([row[:1].expand(longest - len(row)), row]) for row in prompts]
    lengths = torch.tensor([len(row) for row in prompts])
    seen = torch.arange(longest) >= longest - lengths[:, None]
    return torch.stack(rows), seen.long()


def _with_one_more(seen: Tensor) -> Tensor:
    return torch.cat([seen, seen.new_ones(len(seen), 1)], dim=1)
