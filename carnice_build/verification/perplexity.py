"""Check `perplexity`: how well the model predicts a held-out text, as `mlx_lm.perplexity` does.

The text's tokens are cut into sequences of one length.  Perplexity is the exponential of the mean
loss over all predicted tokens; its standard error is that of the mean times the perplexity.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from carnice_build.verification.process import tell
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


def measure(
    models: Mapping[str, Any], tokens: list[int], length: int, samples: int
) -> dict[str, Perplexity]:
    """Perplexity of each model at one length, and KL against the first; runs where mlx is loaded.

    A model is what makes logits [rows, length, vocabulary] of tokens [rows, length].
    Nothing when the text is shorter.
    """
    import mlx.core as mx
    import mlx.nn as nn

    sequences = cut(tokens, length, samples)
    if not sequences:
        return {}
    rows, samples = mx.array(sequences), len(sequences)
    losses: dict[str, list[Any]] = {name: [] for name in models}
    divergences: dict[str, list[Any]] = {name: [] for name in models}
    # Nothing is computed for a shape.
    vocabulary = next(iter(models.values()))(rows[:1, :1]).shape[-1]
    # The recurrent layers take a step a token, however many sequences take it together.
    batch = max(1, LOGITS_BYTES // (4 * length * vocabulary))
    first = 0
    while first < samples:
        inputs, targets = rows[first : first + batch, :-1], rows[first : first + batch, 1:]
        reference = None
        for name, model in models.items():
            logits = model(inputs).astype(mx.float32)
            loss = nn.losses.cross_entropy(logits, targets, reduction="none")
            found = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
            reference = found if reference is None else reference
            divergence = (mx.exp(reference) * (reference - found)).sum(axis=-1)
            mx.eval(loss, divergence)
            losses[name].append(loss.flatten())
            divergences[name].append(divergence.flatten())
        first += len(inputs)
        tell(f"sequences of {length}", first, samples)
    one, *others = [
        _figures(length, samples, mx.concatenate(losses[name]), mx.concatenate(divergences[name]))
        for name in models
    ]
    # Of one model alone nothing diverges.
    found = [one, *others] if others else [replace(one, kl=None)]
    return dict(zip(models, found, strict=True))


def _figures(length: int, samples: int, losses: Any, divergences: Any) -> Perplexity:
    """Figures from mlx's losses and divergences at all positions, in nats."""
    import mlx.core as mx

    mean, divergence = float(losses.mean()), float(divergences.mean())
    kl = divergence if math.isfinite(divergence) else None
    if not math.isfinite(mean):
        return Perplexity(length, samples, None, None, kl)
    perplexity = math.exp(mean)
    spread = float(mx.sqrt(mx.var(losses, ddof=1)))
    return Perplexity(length, samples, perplexity, perplexity * spread / losses.size**0.5, kl)


def tokens_of(tokenizer: Path, text: Path) -> list[int]:
    """The text as the tokenizer of a folder splits it."""
    from tokenizers import Tokenizer

    loaded = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    found: list[int] = loaded.encode(text.read_text(encoding="utf-8")).ids
    return found


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
