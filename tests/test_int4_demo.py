"""The INT4 checkpoint in `demo/` is the base, quantized by AutoRound as the published one is."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from demo_model import BASE, weights
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from carnice_build.kernels.autoround import dequantize_rows, unpack_rows

INT4 = BASE.parent / "qwen3.6-27b-int4-autoround"
SUFFIXES = {"qweight": torch.int32, "qzeros": torch.int32, "scales": torch.float16}


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def tensors() -> Mapping[str, Tensor]:
    """Every tensor of the checkpoint."""
    shards = sorted(INT4.glob("*.safetensors"))
    return {name: tensor for shard in shards for name, tensor in load_file(shard).items()}


def packed_modules(tensors: Mapping[str, Tensor]) -> list[str]:
    return [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]


def test_it_is_small() -> None:
    """It takes 3.1 MB at most."""
    assert sum(path.stat().st_size for path in INT4.iterdir()) <= 3.1e6


def test_the_mtp_head_has_29_tensors(tensors: Mapping[str, Tensor]) -> None:
    """Seven projections of its layer are packed, in three tensors each, beside 8 BF16 tensors."""
    head = {name: tensor.dtype for name, tensor in tensors.items() if name.startswith("mtp.")}

    assert 29 == len(head)
    assert 7 == len([module for module in packed_modules(tensors) if module.startswith("mtp.")])
    assert 8 == list(head.values()).count(torch.bfloat16)
    assert torch.bfloat16 == head["mtp.fc.weight"]


def test_every_other_tensor_is_the_bases(tensors: Mapping[str, Tensor]) -> None:
    """What is not packed has the base's name, type and bytes: the vision tower, for one."""
    packed = packed_modules(tensors)
    rest = {n: t for n, t in tensors.items() if n.rpartition(".")[0] not in packed}

    assert weights().keys() == rest.keys() | {f"{module}.weight" for module in packed}
    assert all(torch.equal(weights()[name], tensor) for name, tensor in rest.items())


def test_the_config_says_what_is_packed(tensors: Mapping[str, Tensor]) -> None:
    """The packed linears are those of the blocks that it names but for those that it excepts."""
    config = read_json(INT4 / "config.json")
    quantization = config.pop("quantization_config")
    blocks = tuple(f"{block}." for block in quantization["block_name_to_quantize"].split(","))
    matrices = [
        name.removesuffix(".weight")
        for name, tensor in weights().items()
        if name.startswith(blocks) and tensor.ndim == 2
    ]
    excepted = quantization["extra_config"]

    assert read_json(BASE / "config.json") == config
    assert {m for m in matrices if m not in excepted} == set(packed_modules(tensors))
    assert {f"{module}.weight" for module in excepted} <= tensors.keys()
    assert {16} == {entry["bits"] for entry in excepted.values()}
    assert ("auto-round", "auto_round:auto_gptq", 4, 128, True) == tuple(
        quantization[key] for key in ("quant_method", "packing_format", "bits", "group_size", "sym")
    )


def test_the_index_matches_the_shards() -> None:
    """The index names each tensor once, in the shard that holds it."""
    index = read_json(INT4 / "model.safetensors.index.json")["weight_map"]
    held = {name: path.name for path in INT4.glob("*.safetensors") for name in load_file(path)}

    assert held == index


def unpacked(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
    """Module, codes 0..15, scales and weights [out, in] of every packed linear."""
    for module in packed_modules(tensors):
        parts = {part: tensors[f"{module}.{part}"] for part in SUFFIXES}
        assert SUFFIXES == {part: tensor.dtype for part, tensor in parts.items()}
        qweight, qzeros, scales = (tensor.numpy() for tensor in parts.values())
        shape = weights()[f"{module}.weight"].shape
        codes, weight = np.empty(shape, np.uint8), np.empty(shape, np.float32)
        unpack_rows(qweight, 0, codes)
        dequantize_rows(qweight, qzeros, scales, 0, weight)
        scale = parts["scales"].T.float().repeat_interleave(128, dim=1)
        yield module, torch.from_numpy(codes), scale, torch.from_numpy(weight)


def test_its_rounding_is_learnt(tensors: Mapping[str, Tensor]) -> None:
    """Codes have moved by one from the nearest on their scale, 3 to 30 in 100 of each layer."""
    moved: dict[str, list[Tensor]] = {}
    for module, codes, scale, _ in unpacked(tensors):
        nearest = (weights()[f"{module}.weight"] / scale).round().clamp(-8, 7) + 8
        layer = module.partition(".layers.")[0] + module.partition(".layers.")[2].split(".")[0]
        moved.setdefault(layer, []).append((codes - nearest).abs().flatten())

    assert 9 == len(moved)
    for steps in map(torch.cat, moved.values()):
        assert {0.0, 1.0} == set(steps.unique().tolist())
        assert 0.03 < steps.mean().item() < 0.3


def test_its_weights_are_near_the_bases(tensors: Mapping[str, Tensor]) -> None:
    """On average a weight is 0.22 to 0.35 steps from the base's; a quarter is that of rounding."""
    for module, _, scale, weight in unpacked(tensors):
        steps = (weights()[f"{module}.weight"] - weight) / scale
        assert 0.22 < steps.abs().mean().item() < 0.35, module


def test_transformers_runs_it() -> None:
    """auto-round's loader finds every tensor, and text costs hardly more than with the base."""
    base = AutoModelForCausalLM.from_pretrained(BASE)
    model, report = AutoModelForCausalLM.from_pretrained(INT4, output_loading_info=True)
    tokenizer = AutoTokenizer.from_pretrained(INT4)
    text = (BASE.parent / "heldout.txt").read_text(encoding="utf-8")[:20_000]
    sample = torch.tensor([tokenizer.encode(text)[:512]])
    with torch.no_grad():
        whole, quantized = (each(input_ids=sample, labels=sample) for each in (base, model))

    assert "QuantLinear" == type(model.model.layers[0].mlp.up_proj).__name__
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert quantized.logits.isfinite().all()
    assert abs(quantized.loss - whole.loss) < 0.05
