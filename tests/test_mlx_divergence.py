"""KL(source || model) in mlx is what its definition says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from carnice_build.verification import perplexity

VOCABULARY, LENGTH, SAMPLES = 11, 7, 5


def table(seed: int) -> np.ndarray:
    """A model: logits that follow from the last token alone."""
    drawn = np.random.default_rng(seed).standard_normal((VOCABULARY, VOCABULARY))
    return (3 * drawn).astype(np.float32)


def model(logits: np.ndarray) -> Callable[[Any], Any]:
    """The model as mlx runs it."""
    import mlx.core as mx

    return lambda tokens: mx.array(logits)[tokens]


def log_probabilities(logits: np.ndarray) -> np.ndarray:
    """In float64, without any trick."""
    wide = logits.astype(np.float64)
    return wide - np.log(np.exp(wide).sum(-1, keepdims=True))


@pytest.mark.parametrize("logits_bytes", [1, 1 << 20])
def test_divergence_is_that_of_its_definition(
    monkeypatch: pytest.MonkeyPatch, logits_bytes: int
) -> None:
    """The mean over all positions that are predicted, in nats, however many run at once."""
    monkeypatch.setattr(perplexity, "LOGITS_BYTES", logits_bytes)
    tokens = np.random.default_rng(3).integers(0, VOCABULARY, LENGTH * SAMPLES).tolist()
    source, other = table(1), table(2)
    found = perplexity.measure(
        {"source": model(source), "other": model(other)}, tokens, LENGTH, SAMPLES
    )
    rows = np.array(tokens).reshape(SAMPLES, LENGTH)
    p, q = (log_probabilities(logits[rows[:, :-1]]) for logits in (source, other))
    kl = (np.exp(p) * (p - q)).sum(-1).mean()
    losses = -np.take_along_axis(q, rows[:, 1:, None], -1)

    assert 0.0 == found["source"].kl
    assert kl == pytest.approx(found["other"].kl, rel=1e-5)
    assert np.exp(losses.mean()) == pytest.approx(found["other"].mean, rel=1e-5)


def test_one_model_alone_diverges_from_nothing() -> None:
    """Its perplexity is what it is beside another."""
    tokens = list(range(VOCABULARY)) * 4
    alone = perplexity.measure({"a": model(table(1))}, tokens, LENGTH, SAMPLES)["a"]
    both = {"b": model(table(2)), "a": model(table(1))}
    beside = perplexity.measure(both, tokens, LENGTH, SAMPLES)["a"]

    assert alone.kl is None
    assert alone.mean == pytest.approx(beside.mean)


def test_logits_that_are_no_numbers_are_no_figures() -> None:
    """Neither a perplexity nor a divergence."""
    tokens = list(range(VOCABULARY)) * 4
    broken = np.full_like(table(1), np.nan)
    found = perplexity.measure({"a": model(table(1)), "b": model(broken)}, tokens, LENGTH, SAMPLES)[
        "b"
    ]

    assert (None, None) == (found.mean, found.kl)
