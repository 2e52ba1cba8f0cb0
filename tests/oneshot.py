"""The demo's text model quantized by llm-compressor's own `oneshot`, and the samples it sees."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from demo_model import BASE, whole_model
from safetensors.torch import load_file
from tiny import Tensor as StoredTensor
from tiny import read_all_tensors
from torch import Tensor

IGNORE = [
    "re:.*lm_head",
    "re:visual.*",
    "re:model.visual.*",
    "re:.*mlp.gate$",
    "re:.*embed_tokens$",
    "re:.*shared_expert_gate$",
    "re:.*linear_attn.*",
    "re:.*mtp.*",
]
"""The ignore list of the published W4A16 recipe."""

WEIGHTS = {
    "num_bits": 4,
    "type": "int",
    "symmetric": False,
    "group_size": 128,
    "strategy": "group",
    "dynamic": False,
}


@dataclass(frozen=True)
class Reference:
    """What `oneshot` gives: the model's tensors before they are packed, and those on disk."""

    smoothed: dict[str, Tensor]
    written: dict[str, Tensor]
    folder: Path


@cache
def tokenizer() -> Any:
    """The demo's, as transformers loads it."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(BASE)


@cache
def samples() -> tuple[Tensor, ...]:
    """Token ids of four calibration dialogues, longest first, as `oneshot` takes them."""
    roles = {"human": "user", "gpt": "assistant"}
    lines = (BASE.parent / "calibration.jsonl").read_text().splitlines()
    found = []
    for length, line in zip((67, 64, 61, 40), lines, strict=False):
        dialogue = json.loads(line)
        turns = [
            {"role": roles.get(turn["from"], turn["from"]), "content": turn["value"]}
            for turn in dialogue["conversations"]
        ]
        text = tokenizer().apply_chat_template(turns, tools=dialogue["tools"], tokenize=False)
        found.append(torch.tensor(tokenizer()(text)["input_ids"][:length]))
    return tuple(found)


def run_oneshot(
    observer: str,
    folder: Path,
    token_rows: Sequence[Tensor] | None = None,
    model: Any = None,
    layer: str = "Qwen3_5DecoderLayer",
    mappings: Sequence[tuple[str, Sequence[str]]] | None = None,
    ignore: Sequence[str] = IGNORE,
) -> Reference:
    """Smooth, quantize and save a whole model with one thread, one sample at a time.

    `token_rows`, in any order, take the place of `samples()`, and `model`, whose decoder layers
    are of the class `layer`, that of the demo.
    `mappings` are what is smoothed and what is balanced, the library's own if none are given;
    `ignore` are patterns for modules that stay as they are.
    """
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQMapping, AWQModifier

    given = mappings and [AWQMapping(smooth, list(balance)) for smooth, balance in mappings]
    group = {"targets": ["Linear"], "weights": {**WEIGHTS, "observer": observer}}
    modifiers = [
        AWQModifier(mappings=given),
        QuantizationModifier(config_groups={"group_0": group}, ignore=list(ignore)),
    ]
    return run_modifiers(modifiers, folder, token_rows, model, layer)


def run_gptq(
    weights: Mapping[str, Any],
    folder: Path,
    token_rows: Sequence[Tensor] | None = None,
    model: Any = None,
    layer: str = "Qwen3_5DecoderLayer",
    ignore: Sequence[str] = IGNORE,
    propagate_error: bool = True,
    **knobs: Any,
) -> Reference:
    """As `run_oneshot`, by GPTQ: `weights` are what is other than in `WEIGHTS`.

    `knobs` are those of the library's modifier.
    """
    from llmcompressor.modifiers.gptq import GPTQModifier

    group = {"targets": ["Linear"], "weights": {**WEIGHTS, **weights}}
    modifier = GPTQModifier(config_groups={"group_0": group}, ignore=list(ignore), **knobs)
    return run_modifiers(
        [modifier], folder, token_rows, model, layer, propagate_error=propagate_error
    )


def run_modifiers(
    modifiers: Sequence[Any],
    folder: Path,
    token_rows: Sequence[Tensor] | None,
    model: Any,
    layer: str,
    **settings: Any,
) -> Reference:
    """What `oneshot` makes with these modifiers, with one thread, one sample at a time."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.pipelines.cache import IntermediatesCache

    torch.set_num_threads(1)
    model = model or whole_model("bfloat16", "eager")
    rows = [
        {"input_ids": ids.tolist(), "attention_mask": [1] * len(ids)}
        for ids in token_rows or samples()
    ]
    with pytest.MonkeyPatch.context() as patch:
        # It would pin memory without asking whether there is an accelerator.
        patch.setattr(IntermediatesCache, "pin_memory", lambda *_: None)
        oneshot(
            model=model,
            processor=tokenizer(),
            recipe=list(modifiers),
            dataset=Dataset.from_list(rows),
            sequential_targets=[layer],
            shuffle_calibration_samples=False,
            **settings,
        )
    smoothed = {
        name.replace("model.", "model.language_model.", 1): tensor.detach().clone()
        for name, tensor in model.named_parameters()
        if not name.endswith(("weight_scale", "weight_zero_point"))
    }
    model.save_pretrained(folder, save_compressed=True)
    written = {
        name: tensor
        for path in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }
    return Reference(smoothed, written, folder)


def write_rows(path: Path, count: int = 3) -> list[Tensor]:
    """The shortest dialogues, of several lengths, as `oneshot` would not take them."""
    roles = {"human": "user", "gpt": "assistant"}
    rows = []
    for line in (BASE.parent / "calibration.jsonl").read_text().splitlines():
        dialogue = json.loads(line)
        turns = [
            {"role": roles.get(turn["from"], turn["from"]), "content": turn["value"]}
            for turn in dialogue["conversations"]
        ]
        text = tokenizer().apply_chat_template(turns, tools=dialogue["tools"], tokenize=False)
        rows.append((torch.tensor(tokenizer()(text)["input_ids"]), line))
    rows.sort(key=lambda row: len(row[0]))
    chosen = [rows[1], rows[0], *rows[2:count]]
    assert len({len(tokens) for tokens, _ in chosen}) == count
    path.write_text("".join(f"{line}\n" for _, line in chosen))
    return [tokens for tokens, _ in chosen]


def written(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of a folder of `oneshot`, as checkpoints call them."""
    return {canonical(name): tensor for name, tensor in read_all_tensors(folder).items()}


def canonical(name: str) -> str:
    """The name of a module or tensor of its layers, as checkpoints have it."""
    plain = name.startswith("model.layers.")
    return name.replace("model.", "model.language_model.", 1) if plain else name
