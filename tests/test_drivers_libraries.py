"""Layers of several families, as llm-compressor and auto-round quantize them in whole models."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from driving import Checkpoint, tokens
from oneshot import run_oneshot
from torch import Tensor
from zoo import FAMILIES, write_zoo

from carnice_build.backends.awq import AwqSettings, apply_smoothing, offset_norms, smooth_layer
from carnice_build.backends.compressed import quantize_module
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
