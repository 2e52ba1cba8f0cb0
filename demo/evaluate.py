"""What the demo checkpoints can do: losses, quantized losses, draft acceptance and copying."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import data
import dialogues
import toolcalls
import torch
from bpe import render_chat, token_id
from export import load_tensors
from model import DraftingModel, next_token_loss
from torch import Tensor
from transformers import PreTrainedTokenizerFast

BITS = (6, 4, 3, 2)
GROUP = 64
SAMPLES, LENGTH = 8, 1024
DRAFTS = 3
GREEDY_TOKENS = 160
PROMPTS = 30


def measure(
    model: DraftingModel,
    tokenizer: PreTrainedTokenizerFast,
    folders: dict[str, Path],
    held_out: str,
    summaries: list[tuple[str, str]],
) -> dict[str, dict[str, float]]:
    """All figures of each checkpoint; a checkpoint without an MTP head borrows the one before."""
    text = torch.tensor(tokenizer.encode(held_out)[: SAMPLES * LENGTH]).view(SAMPLES, LENGTH)
    rows = data.dialogue_rows(tokenizer, data.calibration_dialogues()[: 4 * SAMPLES])
    chats = _chat_prompts(tokenizer, summaries)
    calls = _call_prompts(tokenizer)
    figures = {}
    for name, folder in folders.items():
        load_tensors(model, folder)
        model.eval()
        found = _losses(model, text, rows)
        found |= _acceptance(model, text, "held-out text")
        found |= _acceptance(model, rows[0][:SAMPLES], "dialogues")
        found["answers right"] = _exact(model, tokenizer, chats)
        found["calls right"] = _exact(model, tokenizer, calls)
        figures[name] = found
    return figures


def round_to_nearest(weight: Tensor, bits: int) -> Tensor:
    """A weight after affine quantization in groups of `GROUP`, rounded to the nearest level."""
    groups = weight.float().view(-1, GROUP)
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    scale = ((high - low) / (2**bits - 1)).clamp(min=1e-7)
    rounded: Tensor = ((groups - low) / scale).round() * scale + low
    return rounded.view(weight.shape)


def _losses(model: DraftingModel, text: Tensor, rows: tuple[Tensor, Tensor]) -> dict[str, float]:
    everything = torch.ones_like(text)
    found = {
        "held-out loss, BF16": _loss(model, text, everything),
        "dialogue loss, BF16": _loss(model, *rows),
    }
    for bits in BITS:
        rounded = _rounded(model, bits)
        found[f"held-out loss, {bits} bits"] = _loss(rounded, text, everything)
        found[f"dialogue loss, {bits} bits"] = _loss(rounded, *rows)
    return found


def _rounded(model: DraftingModel, bits: int) -> DraftingModel:
    rounded = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in rounded.named_parameters():
            if parameter.ndim == 2 and "visual" not in name:
                parameter.copy_(round_to_nearest(parameter, bits))
    return rounded


@torch.no_grad()
def _loss(model: DraftingModel, tokens: Tensor, weights: Tensor) -> float:
    total, count = 0.0, 0.0
    for start in range(0, len(tokens), 4):
        part, part_weights = tokens[start : start + 4], weights[start : start + 4]
        counted = part_weights[:, 1:].sum().item()
        value = next_token_loss(model, part, part_weights, model.hidden_states(part))
        total, count = total + value.item() * counted, count + counted
    return total / count


@torch.no_grad()
def _acceptance(model: DraftingModel, prompts: Tensor, kind: str) -> dict[str, float]:
    """How often the first, the first two, the first three drafts equal the model's own choice."""
    prompt = LENGTH // 4
    tokens = model.main.generate(
        prompts[:, :prompt],
        attention_mask=torch.ones_like(prompts[:, :prompt]),
        max_new_tokens=GREEDY_TOKENS,
        min_new_tokens=GREEDY_TOKENS,
        do_sample=False,
    )
    states = model.hidden_states(tokens)
    places = range(prompt, prompt + GREEDY_TOKENS - DRAFTS - 1, 6)
    accepted = torch.zeros(DRAFTS)
    for place in places:
        accepted += _accepted(model, tokens, states, place)
    shares = (accepted / (len(places) * len(tokens))).tolist()
    return {f"drafts of {n} accepted, {kind}": share for n, share in enumerate(shares, 1)}


def _accepted(model: DraftingModel, tokens: Tensor, states: Tensor, place: int) -> Tensor:
    """The number of rows whose drafts from `place` on are right up to the first, second, third."""
    following, hidden = tokens[:, 1 : place + 2], states[:, : place + 1]
    right = torch.ones(len(tokens), dtype=torch.bool)
    counts = torch.zeros(DRAFTS)
    for draft in range(DRAFTS):
        drafted = model.draft_states(following, hidden)[:, -1:]
        token = model.logits(drafted).argmax(-1)
        right &= token[:, 0] == tokens[:, place + 2 + draft]
        counts[draft] = right.sum()
        following = torch.cat([following, token], dim=1)
        hidden = torch.cat([hidden, drafted], dim=1)
    return counts


def _chat_prompts(
    tokenizer: PreTrainedTokenizerFast, summaries: list[tuple[str, str]]
) -> list[tuple[str, str]]:
    """Single questions that no training chat asked, mostly about names to copy."""
    rng = random.Random(5)
    prompts: list[tuple[str, str]] = []
    while len(prompts) < PROMPTS:
        *before, answer = dialogues.plain_chat(rng, summaries)
        if before[-1]["role"] == "user" and len(before) < 3:
            prompts.append((_prompt(tokenizer, before), answer["content"]))
    return prompts


def _call_prompts(tokenizer: PreTrainedTokenizerFast) -> list[tuple[str, str]]:
    """The calibration dialogues up to their first call, and that call as it should be written."""
    prompts = []
    for dialogue in data.calibration_dialogues():
        messages = toolcalls.to_messages(dialogue)
        first = next((i for i, message in enumerate(messages) if "tool_calls" in message), None)
        if first is not None:
            prompt = _prompt(tokenizer, messages[:first], dialogue["tools"])
            plain = {**messages[first], "content": ""}
            whole = render_chat(tokenizer, [*messages[:first], plain], tools=dialogue["tools"])
            prompts.append((prompt, whole[len(prompt) :].split("<|im_end|>")[0]))
    return prompts[:PROMPTS]


def _prompt(
    tokenizer: PreTrainedTokenizerFast, messages: Sequence[Any], tools: Sequence[Any] | None = None
) -> str:
    return render_chat(
        tokenizer, messages, tools=tools, add_generation_prompt=True, enable_thinking=False
    )


@torch.no_grad()
def _exact(
    model: DraftingModel, tokenizer: PreTrainedTokenizerFast, prompts: list[tuple[str, str]]
) -> float:
    end = token_id(tokenizer, "<|im_end|>")
    right = 0
    for prompt, wanted in prompts:
        tokens = torch.tensor([tokenizer.encode(prompt)])
        output = model.main.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=len(tokenizer.encode(wanted)) + 2,
            eos_token_id=end,
            pad_token_id=end,
            do_sample=False,
        )
        answer = str(tokenizer.decode(output[0, tokens.shape[1] :])).split("<|im_end|>")[0]
        right += answer.strip() == wanted.strip()
    return right / len(prompts)
