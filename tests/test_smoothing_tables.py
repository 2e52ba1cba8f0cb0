"""Where tables say that AWQ may smooth: no layer computes anything else then."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from driving import Checkpoint
from families import TABLED
from test_tables import merged
from tiny import read_json
from torch import Tensor
from zoo import FAMILIES, write_zoo

from carnice_build.backends.awq import AwqSettings, apply_smoothing
from carnice_build.backends.compressed_layer import offset_norms
from carnice_build.calibration.driver import Arithmetic, LayerDriver
from carnice_build.models import architecture_of
from carnice_build.models.base import Architecture
from carnice_build.models.smoothing import mappings_of_layer

PLAIN = {
    "num_key_value_heads": 4,
    "attention_bias": True,
    "mlp_bias": True,
}
"""As many keys as queries, for values to be smoothed, and biases where a family has any."""


def as_facts(
    tensors: dict[str, Tensor], architecture: Architecture, layer: int
) -> dict[str, Tensor]:
    """A layer's tensors in float32, experts that come in one tensor as the stacks that it holds."""
    prefix = architecture.layer_prefix(layer)
    given = {prefix + name: tensor.float() for name, tensor in tensors.items()}
    found = dict(given)
    for fact in architecture.tensors.values():
        holders = fact.fused.names if fact.layer == layer and fact.fused else ()
        for holder in given.keys() & set(holders):
            whole = given[holder]
            if holder == fact.fused.turned:
                whole = whole.transpose(1, 2)
            first, stop, step = fact.fused.rows(fact.shape[1])
            found.pop(holder, None)
            found[fact.name] = whole[:, first:stop:step].contiguous()
    return {name.removeprefix(prefix): tensor for name, tensor in found.items()}


@pytest.mark.parametrize("family", [name for name in TABLED if name != "gemma4"])
def test_a_smoothed_layer_computes_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    """Outputs are divided by random factors, and whatever reads them is multiplied.

    Layers of a dense Gemma 4 cannot be run by themselves.
    """
    entry = FAMILIES[family]
    nested = "text_config" in entry.config
    more: dict[str, Any] = {"text_config": PLAIN} if nested else PLAIN
    if family in ("phi3", "gpt_oss", "deepseek_v3"):
        more = {"num_key_value_heads": 4}
    monkeypatch.setitem(FAMILIES, family, replace(entry, config=merged(entry.config, more)))
    checkpoint = Checkpoint(write_zoo(tmp_path / "source", family))
    architecture = architecture_of(read_json(checkpoint.folder / "config.json"), family)
    how = Arithmetic("float32", "eager", threads=1)
    random = torch.Generator().manual_seed(0)
    tried = set()
    for layer in range(checkpoint.layers):
        tensors = as_facts(checkpoint.layer(layer), architecture, layer)
        modules = {name.rpartition(".")[0] for name in tensors}
        driver = LayerDriver(architecture.text_config, layer, how)
        norms = offset_norms(driver.layer(tensors))
        hidden = torch.randn(1, 9, 256, generator=random)
        mappings = list(mappings_of_layer(architecture.smoothing, modules, modules))
        tried |= {mapping.smooth for mapping in mappings}
        scales = {}
        for mapping in mappings:
            divided = tensors[f"{mapping.smooth}.weight"].shape
            size = *divided[:-2], tensors[f"{mapping.balance[0]}.weight"].shape[-1]
            scales[mapping.smooth] = (torch.rand(size, generator=random) + 0.5).double()
        settings = AwqSettings(tuple(mappings), norms="exact")
        smoothed = apply_smoothing(tensors, scales, settings, norms)
        before = driver.run(driver.layer(tensors), hidden)
        after = driver.run(driver.layer(smoothed), hidden)

        assert torch.allclose(before, after, rtol=1e-3, atol=1e-4), (layer, mappings)
    assert tried == {mapping.smooth for mapping in architecture.smoothing}
