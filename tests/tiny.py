"""A tiny checkpoint of the real architecture, and safetensors files written by hand.

Nothing here needs torch: bytes come from numpy and `encode_header`, so that tests can also write
what no library would.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from qwen import BODY, VISION

from carnice_build.checkpoint.checkpoint import INDEX_NAME
from carnice_build.checkpoint.header import encode_header
from carnice_build.dtypes import TensorSpec
from carnice_build.models import architecture_of
from carnice_build.models.base import Part, Role

THRICE = "language_model." * 3


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor as a file holds it."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


def bf16(values: np.ndarray[Any, Any]) -> bytes:
    """The bytes of float32 `values` cut to BF16."""
    return (values.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()


def tiny_config(
    *,
    layers: int = 8,
    hidden: int = 128,
    intermediate: int = 256,
    vocabulary: int = 256,
    vision: bool = True,
    mtp: bool = True,
    tied: bool = False,
) -> dict[str, Any]:
    """The config.json of a tiny model, spelled as transformers 5 saves it.

    Every linear input is a multiple of 128.
    """
    text = {
        "model_type": "qwen3_5_text",
        "dtype": "bfloat16",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "vocab_size": vocabulary,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 32,
        "linear_conv_kernel_dim": 4,
        "full_attention_interval": 4,
        "layer_types": [
            "linear_attention" if (layer + 1) % 4 else "full_attention" for layer in range(layers)
        ],
        "mtp_num_hidden_layers": int(mtp),
        "partial_rotary_factor": 0.25,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {
            "mrope_interleaved": True,
            "mrope_section": [3, 3, 2],
            "partial_rotary_factor": 0.25,
            "rope_theta": 10000.0,
            "rope_type": "default",
        },
        "tie_word_embeddings": tied,
        "eos_token_id": 2,
    }
    config: dict[str, Any] = {
        "architectures": ["Qwen3_5ForConditionalGeneration"],
        "model_type": "qwen3_5",
        "text_config": text,
        "tie_word_embeddings": tied,
    }
    if vision:
        config["vision_config"] = {
            "model_type": "qwen3_5",
            "depth": 1,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "patch_size": 4,
            "temporal_patch_size": 2,
            "spatial_merge_size": 2,
            "in_channels": 3,
            "num_position_embeddings": 16,
            "out_hidden_size": hidden,
        }
    return config


def tiny_tokenizer() -> dict[str, Any]:
    """A tokenizer.json that `tokenizers` loads: single letters, and an end of text."""
    words = {word: index for index, word in enumerate(["<unk>", "<s>", "<eos>", *"abcdefgh"])}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "<unk>"},
    }


def tiny_tensors(
    config: Mapping[str, Any],
    *,
    mtp: bool = True,
    prefix: bool = False,
    float32: bool = True,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Every tensor that `config` calls for, with seeded random weights, by its name on disk.

    `prefix` puts `language_model.` before the names three times, as Carnice's files do;
    `float32` keeps A_log and the delta net's norm in F32, as the real checkpoints do.
    """
    random = np.random.default_rng(seed)
    tensors = {}
    for fact in architecture_of(config, "tiny").tensors.values():
        if fact.part is Part.MTP and not mtp:
            continue
        values = random.standard_normal(fact.shape, dtype=np.float32) * np.float32(0.05)
        wide = float32 and fact.name.endswith(("A_log", "linear_attn.norm.weight"))
        data = values.tobytes() if wide else bf16(values)
        name = misprefixed(fact.name) if prefix else fact.name
        tensors[name] = Tensor("F32" if wide else "BF16", fact.shape, data)
    return tensors


def misprefixed(name: str) -> str:
    """The name of canonical tensor `name` in Carnice's files."""
    if name.startswith(BODY):
        return f"model.{THRICE}{name.removeprefix(BODY)}"
    if name.startswith(VISION):
        return f"model.{THRICE}visual.{name.removeprefix(VISION)}"
    return name if name.startswith("mtp.") else THRICE + name


def write_tiny(
    folder: Path,
    *,
    shards: int = 1,
    mtp: bool = True,
    prefix: bool = False,
    float32: bool = True,
    seed: int = 0,
    **config_options: Any,
) -> Path:
    """Write a whole checkpoint into `folder`; see `tiny_config` and `tiny_tensors`."""
    config = tiny_config(mtp=mtp, **config_options)
    tensors = tiny_tensors(config, mtp=mtp, prefix=prefix, float32=float32, seed=seed)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", {"eos_token_id": [2, 3]})
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "Qwen2Tokenizer"})
    write_json(folder / "tokenizer.json", tiny_tokenizer())
    if "vision_config" in config:
        write_json(
            folder / "preprocessor_config.json",
            {"image_processor_type": "Qwen2VLImageProcessor", "patch_size": 4, "merge_size": 2},
        )
    (folder / "chat_template.jinja").write_text("{{ messages }}\n")
    write_shards(folder, tensors, shards)
    return folder


def write_shards(folder: Path, tensors: Mapping[str, Tensor], shards: int) -> None:
    """One `model.safetensors`, or several shards and their index."""
    if shards == 1:
        write_safetensors(folder / "model.safetensors", tensors)
        return
    names = list(tensors)
    weight_map = {}
    for index in range(shards):
        file = f"model-{index + 1:05}-of-{shards:05}.safetensors"
        mine = names[index::shards]
        write_safetensors(folder / file, {name: tensors[name] for name in mine})
        weight_map |= dict.fromkeys(mine, file)
    write_json(folder / INDEX_NAME, {"weight_map": weight_map})


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A shard of `tensors`, in their order."""
    specs = [(name, TensorSpec(item.dtype, item.shape)) for name, item in tensors.items()]
    header = encode_header(specs, {"format": "pt"})
    path.write_bytes(header + b"".join(item.data for item in tensors.values()))


def write_raw(path: Path, header: object, data: bytes = b"", *, length: int | None = None) -> None:
    """A shard with any header: bytes as they are, or what JSON makes of anything else."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + data)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a shard, read without the code under test."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    table, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    table.pop("__metadata__", None)
    return {
        name: Tensor(item["dtype"], tuple(item["shape"]), data[slice(*item["data_offsets"])])
        for name, item in table.items()
    }


def read_all_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of every shard in `folder`."""
    shards = sorted(folder.glob("*.safetensors"))
    return {name: item for shard in shards for name, item in read_safetensors(shard).items()}


def linears(config: Mapping[str, Any]) -> Iterable[str]:
    """Canonical names of the weights that are quantized, the embedding included."""
    for fact in architecture_of(config, "tiny").tensors.values():
        if fact.role in (Role.LINEAR, Role.EMBEDDING) and fact.part is not Part.MTP:
            yield fact.name


def write_json(path: Path, value: object) -> None:
    """`value` as a JSON file."""
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """The value of a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below `folder` by its relative path."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
