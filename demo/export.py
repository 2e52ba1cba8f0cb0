"""Checkpoints on disk: BF16 shards with an index, configuration and tokenizer files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import bpe
import torch
from model import DraftingModel, model_config
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

Tensors = dict[str, Tensor]

REPEATED = "language_model.language_model.language_model."


def base_tensors(model: DraftingModel) -> Tensors:
    """All tensors of the base checkpoint under their names on disk, in BF16."""
    named = dict(model.main.state_dict())
    named |= {f"mtp.{name}": tensor for name, tensor in model.mtp.state_dict().items()}
    return {name: tensor.to("cpu", torch.bfloat16).contiguous() for name, tensor in named.items()}


def fine_tune_tensors(model: DraftingModel) -> Tensors:
    """The fine-tune's tensors as they were shipped: no MTP head, a prefix three times over."""
    return {
        repeated_name(name): tensor
        for name, tensor in base_tensors(model).items()
        if not name.startswith("mtp.")
    }


def repeated_name(name: str) -> str:
    """A tensor's name with the prefix `language_model.` three times over."""
    if name.startswith("model."):
        inner = name.removeprefix("model.").removeprefix("language_model.")
        return f"model.{REPEATED}{inner}"
    return f"{REPEATED}{name}"


def load_tensors(model: DraftingModel, folder: Path) -> None:
    """Puts the tensors of a checkpoint into the model; the MTP head stays if there is none."""
    plain = {}
    for name, tensor in read_tensors(folder).items():
        plain[_plain_name(name)] = tensor.float()
    head = {
        name.removeprefix("mtp."): plain.pop(name) for name in list(plain) if name[:4] == "mtp."
    }
    model.main.load_state_dict(plain)
    if head:
        model.mtp.load_state_dict(head)


def _plain_name(name: str) -> str:
    inner = name.replace(REPEATED, "")
    if inner == name or inner.startswith(("lm_head.", "model.visual.")):
        return inner
    return inner.replace("model.", "model.language_model.", 1)


def read_tensors(folder: Path) -> Tensors:
    """Every tensor that the index of `folder` names."""
    index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
    tensors: Tensors = {}
    for file in sorted(set(index["weight_map"].values())):
        tensors |= load_file(folder / file)
    return tensors


def write_checkpoint(folder: Path, tensors: Tensors, tokenizer: Tokenizer, shards: int) -> None:
    """Writes the whole folder anew."""
    shutil.rmtree(folder, ignore_errors=True)
    bpe.save_tokenizer(tokenizer, folder)
    _write_shards(folder, tensors, shards)
    _write_json(folder / "config.json", model_config(tokenizer))
    _write_json(folder / "generation_config.json", _generation_config(tokenizer))
    _write_json(folder / "preprocessor_config.json", _preprocessor_config())


def _write_shards(folder: Path, tensors: Tensors, shards: int) -> None:
    total = sum(tensor.nbytes for tensor in tensors.values())
    parts: list[Tensors] = [{} for _ in range(shards)]
    done = 0
    for name, tensor in tensors.items():
        parts[done * shards // total][name] = tensor
        done += tensor.nbytes
    weight_map: dict[str, str] = {}
    for number, part in enumerate(parts, 1):
        file = f"model-{number:05}-of-{shards:05}.safetensors"
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    _write_json(folder / "model.safetensors.index.json", index)


def _generation_config(tokenizer: Tokenizer) -> dict[str, Any]:
    end_of_text = tokenizer.token_to_id("<|endoftext|>")
    return {
        "bos_token_id": end_of_text,
        "do_sample": True,
        "eos_token_id": [tokenizer.token_to_id("<|im_end|>"), end_of_text],
        "pad_token_id": end_of_text,
        "temperature": 1.0,
        "top_k": 20,
        "top_p": 0.95,
        "transformers_version": "5.17.0",
    }


def _preprocessor_config() -> dict[str, Any]:
    return {
        "image_mean": [0.5, 0.5, 0.5],
        "image_processor_type": "Qwen2VLImageProcessorFast",
        "image_std": [0.5, 0.5, 0.5],
        "merge_size": 2,
        "patch_size": 16,
        "processor_class": "Qwen3VLProcessor",
        "size": {"longest_edge": 16777216, "shortest_edge": 65536},
        "temporal_patch_size": 2,
    }


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
