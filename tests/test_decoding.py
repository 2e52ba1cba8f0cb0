"""Many prompts continued at once, against one after the other."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from demo_model import heldout, source
from torch import Tensor

from carnice_build.calibration import decoding
from carnice_build.calibration.decoding import Prompt, continue_together, takes_padding
from carnice_build.calibration.driver import Arithmetic
from carnice_build.calibration.text_model import OpenModel, ResidentModel

FLOAT32 = Arithmetic("float32", "sdpa", threads=1)


@pytest.fixture(scope="module")
def model() -> ResidentModel:
    return ResidentModel(OpenModel(source(), FLOAT32))


class Counting:
    """Says the sum of what it has read, modulo 11; what is padding counts unless it is told."""

    def __init__(self, *, masks: bool) -> None:
        self.masks = masks
        self.reads: list[tuple[int, ...]] = []

    def cache(self) -> dict[str, Tensor]:
        return {}

    def read(self, tokens: Tensor, cache: dict[str, Tensor], seen: Tensor | None = None) -> Tensor:
        self.reads.append(tuple(tokens.shape))
        if seen is not None and self.masks:
            tokens = tokens * seen[:, -tokens.shape[1] :]
        sums = tokens.cumsum(dim=1) + cache.get("sums", torch.zeros(len(tokens), 1))
        cache["sums"] = sums[:, -1:]
        return sums[:, :, None].float()

    def scores(self, states: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(states[..., 0].long() % 11, 11).float()


def prompts(*lengths: int) -> list[Prompt]:
    """Prompts of these lengths, to be continued by as many tokens as they have, and two."""
    return [Prompt(torch.arange(1, length + 1), length + 2) for length in lengths]


def said(model: Counting, asked: Sequence[Prompt], *, padding: bool) -> list[list[int]]:
    """The tokens of each prompt with what was said."""
    return [text.tokens.tolist() for text in continue_together(model, asked, padding=padding)]


def test_prompts_of_other_lengths_say_what_each_says_alone(model: ResidentModel) -> None:
    """Tokens are the same, states within rounding; each stops at its own number or end."""
    texts = heldout(1, 120)[0]
    asked = [
        Prompt(texts[:70], 12),
        Prompt(texts[70:75], 4),
        Prompt(texts[80:110], 20),
    ]
    alone = [model.continue_greedily(prompt.tokens, prompt.count) for prompt in asked]
    end = int(alone[2].tokens[-8])
    asked[2] = Prompt(asked[2].tokens, 20, {end})
    alone[2] = model.continue_greedily(asked[2].tokens, 20, {end})

    together = model.continue_all(asked)

    assert takes_padding(model, asked)
    assert len(alone[2].tokens) < 50
    for expected, found in zip(alone, together, strict=True):
        assert torch.equal(expected.tokens, found.tokens)
        assert (expected.prompt, expected.bad_step) == (found.prompt, found.bad_step)
        torch.testing.assert_close(expected.states, found.states, atol=1e-4, rtol=1e-4)


def test_a_model_that_reads_padding_is_found_out() -> None:
    """It is tried on the shortest and the longest prompt."""
    assert takes_padding(Counting(masks=True), prompts(2, 9, 5))
    assert not takes_padding(Counting(masks=False), prompts(2, 9, 5))


def test_without_padding_prompts_of_one_length_go_together() -> None:
    """And every prompt is continued as alone."""
    asked = prompts(3, 5, 3, 4)
    alone = [said(Counting(masks=False), [prompt], padding=False)[0] for prompt in asked]
    model = Counting(masks=False)

    assert alone == said(model, asked, padding=False)
    assert [(2, 3), (1, 4), (1, 5)] == [shape for shape in model.reads if shape[1] > 1]
    assert alone == said(Counting(masks=True), asked, padding=True)


def test_a_batch_is_bounded_by_its_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Padding counts; a prompt that is longer than the bound goes alone."""
    monkeypatch.setattr(decoding, "TOKENS_AT_ONCE", 12)
    asked = prompts(3, 14, 4, 4, 6)
    alone = [said(Counting(masks=True), [prompt], padding=False)[0] for prompt in asked]
    model = Counting(masks=True)

    assert alone == said(model, asked, padding=True)
    assert [(3, 4), (1, 6), (1, 14)] == [shape for shape in model.reads if shape[1] > 1]
