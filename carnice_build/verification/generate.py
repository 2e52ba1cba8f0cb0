"""Check `generate`: the loaded model answers a chat prompt, and every logit is finite."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from carnice_build.verification.result import Check, judged

NAME = "generate"
PROMPT = "Hello! What can you do?"
TOKENS = 32


@dataclass(frozen=True)
class Generation:
    """A greedy continuation; `bad_step` is the first one with a logit that is not finite."""

    text: str
    tokens: int
    bad_step: int | None


def generate(model: Any, tokenizer: Any) -> Generation:
    """Continue the chat prompt greedily; runs where mlx is loaded.

    Goes on after an end-of-turn token, so that as many steps are tried in every model.
    """
    from mlx_lm.generate import generate_step

    return collected(tokenizer, generate_step(prompt(tokenizer), model, max_tokens=TOKENS))


def collected(tokenizer: Any, steps: Iterable[tuple[Any, Any]]) -> Generation:
    """What came of the steps of a library: tokens, each with log-probabilities of mlx."""
    import mlx.core as mx

    tokens: list[Any] = []
    bad_step: int | None = None
    for token, logprobs in steps:
        tokens.append(token)
        # These are logits less their log-sum-exp: one that is not finite spoils them all.
        if bad_step is None and not mx.isfinite(logprobs).all().item():
            bad_step = len(tokens)
    return Generation(tokenizer.decode(tokens), len(tokens), bad_step)


def prompt(tokenizer: Any) -> Any:
    """The chat prompt's tokens, as mlx takes them."""
    import mlx.core as mx

    if tokenizer.chat_template is None:
        return mx.array(tokenizer.encode(PROMPT))
    messages = [{"role": "user", "content": PROMPT}]
    return mx.array(
        tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    )


def judge_generation(generation: Generation) -> Check:
    """The check's result."""
    problems = []
    if generation.bad_step is not None:
        problems.append(f"step {generation.bad_step} has a logit that is NaN or infinite")
    shown = " ".join(generation.text.split())
    return judged(
        NAME,
        problems,
        f"{generation.tokens} tokens after a chat prompt: {shown[:60]!r}",
        asdict(generation),
    )
