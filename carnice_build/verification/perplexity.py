"""Check `perplexity`: how well the model predicts a held-out text, as `mlx_lm.perplexity` does.

The text's tokens are cut into sequences of one length.  Perplexity is the exponential of the mean
loss over all predicted tokens; its standard error is that of the mean times the perplexity.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from carnice_build.verification.result import Check, judged, skipped

NAME = "perplexity"
LENGTHS = (256, 1024)
SAMPLES = 64
SAMPLES_ON_CPU = 8
"""mlx takes minutes for 64 samples of even a tiny model without a GPU."""
LOGITS_BYTES = 256 << 20
"""Memory for the logits of the sequences that run at once."""


@dataclass(frozen=True)
class Perplexity:
    """Perplexity over `samples` sequences of `length` tokens, with its standard error.

    `kl` is the mean of KL(source || model) in nats over the same positions, None where it was not
    measured.
    A figure that is not finite is None.
    """

    length: int
    samples: int
    mean: float | None
    error: float | None
    kl: float | None = None


def measure(model: Any, tokens: list[int], length: int, samples: int) -> Perplexity | None:
    """Perplexity at one length, None when the text is shorter; runs where mlx is loaded."""
    import mlx.core as mx
    import mlx.nn as nn

    sequences = cut(tokens, length, samples)
    if not sequences:
        return None
    rows, samples = mx.array(sequences), len(sequences)
    losses = []
    first, batch = 0, 1
    while first < samples:
        logits = model(rows[first : first + batch, :-1]).astype(mx.float32)
        targets = rows[first : first + batch, 1:]
        loss = nn.losses.cross_entropy(logits, targets, reduction="none")
        mx.eval(loss)
        losses.append(loss.flatten())
        first += batch
        # The recurrent layers take a step a token, however many sequences take it together.
        batch = max(1, LOGITS_BYTES // (4 * length * logits.shape[-1]))
    together = mx.concatenate(losses)
    mean = float(together.mean())
    spread = float(mx.sqrt(mx.var(together, ddof=1)))
    if not math.isfinite(mean):
        return Perplexity(length, samples, None, None)
    perplexity = math.exp(mean)
    return Perplexity(length, samples, perplexity, perplexity * spread / together.size**0.5)


def cut(tokens: Sequence[int], length: int, samples: int) -> list[Sequence[int]]:
    """The first `samples` sequences of `length` tokens, or as many as there are."""
    starts = range(0, min(samples, len(tokens) // length) * length, length)
    return [tokens[start : start + length] for start in starts]


def judge_perplexities(found: Sequence[Perplexity]) -> Check:
    """The check's result: a perplexity may be high, but must be a number."""
    if not found:
        return skipped(NAME, f"the text has fewer than {min(LENGTHS)} tokens; give --text FILE")
    problems = [
        f"the loss at sequence length {item.length} is not finite"
        for item in found
        if item.mean is None
    ]
    summary = ", ".join(f"{format_perplexity(item)} at {item.length}" for item in found)
    return judged(NAME, problems, summary, {str(item.length): asdict(item) for item in found})


def format_perplexity(item: Perplexity) -> str:
    """Mean ± standard error, as model cards give them."""
    if item.mean is None:
        return "not finite"
    return f"{item.mean:.3f} ± {item.error:.3f}"
