"""Figures of quality, measured a layer at a time, against transformers' whole model."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from demo_model import ARCHITECTURE, BASE, CONFIG, below, heldout, source, weights, whole_model
from qwen import BODY
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedTokenizerFast

from carnice_build.calibration.driver import Arithmetic, LayerDriver
from carnice_build.calibration.text_model import ModelSource
from carnice_build.errors import BackendError
from carnice_build.verification import quality
from carnice_build.verification.generate import PROMPT, TOKENS
from carnice_build.verification.quality import Quality, generate, measure

FLOAT32 = Arithmetic("float32", "sdpa", threads=1)


@pytest.fixture(scope="module")
def sequences() -> Sequence[Tensor]:
    """Two of one length and one of another."""
    first, second, third = heldout(3, 200)
    return [first, second, third[:77]]


def rounded(bits: int) -> dict[str, Tensor]:
    """The layers' matrices, each rounded to 2**bits levels over its range."""
    found = {}
    for name, tensor in below(f"{BODY}layers.").items():
        if tensor.ndim == 2:
            wide = tensor.float()
            step = (wide.max() - wide.min()) / (2**bits - 1)
            found[f"{BODY}layers.{name}"] = (wide / step).round() * step
    return found


def whole_log_probabilities(
    sequences: Sequence[Tensor], changes: Mapping[str, Tensor]
) -> list[Tensor]:
    """Float64 [length - 1, vocabulary] of each sequence, by transformers' whole model."""
    model = whole_model("float32", "sdpa")
    renamed = {name.replace("language_model.", ""): tensor for name, tensor in changes.items()}
    model.load_state_dict(renamed, strict=False)
    with torch.no_grad():
        logits = [model(tokens[None], use_cache=False).logits[0, :-1] for tokens in sequences]
    return [item.double().log_softmax(-1) for item in logits]


def test_figures_are_those_of_the_whole_model(sequences: Sequence[Tensor]) -> None:
    """Perplexity, its error and KL follow from the log-probabilities of transformers' models."""
    changes = rounded(5)
    reference = whole_log_probabilities(sequences, {})
    coarse = whole_log_probabilities(sequences, changes)

    found = measure({"source": source(), "coarse": source(**changes)}, sequences, FLOAT32)

    for name, expected in (("source", reference), ("coarse", coarse)):
        losses = torch.cat(
            [
                functional.nll_loss(item, tokens[1:], reduction="none")
                for item, tokens in zip(expected, sequences, strict=True)
            ]
        )
        perplexity = losses.mean().exp().item()
        assert pytest.approx(perplexity, rel=1e-6) == found[name].perplexity
        error = perplexity * losses.std().item() / len(losses) ** 0.5
        assert pytest.approx(error, rel=1e-5) == found[name].error
        assert 199 + 199 + 76 == found[name].tokens
    pairs = zip(reference, coarse, strict=True)
    divergence = torch.cat([(ours.exp() * (ours - other)).sum(-1) for ours, other in pairs])
    assert pytest.approx(divergence.mean().item(), rel=1e-3) == found["coarse"].kl


def test_a_model_does_not_diverge_from_itself(sequences: Sequence[Tensor]) -> None:
    """KL of the reference, and of a model with the same weights, is zero, not nearly zero."""
    found = measure({"source": source(), "same": source()}, sequences, FLOAT32)

    assert 0.0 == found["source"].kl == found["same"].kl
    assert found["source"] == found["same"]


def test_divergence_grows_as_weights_are_rounded_more_coarsely(
    sequences: Sequence[Tensor],
) -> None:
    """Fewer bits, more KL."""
    models = {"source": source()} | {str(bits): source(**rounded(bits)) for bits in (8, 6, 5, 4)}

    found = measure(models, sequences, FLOAT32)

    divergences = [item.kl for item in found.values()]
    assert sorted(divergences) == divergences
    assert 5 == len(set(divergences))


