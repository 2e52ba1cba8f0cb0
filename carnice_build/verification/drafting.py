"""Drafts of a multi-token-prediction head, and how many of them its model accepts.

At position t the drafter is given h_t, the model's hidden state after the final norm, and x_{t+1},
the token that the model chose from it.  One layer with a context of its own and the model's head
then score x_{t+2}.  To draft further, the drafter's state takes the place of h and its draft that
of x, one position on.
Needs the `torch` extra; to be imported in worker processes alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from carnice_build.calibration.decoding import Continuation
from carnice_build.calibration.text_model import ResidentModel
from carnice_build.verification.running import Drafts


class DraftHead(Protocol):
    """A head that drafts tokens; see `Architecture.draft_head`."""

    def __call__(
        self, embedded: Tensor, hidden: Tensor, positions: Tensor, visible: Tensor
    ) -> Tensor:
        """States after the head's norm [1, length, hidden], one for each place of the inputs.

        `embedded` and `hidden` are [1, length, hidden]: at each place the embedding of a token and
        the state from which the token was chosen; `positions` is [length].
        `visible` [length, length] says which places (columns) each place (row) attends to.
        """


def draft(
    drafter: DraftHead,
    target: ResidentModel,
    states: Tensor,
    following: Tensor,
    first: int,
    count: int,
) -> Tensor:
    """The `count` tokens, int64 [starts, count], drafted from every position from `first` on.

    `states` [1, length, hidden] are the target's, `following` [length] the tokens that it chose
    from them: x_1, x_2, ...
    From each position t the drafter's context is the true one up to t and its own drafts after it,
    as when decoding has just come to t.
    All positions go together: a place is the draft number `depth` of the chain that begins at
    `root`, and sees the true places up to its root and its own chain.
    """
    root = torch.arange(len(following))
    depth = torch.zeros_like(root)
    starts = root[first:]
    embedded = target.embed(following)
    drafts = []
    for number in range(count):
        context = (depth == 0) & (root <= root[:, None])
        chain = (root == root[:, None]) & (depth <= depth[:, None])
        drafted = drafter(embedded, states, root + depth, context | chain)[:, -len(starts) :]
        tokens = target.scores(drafted).argmax(-1)[0].cpu()
        drafts.append(tokens)
        embedded = torch.cat([embedded, target.embed(tokens)], dim=1)
        states = torch.cat([states, drafted], dim=1)
        root = torch.cat([root, starts])
        depth = torch.cat([depth, torch.full_like(starts, number + 1)])
    return torch.stack(drafts, dim=1)


_NOTHING = -1
"""In the place of a token, what no draft is."""


def accepted_drafts(
    drafter: DraftHead, target: ResidentModel, continuation: Continuation, count: int
) -> list[int]:
    """For each position at which a step may start, how many of `count` drafts are accepted.

    A draft is accepted when it and all before it are what the target itself says, which is nothing
    from the first logit on that was not finite: argmax takes NaN for the best, in drafts as well.
    The first start is the prompt's last position, the last the one with `count` tokens to compare.
    """
    tokens, first = continuation.tokens, continuation.prompt - 1
    length = len(tokens) - 1 - count
    if length <= first:
        return []
    drafts = draft(
        drafter, target, continuation.states[:, :length], tokens[1 : length + 1], first, count
    )
    said = tokens.clone()
    if continuation.bad_step is not None:
        said[first + continuation.bad_step :] = _NOTHING
    truth = said.unfold(0, count, 1)[first + 2 :]
    return [int(number) for number in (drafts == truth).cumprod(dim=1).sum(dim=1)]


def walk(accepted: Sequence[int]) -> list[int]:
    """The entries of `accepted` at which decoding stops: k accepted drafts take it k + 1 on."""
    steps, at = [], 0
    while at < len(accepted):
        steps.append(accepted[at])
        at += accepted[at] + 1
    return steps


def acceptance(
    drafter: DraftHead, target: ResidentModel, texts: Sequence[Continuation], count: int
) -> Drafts:
    """What becomes of `count` drafts a step when decoding writes the texts of `target` anew.

    Greedy verification lets through what the target says and nothing else, so speculative decoding
    writes the same text, and its steps are a walk over it.

    Steps that would draft beyond a text's end are left out.
    ValueError when no text is long enough for one step.
    """
    steps = [
        accepted
        for text in texts
        for accepted in walk(accepted_drafts(drafter, target, text, count))
    ]
    if not steps:
        raise ValueError(f"no text has room for {count} drafts")
    rates = (sum(step > k for step in steps) / len(steps) for k in range(count))
    return Drafts(len(steps), tuple(rates))
