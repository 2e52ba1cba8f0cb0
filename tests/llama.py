"""Plain Llama as a package of its own would bring it: a family's table, and a tiny checkpoint."""

from __future__ import annotations

import shutil
from collections.abc import Container, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import REPOSITORY
from tiny import Tensor, bf16, write_json, write_shards

from carnice_build.models.base import (
    ConfigReader,
    Fusion,
    KvGeometry,
    Part,
    Passed,
    Role,
    SmoothingMapping,
    TensorFact,
)

_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
_FUSIONS = {"self_attn.qkv_proj": _QKV, "mlp.gate_up_proj": _GATE_UP}


class Llama:
    """The tensors of one checkpoint, derived from its `config.json`."""

    name = "llama"

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        self._config = ConfigReader(config, where)
        self._heads = self._config.count("num_attention_heads")
        self._kv_heads = self._config.count("num_key_value_heads")
        self._hidden = self._config.count("hidden_size")
        self._intermediate = self._config.count("intermediate_size")
        self._vocabulary = self._config.count("vocab_size")
        self._head = self._config.count("head_dim", self._hidden // self._heads)
        self.num_layers = self._config.count("num_hidden_layers")
        self.dtype = self._config.text("torch_dtype", "") or None

    @cached_property
    def tensors(self) -> Mapping[str, TensorFact]:
        return {name: fact for name, fact in self.built.items() if name not in self.ties}

    @cached_property
    def built(self) -> Mapping[str, TensorFact]:
        return {fact.name: fact for fact in self._facts()}

    @property
    def unread(self) -> Mapping[str, TensorFact]:
        return {}

    @cached_property
    def ties(self) -> Mapping[str, str]:
        tied = self._config.flag("tie_word_embeddings", False)
        return {"lm_head.weight": "model.embed_tokens.weight"} if tied else {}

    def _facts(self) -> Iterator[TensorFact]:
        table, size = (self._vocabulary, self._hidden), (self._hidden,)
        yield TensorFact("model.embed_tokens.weight", table, Part.EMBED, Role.EMBEDDING)
        for layer in range(self.num_layers):
            prefix = self.layer_prefix(layer)
            for name, shape in self._linears():
                full = f"{prefix}{name}.weight"
                yield TensorFact(full, shape, Part.LAYERS, Role.LINEAR, layer)
            for name in ("input_layernorm", "post_attention_layernorm"):
                yield TensorFact(f"{prefix}{name}.weight", size, Part.LAYERS, Role.NORM, layer)
        yield TensorFact("model.norm.weight", size, Part.BODY, Role.NORM)
        yield TensorFact("lm_head.weight", table, Part.HEAD, Role.LINEAR)

    def _linears(self) -> Iterator[tuple[str, tuple[int, int]]]:
        queries, keys = self._heads * self._head, self._kv_heads * self._head
        for name, rows in zip(_QKV, (queries, keys, keys), strict=True):
            yield name, (rows, self._hidden)
        yield "self_attn.o_proj", (self._hidden, queries)
        for name in _GATE_UP:
            yield name, (self._intermediate, self._hidden)
        yield "mlp.down_proj", (self._hidden, self._intermediate)

    @property
    def text_config(self) -> Mapping[str, Any]:
        return self._config.entries

    @property
    def layer_config(self) -> Mapping[str, Any]:
        return self.text_config

    def published_config(self, parts: Container[Part]) -> dict[str, Any]:
        return dict(self._config.entries)

    @property
    def kv_geometry(self) -> KvGeometry:
        return KvGeometry(self.num_layers, self._kv_heads, self._head)

    @property
    def max_positions(self) -> int:
        return self._config.count("max_position_embeddings")

    @property
    def dimensions(self) -> Mapping[str, int]:
        return {"hidden_size": self._hidden, "vocab_size": self._vocabulary}

    @property
    def fusions(self) -> list[Fusion]:
        return [
            Fusion(prefix + fused, tuple(prefix + part for part in parts))
            for prefix in map(self.layer_prefix, range(self.num_layers))
            for fused, parts in _FUSIONS.items()
        ]

    def shared_inputs(self, layer: int) -> list[list[str]]:
        prefix = self.layer_prefix(layer)
        groups = (_QKV, ("self_attn.o_proj",), _GATE_UP, ("mlp.down_proj",))
        return [[prefix + name for name in group] for group in groups]

    def layer_kind(self, layer: int) -> str:
        return "full"

    def layer_prefix(self, layer: int) -> str:
        return f"model.layers.{layer}."

    def passed(self, layer: int) -> tuple[Passed, ...]:
        return ()

    def optional(self, fact: TensorFact) -> bool:
        return False

    def engine_names(self, module: str) -> list[str]:
        return [module]

    def module_kind(self, name: str) -> str:
        return ".".join(name.split(".")[-3:-1])

    def canonical_name(self, name: str) -> str | None:
        return None

    def keeps_dtype(self, name: str) -> bool:
        return False

    def offset_norm(self, name: str) -> bool:
        return False

    @property
    def smoothing(self) -> list[SmoothingMapping]:
        """llm-compressor's default; it skips what grouped queries keep from fitting."""
        values = SmoothingMapping("self_attn.v_proj", ("self_attn.o_proj",))
        return [
            SmoothingMapping("input_layernorm", _QKV),
            *([values] if self._heads == self._kv_heads else []),
            SmoothingMapping("post_attention_layernorm", _GATE_UP),
            SmoothingMapping("mlp.up_proj", ("mlp.down_proj",)),
        ]

    @property
    def narrow_linears(self) -> tuple[str, ...]:
        return ()

    def token_bytes(self, kind: str, width: int) -> int:
        return 4 * width * (self._intermediate + self._hidden)

    def attention_heads(self, kind: str) -> int:
        return self._heads

    @property
    def eager(self) -> bool:
        return False

    @property
    def drafts(self) -> bool:
        return False

    def draft_head(self, attention: str, tensors: Mapping[str, Any]) -> Any:
        raise NotImplementedError("a Llama has no MTP head")


def llama_config(*, layers: int = 3, kv_heads: int = 2, tied: bool = False) -> dict[str, Any]:
    """The config.json of a tiny model with the demo's vocabulary."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": kv_heads,
        "head_dim": 64,
        "vocab_size": 2048,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": tied,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }


def write_llama(folder: Path, **options: Any) -> Path:
    """A checkpoint with seeded random weights, and the demo's tokenizer."""
    folder.mkdir(parents=True)
    config = llama_config(**options)
    random = np.random.default_rng(0)
    tensors = {}
    for fact in Llama(config, "llama").tensors.values():
        values = random.standard_normal(fact.shape, dtype=np.float32) * np.float32(0.05)
        values += np.float32(fact.role is Role.NORM)
        tensors[fact.name] = Tensor("BF16", fact.shape, bf16(values))
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", {"eos_token_id": 1})
    write_shards(folder, tensors, 1)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(REPOSITORY / "demo" / "qwen3.6-27b" / name, folder / name)
    return folder


def announce(site: Path, value: str, patch: pytest.MonkeyPatch, name: str = "llama") -> None:
    """Install in the folder `site` a package that announces `value` as a model family."""
    info = site / "plain_llama-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plain-llama\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[carnice_build.families]\n{name} = {value}\n")
    patch.syspath_prepend(site)
