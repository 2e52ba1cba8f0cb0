"""Checkpoints of the zoo as torch tensors, run one decoder layer at a time."""

from __future__ import annotations

import json
import re
from collections import UserDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING
from zoo import write_zoo

from carnice_build.calibration.beginning import Beginning
from carnice_build.calibration.driver import Arithmetic
from carnice_build.models import architecture_of, known_types

EXPERT = re.compile(r"(?<=\.experts\.)\d+(?=\.)")


@dataclass(frozen=True)
class Checkpoint:
    """The text model in a folder."""

    folder: Path

    @cached_property
    def config(self) -> dict[str, Any]:
        config = json.loads((self.folder / "config.json").read_text())
        return config.get("text_config") or config

    @cached_property
    def tensors(self) -> Mapping[str, Tensor]:
        return load_file(self.folder / "model.safetensors")

    @cached_property
    def prefix(self) -> str:
        """What the names of the text model's body begin with."""
        names = (name for name in self.tensors if ".layers.0." in name and "vision" not in name)
        return next(names).partition("layers.0.")[0]

    @property
    def layers(self) -> int:
        """How many decoder layers there are."""
        return len(
            {
                n.split(".")[self.prefix.count(".") + 1]
                for n in self.tensors
                if n.startswith(self.prefix + "layers.")
            }
        )

    def layer(self, index: int, stacked: bool = True) -> dict[str, Tensor]:
        """The tensors of a layer by their names in it, those of experts put together."""
        prefix = f"{self.prefix}layers.{index}."
        named = {n.removeprefix(prefix): t for n, t in self.tensors.items() if n.startswith(prefix)}
        if not stacked:
            return named
        if "experts.gate_up_proj" in named:
            gate, up = named.pop("experts.gate_up_proj").chunk(2, dim=1)
            parts = {"gate": gate, "up": up, "down": named.pop("experts.down_proj")}
            named |= {f"experts.*.{part}_proj.weight": t for part, t in parts.items()}
        stacks: dict[str, list[str]] = {}
        for name in named:
            stacks.setdefault(EXPERT.sub("*", name), []).append(name)
        return {
            stack: torch.stack([named[name] for name in sorted(names, key=_number)])
            if "*" in stack and stack not in named
            else named[stack]
            for stack, names in stacks.items()
        }

    def whole(self, arithmetic: Arithmetic) -> Any:
        """As transformers loads it."""
        config_class = CONFIG_MAPPING[self.config["model_type"]]
        model, report = MODEL_FOR_CAUSAL_LM_MAPPING[config_class].from_pretrained(
            self.folder,
            config=config_class(**config_class._decode_special_floats(self.config)),
            key_mapping={
                "^" + re.escape(self.prefix): "model.",
                r"^language_model\.lm_head": "lm_head",
            },
            dtype=arithmetic.torch_dtype,
            attn_implementation=arithmetic.attention,
            experts_implementation="eager",
            output_loading_info=True,
        )
        assert report["missing_keys"] <= {"lm_head.weight"}
        return model.eval()

    def embedded(self, tokens: Tensor) -> Tensor:
        """Rows of the embedding."""
        ends = ("embed_tokens.weight", "embeddings.weight")
        return next(t for name, t in self.tensors.items() if name.endswith(ends))[tokens][None]

    def beside(self, arithmetic: Arithmetic, tokens: Tensor) -> Callable[[int], dict[str, Any]]:
        """What the layers are given of a sample beside hidden states, by what its table says."""
        if self.config["model_type"] not in known_types():
            return lambda _: {}
        architecture = architecture_of(self.config, str(self.folder))
        passed = [(n, item) for n in range(self.layers) for item in architecture.passed(n)]
        shared = {item.argument: UserDict() for _, item in passed if item.maker is not None}
        wanted = [(layer, item.argument) for layer, item in passed if item.maker is None]
        made: dict[tuple[int, str], Tensor] = {}
        if wanted:
            outside = {n: t for n, t in self.tensors.items() if ".layers." not in n}
            tables = {n: outside.pop(n)[tokens][None] for n in list(outside) if "embed_tokens" in n}
            given = Beginning(self.config, arithmetic, outside).given(tables, wanted)
            made = dict(zip(wanted, given, strict=True))
        return lambda n: {**{name: t for (layer, name), t in made.items() if layer == n}, **shared}


def _number(name: str) -> int:
    return int(EXPERT.search(name)[0])


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Checkpoints by their families, each written when it is first asked for."""
    root, made = tmp_path_factory.mktemp("zoo"), {}

    def checkpoint(family: str) -> Checkpoint:
        if family not in made:
            made[family] = Checkpoint(write_zoo(root / family, family))
        return made[family]

    return checkpoint


def tokens(length: int) -> Tensor:
    return torch.randint(10, 2048, (length,), generator=torch.Generator().manual_seed(length))