def test_how_many_positions_are_scored_at_once_does_not_matter(
    sequences: Sequence[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of 10 positions give the figures of whole sequences."""
    models = {"source": source(), "coarse": source(**rounded(5))}
    expected = measure(models, sequences, FLOAT32)

    monkeypatch.setattr(quality, "_LOGITS_BYTES", 10 * 4 * CONFIG["vocab_size"])
    found = measure(models, sequences, FLOAT32)

    for name, item in expected.items():
        assert pytest.approx(item.perplexity, rel=1e-6) == found[name].perplexity
        assert pytest.approx(item.kl, rel=1e-4) == found[name].kl
        assert item.tokens == found[name].tokens


def test_a_model_that_gives_no_numbers_has_no_figures(sequences: Sequence[Tensor]) -> None:
    """A NaN in a weight makes the figures None; those of the other model stay."""
    name = f"{BODY}layers.3.mlp.up_proj.weight"
    broken = source(**{name: torch.full_like(weights()[name], float("nan"))})

    found = measure({"source": source(), "broken": broken}, sequences, FLOAT32)

    assert found["source"].perplexity is not None
    assert Quality(None, None, None, found["source"].tokens) == found["broken"]


def test_one_layer_is_in_memory_at_a_time(
    sequences: Sequence[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """When a layer is built, the one before it is gone, without the garbage collector's help."""
    alive: weakref.WeakSet[nn.Module] = weakref.WeakSet()
    others = []
    build = LayerDriver.layer

    def watched(self: LayerDriver, *arguments: Any) -> nn.Module:
        others.append(len(alive))
        layer = build(self, *arguments)
        alive.add(layer)
        return layer

    monkeypatch.setattr(LayerDriver, "layer", watched)
    gc.disable()
    try:
        measure({"source": source(), "coarse": source(**rounded(5))}, sequences, FLOAT32)
    finally:
        gc.enable()

    assert [0] * 16 == others


def test_input_transforms_apply_to_the_linears_they_name(sequences: Sequence[Tensor]) -> None:
    """Doubling the input of a linear is doubling its weight, and touches no other linear."""
    module = f"{BODY}layers.3.mlp.up_proj"
    weight = f"{module}.weight"
    models = {
        "weight": source(**{weight: 2 * weights()[weight]}),
        "input": ModelSource(ARCHITECTURE, weights().__getitem__, {module: lambda rows: 2 * rows}),
        "plain": source(),
    }

    found = measure(models, sequences, FLOAT32)

    # Powers of two scale without rounding.
    assert 0.0 == found["input"].kl
    assert found["plain"].kl > 0


def test_an_input_transform_for_no_linear_is_refused(sequences: Sequence[Tensor]) -> None:
    """A misspelt module is an error that names the nearest one."""
    misspelt = ModelSource(
        ARCHITECTURE, weights().__getitem__, {f"{BODY}layers.3.mlp.up_prj": lambda rows: rows}
    )

    with pytest.raises(BackendError, match=r"layers\.3\.mlp\.up_proj"):
        measure({"source": misspelt}, sequences, FLOAT32)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return PreTrainedTokenizerFast.from_pretrained(BASE)


def test_generation_is_that_of_transformers(tokenizer: Any) -> None:
    """The answer to the chat prompt is what transformers' greedy `generate` says."""
    messages = [{"role": "user", "content": PROMPT}]
    prompt = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    model = whole_model("float32", "sdpa")
    # It is to go on where a turn ends, as the check does.
    model.generation_config.eos_token_id = None
    expected = model.generate(**prompt, max_new_tokens=TOKENS, do_sample=False)

    found = generate(source(), tokenizer, FLOAT32)

    assert tokenizer.decode(expected[0, prompt["input_ids"].shape[1] :]) == found.text
    assert TOKENS == found.tokens
    assert found.bad_step is None


def test_generation_tells_where_logits_are_not_finite(tokenizer: Any) -> None:
    """One NaN in the head spoils the first step already."""
    head = weights()["lm_head.weight"].clone()
    head[7, 3] = float("nan")

    found = generate(source(**{"lm_head.weight": head}), tokenizer, FLOAT32)

    assert 1 == found.bad_step
