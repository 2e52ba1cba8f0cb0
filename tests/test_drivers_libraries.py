"""Layers of several families, as llm-compressor and auto-round quantize them in whole models."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from auto_round import AutoRound, SignRoundConfig
from auto_round.algorithms.composer import AlgorithmComposer
from driving import Checkpoint, tokens
from oneshot import run_oneshot
from torch import Tensor
from transformers import AutoTokenizer, set_seed
from zoo import FAMILIES, TOKENIZER, write_zoo

from carnice_build.backends.autoround import AutoRoundSettings, tune_layer
from carnice_build.backends.awq import AwqSettings, apply_smoothing, smooth_layer
from carnice_build.backends.compressed import quantize_module
from carnice_build.backends.compressed_layer import offset_norms
from carnice_build.calibration.driver import Arithmetic, LayerDriver
from carnice_build.models.base import SmoothingMapping

# --- llm-compressor ------------------------------------------------------------------------------

_QKV = tuple(f"self_attn.{name}_proj" for name in "qkv")
DENSE = (
    SmoothingMapping("input_layernorm", _QKV),
    SmoothingMapping("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    SmoothingMapping("mlp.up_proj", ("mlp.down_proj",)),
)
_EXPERTS = "mlp.experts.*."
SPARSE = (
    DENSE[0],
    SmoothingMapping(
        "post_attention_layernorm",
        ("mlp.gate", f"{_EXPERTS}gate_proj", f"{_EXPERTS}up_proj"),
    ),
    SmoothingMapping(f"{_EXPERTS}up_proj", (f"{_EXPERTS}down_proj",)),
)
"""llm-compressor's mappings for these families, without v_proj, which grouped queries forbid."""


@pytest.mark.parametrize(
    ("family", "mappings"), [("llama", DENSE), ("qwen3", DENSE), ("qwen3_moe", SPARSE)]
)
def test_layers_are_smoothed_and_rounded_as_by_oneshot(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    mappings: tuple[SmoothingMapping, ...],
) -> None:
    """Every tensor of every layer has the bits that `oneshot` writes, experts among them."""
    entry = FAMILIES[family]
    # The library's own mappings want a router in every layer of a model that has one.
    monkeypatch.setitem(
        FAMILIES, family, replace(entry, config={**entry.config, "mlp_only_layers": []})
    )
    checkpoint = Checkpoint(write_zoo(tmp_path / "source", family))
    how = Arithmetic("bfloat16", "eager", threads=1)
    samples = [tokens(length) for length in (67, 64, 40)]
    model = checkpoint.whole(how)
    _with_masks(type(model), monkeypatch)
    (layer_class,) = model._no_split_modules
    theirs = run_oneshot("mse", tmp_path / "theirs", samples, model, layer_class).written

    settings = AwqSettings(mappings)
    ours: dict[str, Tensor] = {}
    hidden = [checkpoint.embedded(sample) for sample in samples]
    for index in range(checkpoint.layers):
        driver, tensors = LayerDriver(checkpoint.config, index, how), checkpoint.layer(index)
        linears = [n.removesuffix(".weight") for n in tensors if n.endswith("_proj.weight")]
        made: dict[int, Tensor] = {}
        given = [driver.enter(state) for state in hidden]
        scales = smooth_layer(driver, tensors, linears, given, settings, made.__setitem__)
        hidden = [made[number] for number in range(len(samples))]
        norms = offset_norms(driver.layer(tensors))
        for name, tensor in apply_smoothing(tensors, scales, settings, norms).items():
            ours |= dict(_written(f"model.layers.{index}.{name}", tensor, settings))

    in_layers = {name: tensor for name, tensor in theirs.items() if ".layers." in name}
    assert in_layers.keys() == ours.keys()
    assert [] == [name for name in in_layers if not torch.equal(in_layers[name], ours[name])]


