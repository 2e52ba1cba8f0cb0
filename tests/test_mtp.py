"""The MTP head's drafts and their acceptance, against plain loops over transformers' modules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from demo_model import CONFIG, below, heldout, source, weights, whole_model
from torch import Tensor, nn
from torch.nn import functional
from transformers import Qwen3_5TextConfig
from transformers.models.qwen3_5.modeling_qwen3_5 import (
    Qwen3_5DecoderLayer,
    Qwen3_5RMSNorm,
    Qwen3_5TextRotaryEmbedding,
)

from carnice_build.calibration.decoding import Continuation
from carnice_build.calibration.driver import Arithmetic
from carnice_build.calibration.text_model import ModelSource, OpenModel, ResidentModel
from carnice_build.verification.drafting import (
    DraftHead,
    acceptance,
    accepted_drafts,
    draft,
    walk,
)
from carnice_build.verification.running import Drafts

FLOAT32 = Arithmetic("float32", "sdpa", threads=1)
NEW_TOKENS = 30


class PlainHead(nn.Module):
    """The MTP head as one would write it down, for a context that grows by its own drafts."""

    def __init__(self) -> None:
        super().__init__()
        config = Qwen3_5TextConfig(**CONFIG)
        config._attn_implementation = "sdpa"
        size = config.hidden_size
        self.fc = nn.Linear(2 * size, size, bias=False)
        self.layers = nn.ModuleList(
            [Qwen3_5DecoderLayer(config, CONFIG["layer_types"].index("full_attention"))]
        )
        self.norm = Qwen3_5RMSNorm(size, eps=config.rms_norm_eps)
        self.pre_fc_norm_embedding = Qwen3_5RMSNorm(size, eps=config.rms_norm_eps)
        self.pre_fc_norm_hidden = Qwen3_5RMSNorm(size, eps=config.rms_norm_eps)
        self.load_state_dict(below("mtp."))
        self.rotary = Qwen3_5TextRotaryEmbedding(config)

    def forward(self, following: Tensor, states: Tensor) -> Tensor:
        """States [1, length, hidden] from as many tokens [length] and states."""
        embedded = functional.embedding(following[None], EMBEDDING)
        both = [self.pre_fc_norm_embedding(embedded), self.pre_fc_norm_hidden(states)]
        positions = torch.arange(len(following)).expand(3, 1, -1)
        rotary = self.rotary(states, positions)
        hidden = self.layers[0](self.fc(torch.cat(both, -1)), rotary, attention_mask=None)
        return self.norm(hidden)

    @torch.no_grad()
    def draft(self, following: Tensor, states: Tensor, count: int) -> Tensor:
        """`count` tokens after the last of `following`."""
        for _ in range(count):
            state = self(following, states)[:, -1:]
            following = torch.cat([following, functional.linear(state, HEAD).argmax(-1)[0]])
            states = torch.cat([states, state], dim=1)
        return following[-count:]


EMBEDDING = weights()["model.language_model.embed_tokens.weight"].float()
HEAD = weights()["lm_head.weight"].float()


@pytest.fixture(scope="module")
def target() -> ResidentModel:
    return ResidentModel(OpenModel(source(), FLOAT32))


@pytest.fixture(scope="module")
def drafter() -> DraftHead:
    return OpenModel(source(), FLOAT32).draft_head()


@pytest.fixture(scope="module")
def whole() -> Any:
    return whole_model("float32", "sdpa")


@pytest.fixture(scope="module")
def prompts() -> Sequence[Tensor]:
    return list(heldout(2, 80))


@pytest.fixture(scope="module")
def texts(target: ResidentModel, prompts: Sequence[Tensor]) -> Sequence[Continuation]:
    return [target.continue_greedily(prompt, NEW_TOKENS) for prompt in prompts]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_continuation_is_that_of_transformers(
    attention: Literal["sdpa", "eager"], prompts: Sequence[Tensor]
) -> None:
    """The tokens are those of greedy `generate`, the states those of a pass over the whole text."""
    whole = whole_model("float32", attention)
    model = ResidentModel(OpenModel(source(), Arithmetic("float32", attention, threads=1)))
    for prompt in prompts:
        generated = whole.generate(
            prompt[None],
            attention_mask=torch.ones_like(prompt[None]),
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=False,
        )
        with torch.no_grad():
            states = whole.model(generated[:, :-1], use_cache=False).last_hidden_state

        text = model.continue_greedily(prompt, NEW_TOKENS)

        assert torch.equal(generated[0], text.tokens)
        assert len(prompt) == text.prompt
        # A step from the cache adds in another order than a pass over the whole.
        torch.testing.assert_close(states, text.states, atol=1e-4, rtol=1e-4)


def test_a_continuation_ends_after_a_token_that_ends_it(
    target: ResidentModel, texts: Sequence[Continuation], prompts: Sequence[Tensor]
) -> None:
    """The first of `ends` is the last token, and there is a state for all tokens but it."""
    end = int(texts[0].tokens[texts[0].prompt + 5])
    generated = texts[0].tokens[texts[0].prompt :].tolist()

    text = target.continue_greedily(prompts[0], NEW_TOKENS, ends={end})

    assert generated[: generated.index(end) + 1] == text.tokens[text.prompt :].tolist()
    assert len(text.tokens) - 1 == text.states.shape[1]


def test_drafter_states_are_those_of_a_plain_head(
    drafter: DraftHead, target: ResidentModel, texts: Sequence[Continuation]
) -> None:
    """With the context of a text, every state and every logit is what the plain module gives."""
    text = texts[0]
    following = text.tokens[1:]
    length = len(following)
    with torch.no_grad():
        expected = PlainHead()(following, text.states)

    found = drafter(
        target.embed(following),
        text.states,
        torch.arange(length),
        torch.ones(length, length, dtype=torch.bool).tril(),
    )

    # With a mask, sdpa adds in another order than with its causal flag.
    torch.testing.assert_close(expected, found, atol=1e-5, rtol=1e-5)
    logits = functional.linear(expected, HEAD)
    torch.testing.assert_close(logits, target.scores(found), atol=1e-4, rtol=1e-4)


def test_drafts_from_all_positions_are_those_from_each(
    drafter: DraftHead, target: ResidentModel, texts: Sequence[Continuation]
) -> None:
    """Drafting from every position at once gives the tokens of a plain loop from each alone."""
    text, head, first, count = texts[1], PlainHead(), 60, 4
    following = text.tokens[1:]
    expected = [
        head.draft(following[:length], text.states[:, :length], count)
        for length in range(first + 1, len(following) + 1)
    ]

    found = draft(drafter, target, text.states, following, first, count)

    assert torch.equal(torch.stack(expected), found)


def speculate(whole: Any, prompt: Tensor, count: int, tokens: int) -> tuple[Tensor, list[int]]:
    """Greedy speculative decoding, plainly: the text and the accepted drafts of each step."""
    head, text, steps = PlainHead(), prompt, []

    def states_of(text: Tensor) -> Tensor:
        with torch.no_grad():
            return whole.model(text[None], use_cache=False).last_hidden_state

    def said(states: Tensor) -> Tensor:
        return functional.linear(states, HEAD).argmax(-1)[0]

    text = torch.cat([text, said(states_of(text))[-1:]])
    while len(text) < len(prompt) + tokens:
        drafts = head.draft(text[1:], states_of(text[:-1]), count)
        verified = said(states_of(torch.cat([text, drafts])))[len(text) - 1 :]
        accepted = int((drafts == verified[:-1]).cumprod(0).sum())
        steps.append(accepted)
        text = torch.cat([text, verified[: accepted + 1]])
    return text, steps


@pytest.mark.parametrize("count", [1, 3])
def test_a_walk_takes_the_steps_of_speculative_decoding(
    drafter: DraftHead,
    target: ResidentModel,
    whole: Any,
    prompts: Sequence[Tensor],
    texts: Sequence[Continuation],
    count: int,
) -> None:
    """Real drafting and verifying writes the same text, and accepts as much in each step."""
    for prompt, text in zip(prompts, texts, strict=True):
        written, steps = speculate(whole, prompt, count, NEW_TOKENS)

        walked = walk(accepted_drafts(drafter, target, text, count))

        common = min(len(written), len(text.tokens))
        assert torch.equal(written[:common], text.tokens[:common])
        assert len(walked) > NEW_TOKENS // (count + 1) - 2
        assert steps[: len(walked)] == walked


def test_no_draft_is_what_a_model_says_by_logits_that_are_not_finite(
    drafter: DraftHead, target: ResidentModel, texts: Sequence[Continuation]
) -> None:
    """Though the best of NaN is the first token, in the model's scores and in the head's."""
    text = texts[0]
    tokens = text.tokens.clone()
    tokens[text.prompt :] = 0
    broken = replace(text, tokens=tokens, states=text.states * float("nan"), bad_step=1)

    assert set(accepted_drafts(drafter, target, replace(broken, bad_step=None), 3)) == {3}
    assert set(accepted_drafts(drafter, target, broken, 3)) == {0}


def test_a_walk_leaps_over_what_was_accepted() -> None:
    """After k accepted drafts the next step is k + 1 positions on."""
    assert [2, 0, 1, 3] == walk([2, 9, 9, 0, 1, 9, 3])


def test_the_mean_length_counts_the_token_of_the_target() -> None:
    """A step yields one token and as many more as drafts are accepted."""
    assert 1 + 0.75 + 0.5 + 0.25 == Drafts(4, (0.75, 0.5, 0.25)).mean_length


def measure(
    drafter: DraftHead, target: ResidentModel, prompts: Sequence[Tensor], tokens: int
) -> dict[int, Drafts]:
    """What is accepted, by the number of drafts in a step, of texts that the target writes."""
    texts = [target.continue_greedily(prompt, tokens) for prompt in prompts]
    return {count: acceptance(drafter, target, texts, count) for count in (1, 3)}


def shuffled_head() -> ModelSource:
    """The model with the MTP head's matrices in another order of elements."""
    generator = torch.Generator().manual_seed(0)
    mixed = {}
    for name, tensor in below("mtp.").items():
        order = torch.randperm(tensor.numel(), generator=generator)
        mixed[f"mtp.{name}"] = tensor.flatten()[order].view(tensor.shape)
    return source(**mixed)


def test_a_trained_head_is_accepted_and_a_shuffled_one_is_not(
    drafter: DraftHead, target: ResidentModel, prompts: Sequence[Tensor]
) -> None:
    """Most first drafts of the demo's own head are accepted, hardly any of a shuffled one."""
    shuffled = OpenModel(shuffled_head(), FLOAT32).draft_head()

    own = measure(drafter, target, prompts, NEW_TOKENS)
    other = measure(shuffled, target, prompts, NEW_TOKENS)

    assert own[1].rates[0] > 0.5
    assert other[1].rates[0] < 0.1
    for found in (own, other):
        assert 1 <= found[1].mean_length <= 2
        assert 1 <= found[3].mean_length <= 4
        assert sorted(found[3].rates, reverse=True) == list(found[3].rates)
    assert own[3].mean_length > own[1].mean_length > other[3].mean_length


def test_texts_that_end_before_a_step_are_refused(
    drafter: DraftHead, target: ResidentModel, prompts: Sequence[Tensor]
) -> None:
    """Acceptance without a single whole step is an error, not a figure."""
    with pytest.raises(ValueError, match="3 drafts"):
        measure(drafter, target, prompts, tokens=3)
