"""The demo's text model as torch tensors, and as transformers' own model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from qwen import BODY
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor
from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

from carnice_build.calibration.text_model import ModelSource
from carnice_build.models import architecture_of

BASE = Path(__file__).parent.parent / "demo" / "qwen3.6-27b"
WHOLE_CONFIG: dict[str, Any] = json.loads((BASE / "config.json").read_text())
CONFIG: dict[str, Any] = WHOLE_CONFIG["text_config"]
ARCHITECTURE = architecture_of(WHOLE_CONFIG, "demo")
KINDS = ["full" if kind == "full_attention" else "linear" for kind in CONFIG["layer_types"]]


@cache
def weights() -> Mapping[str, Tensor]:
    """Every tensor of the checkpoint by canonical name; not to be changed."""
    shards = sorted(BASE.glob("*.safetensors"))
    return {name: tensor for shard in shards for name, tensor in load_file(shard).items()}


def below(prefix: str) -> dict[str, Tensor]:
    """The tensors under `prefix`, by the rest of their names."""
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in weights().items()
        if name.startswith(prefix)
    }


def layer_tensors(index: int) -> dict[str, Tensor]:
    """The tensors of decoder layer `index`, named relative to it."""
    return below(f"{BODY}layers.{index}.")


def whole_model(dtype: str, attention: str) -> Qwen3_5ForCausalLM:
    """The text model as transformers loads and runs it."""
    return Qwen3_5ForCausalLM.from_pretrained(
        BASE,
        config=Qwen3_5TextConfig(**CONFIG),
        key_mapping={r"^model\.language_model\.": "model."},
        dtype=dtype,
        attn_implementation=attention,
    ).eval()


def sample(length: int, seed: int) -> Tensor:
    """Random token ids [length]."""
    return torch.randint(
        CONFIG["vocab_size"], (length,), generator=torch.Generator().manual_seed(seed)
    )


def source(**changes: Tensor) -> ModelSource:
    """The text model, with other tensors in the place of some."""
    tensors = {**weights(), **changes}
    return ModelSource(ARCHITECTURE, tensors.__getitem__)


def heldout(samples: int, length: int) -> Tensor:
    """The first tokens [samples, length] of a text that the model has not seen."""
    tokenizer = Tokenizer.from_file(str(BASE / "tokenizer.json"))
    text = (BASE.parent / "heldout.txt").read_text(encoding="utf-8")[: 20 * samples * length]
    return torch.tensor(tokenizer.encode(text).ids[: samples * length]).view(samples, length)