def _with_masks(model_class: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the library's tracer from losing the mask of a model that chooses between two.

    Its Qwen3-MoE would be calibrated with eager attention and no mask, which is not causal.
    """
    module: Any = sys.modules[model_class.__module__]
    create = module.create_causal_mask
    monkeypatch.setattr(module, "create_causal_mask", lambda **arguments: create(**arguments))


def _written(name: str, tensor: Tensor, settings: AwqSettings) -> Iterator[tuple[str, Tensor]]:
    """What stands on disk of a smoothed tensor."""
    module = name.removesuffix(".weight")
    if "*" in name:
        for number, part in enumerate(tensor):
            yield from _written(name.replace("*", str(number)), part, settings)
    elif module.endswith("_proj"):
        for end, part in quantize_module(tensor, "mse", settings.scheme).items():
            yield f"{module}.{end}", part
    else:
        yield name, tensor


# --- auto-round ----------------------------------------------------------------------------------

TEXTS, LENGTH = 4, 32


@pytest.fixture
def switches() -> Iterator[None]:
    """Sets back what the library's constructor switches on."""
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    "family",
    ["qwen3", *(pytest.param(name, marks=pytest.mark.wide) for name in ("llama", "qwen3_moe"))],
)
def test_blocks_are_tuned_as_in_a_run_of_the_whole_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, switches: None, family: str
) -> None:
    """Weights and scales of the first two layers, each expert's, when every layer draws anew."""
    compress = AlgorithmComposer.compress_block

    def compress_anew(self: AlgorithmComposer, *args: Any, **options: Any) -> Any:
        set_seed(42)
        return compress(self, *args, **{**options, "input_ids": None})

    monkeypatch.setattr(AlgorithmComposer, "compress_block", compress_anew)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setenv("AR_DISABLE_DATASET_SUBPROCESS", "1")
    entry = FAMILIES[family]
    monkeypatch.setitem(
        FAMILIES, family, replace(entry, config={**entry.config, "num_hidden_layers": 2})
    )
    checkpoint = Checkpoint(write_zoo(tmp_path / "source", family))
    settings = AutoRoundSettings(iters=4, lr=0.03, batch_size=2)
    how = Arithmetic("bfloat16", "sdpa", threads=1)
    model = checkpoint.whole(how)
    rows: list[Tensor] = []
    model.get_input_embeddings().register_forward_hook(
        lambda module, inputs, output: rows.extend(output.clone().split(1))
    )
    library = AutoRound(
        model,
        tokenizer=AutoTokenizer.from_pretrained(checkpoint.folder),
        alg_configs=SignRoundConfig(iters=settings.iters, lr=settings.lr),
        dataset=str(_write_texts(tmp_path / "texts.json")),
        nsamples=TEXTS,
        seqlen=LENGTH,
        batch_size=settings.batch_size,
        enable_torch_compile=False,
        low_cpu_mem_usage=False,
    )
    quantized, _ = library.quantize()

    given, effective = rows, None
    for index in range(2):
        driver = LayerDriver(checkpoint.config, index, how)
        given = [driver.enter(state) for state in given]
        tuned = tune_layer(driver, checkpoint.layer(index), given, effective, settings)
        given, effective = tuned.outputs, tuned.quantized_outputs
        theirs = quantized.model.layers[index]
        for name, linear in tuned.linears.items():
            assert torch.equal(theirs.get_submodule(name).weight, linear.weight), name
            assert torch.equal(theirs.get_submodule(name).scale, linear.scale), name
        assert {"llama": 7, "qwen3": 7, "qwen3_moe": (7, 16)[index]}[family] == len(tuned.linears)


def _write_texts(path: Path) -> Path:
    text = (TOKENIZER.parent / "heldout.txt").read_text(encoding="utf-8")
    texts = [{"text": text[start : start + 1000]} for start in range(0, 10_000, 1000)]
    path.write_text(json.dumps(texts), encoding="utf-8")
    return path
