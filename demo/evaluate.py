"""What the demo checkpoints can do: losses, quantized losses, draft acceptance and copying."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from dataclasses import dataclass
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

from carnice_build.chat.parsers import ToolCall, parse_hermes, parse_qwen3_xml

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
    calls = call_prompts(tokenizer)
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
        for syntax, asked in calls.items():
            found |= judged(
                syntax, asked, _answers(model, tokenizer, [item.prompt for item in asked])
            )
        figures[name] = found
    return figures


@dataclass(frozen=True)
class Asked:
    """A dialogue up to its first call: the prompt, the functions, and the calls that are right."""

    prompt: str
    tools: list[dict[str, Any]]
    calls: list[ToolCall]


def call_prompts(tokenizer: PreTrainedTokenizerFast) -> dict[str, list[Asked]]:
    """Prompts of dialogues that no model has seen, by the format that their template asks for."""
    rng = random.Random(8)
    found: dict[str, list[Asked]] = {"XML": [], "Hermes": []}
    templates = data.both_templates(tokenizer)
    while len(found["XML"]) < PROMPTS:
        dialogue = toolcalls.tool_dialogue(rng, made_up=0.3)
        messages = toolcalls.to_messages(dialogue)
        first = next((i for i, message in enumerate(messages) if "tool_calls" in message), None)
        if first is None:
            continue
        calls = [
            ToolCall(call["function"]["name"], call["function"]["arguments"])
            for call in messages[first]["tool_calls"]
        ]
        for syntax, template in zip(found, templates, strict=True):
            prompt = _prompt(tokenizer, messages[:first], dialogue["tools"], chat_template=template)
            found[syntax].append(Asked(prompt, dialogue["tools"], calls))
    return found


def judged(syntax: str, asked: list[Asked], answers: list[str]) -> dict[str, float]:
    """Shares of first calls that can be read, have the right name, the right keys, are right."""
    counts = dict.fromkeys(("parsed", "right name", "right keys", "exact", "all calls exact"), 0)
    for item, answer in zip(asked, answers, strict=True):
        calls = (
            parse_hermes(answer)[1]
            if syntax == "Hermes"
            else parse_qwen3_xml(answer, item.tools)[1]
        )
        if calls:
            first, wanted = calls[0], item.calls[0]
            named = first.name == wanted.name
            counts["parsed"] += 1
            counts["right name"] += named
            counts["right keys"] += named and first.arguments.keys() == wanted.arguments.keys()
            counts["exact"] += first == wanted
            counts["all calls exact"] += calls == item.calls
    return {f"{syntax} calls, {name}": count / len(asked) for name, count in counts.items()}


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
            prompts.append((_prompt(tokenizer, before), answer["content"].strip()))
    return prompts


def _prompt(
    tokenizer: PreTrainedTokenizerFast,
    messages: Sequence[Any],
    tools: Sequence[Any] | None = None,
    **options: Any,
) -> str:
    return render_chat(
        tokenizer,
        messages,
        tools=tools,
        add_generation_prompt=True,
        enable_thinking=False,
        **options,
    )


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
