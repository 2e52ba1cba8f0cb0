"""What the demo checkpoints can do: losses, quantized losses, draft acceptance and copying."""

from __future__ import annotations

import copy
import random
from pathlib import Path

import data
import dialogues
import torch
from bpe import render_chat, token_id
from export import load_tensors
from model import DraftingModel, next_token_loss
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from carnice_build.chat.tool_format import tool_format
from carnice_build.verification.agent import tasks
from carnice_build.verification.calls import Share, Template, asked, read, summarize

BITS = (6, 4, 3, 2)
GROUP = 64
SAMPLES, LENGTH = 8, 1024
DRAFTS = 3
GREEDY_TOKENS = 160
PROMPTS = 120
BATCH = 60
ANSWER_TOKENS = 200


def measure(
    model: DraftingModel,
    tokenizer: PreTrainedTokenizerFast,
    folders: dict[str, Path],
    held_out: str,
    summaries: list[tuple[str, str]],
) -> dict[str, dict[str, float]]:
    """All figures of each checkpoint; a checkpoint without an MTP head borrows the one before."""
    text = torch.tensor(tokenizer.encode(held_out)[: SAMPLES * LENGTH]).view(SAMPLES, LENGTH)
    spoken = data.in_both_formats(tokenizer, data.calibration_dialogues()[: 4 * SAMPLES])
    tokens, said = (torch.from_numpy(part.astype(int)) for part in data.packed(tokenizer, spoken))
    chats = _chat_prompts(tokenizer, summaries)
    figures = {}
    for name, folder in folders.items():
        load_tensors(model, folder)
        model.eval()
        found = _losses(model, text, (tokens, said))
        found |= _acceptance(model, text, "held-out text")
        found |= _acceptance(model, tokens[:SAMPLES], "dialogues")
        answers = _answers(model, tokenizer, [prompt for prompt, _ in chats])
        right = [
            answer.strip() == wanted for answer, (_, wanted) in zip(answers, chats, strict=True)
        ]
        found["plain answers, exact"] = sum(right) / len(right)
        for syntax, shares in call_shares(model, tokenizer).items():
            found |= {f"{syntax} calls, {what}": share for what, share in shares.items()}
        figures[name] = found
    return figures


def call_shares(
    model: DraftingModel, tokenizer: PreTrainedTokenizerFast
) -> dict[str, dict[str, float]]:
    """By the format that a template asks for, the shares of `carnice verify`'s check `calls`."""
    drawn = tasks(PROMPTS, seed=8)
    found = {}
    for text in data.both_templates(tokenizer):
        template = Template(text, "the template", {}, tool_format(text))
        prompts = [item.prompt for item in asked(drawn, template)]
        said = zip(drawn, prompts, _answers(model, tokenizer, prompts), strict=True)
        counts = summarize([read(*item, template.format) for item in said])
        shares = {name: value for name, value in vars(counts).items() if isinstance(value, Share)}
        found[template.format.syntax.value] = {n: share.rate for n, share in shares.items()}
    return found


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
        part, part_weights = (
            rows[start : start + 4].to(model.main.device) for rows in (tokens, weights)
        )
        counted = part_weights[:, 1:].sum().item()
        value = next_token_loss(model, part, part_weights, model.hidden_states(part))
        total, count = total + value.item() * counted, count + counted
    return total / count


@torch.no_grad()
def _acceptance(model: DraftingModel, prompts: Tensor, kind: str) -> dict[str, float]:
    """How often the first, the first two, the first three drafts equal the model's own choice."""
    prompt, prompts = LENGTH // 4, prompts.to(model.main.device)
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
    right = torch.ones(len(tokens), dtype=torch.bool, device=tokens.device)
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
    """Single questions that no training chat asked, mostly about names to copy, with answers."""
    rng = random.Random(5)
    prompts: list[tuple[str, str]] = []
    while len(prompts) < PROMPTS:
        *before, answer = dialogues.plain_chat(rng, summaries)
        if before[-1]["role"] == "user" and len(before) < 3:
            prompt = render_chat(
                tokenizer, before, add_generation_prompt=True, enable_thinking=False
            )
            prompts.append((prompt, answer["content"].strip()))
    return prompts


@torch.no_grad()
def _answers(
    model: DraftingModel, tokenizer: PreTrainedTokenizerFast, prompts: list[str]
) -> list[str]:
    """What the model says to each prompt at temperature 0."""
    end = token_id(tokenizer, "<|im_end|>")
    device = model.main.device
    answers = []
    for start in range(0, len(prompts), BATCH):
        batch = [tokenizer.encode(prompt) for prompt in prompts[start : start + BATCH]]
        longest = max(map(len, batch))
        tokens = torch.tensor([[end] * (longest - len(ids)) + ids for ids in batch], device=device)
        seen = [[0] * (longest - len(ids)) + [1] * len(ids) for ids in batch]
        output = model.main.generate(
            tokens,
            attention_mask=torch.tensor(seen, device=device),
            max_new_tokens=ANSWER_TOKENS,
            eos_token_id=end,
            pad_token_id=end,
            do_sample=False,
        )
        texts = (str(tokenizer.decode(row[longest:])) for row in output)
        answers += [text.split("<|im_end|>")[0] for text in texts]
    return answers
