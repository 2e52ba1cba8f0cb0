"""Measure what a GPU does in a calibration, in the shapes of Qwen3.6-27B: seconds a decoder layer.

    python -m benchmarks.gpu [--samples 16] [--length 2048] [--iters 200]

Weights and hidden states are random and lie in memory: files are not measured, only what they
hold is brought to the GPU.
A forward pass is that of NVFP4's and FP8's calibration; AWQ's search runs each sample some sixty
times through parts of the layer; AutoRound trains the layer.
The largest memory that torch had in use on the GPU goes with each.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks.checkpoints import ROOT
from carnice_build.backends.autoround import AutoRoundSettings, tune_layer
from carnice_build.backends.awq import AwqSettings, SmoothingMapping, smooth_layer
from carnice_build.calibration.driver import Arithmetic, LayerDriver
from carnice_build.calibration.passes import Forward
from carnice_build.calibration.watch import seen_inputs
from carnice_build.commands.options import Options
from carnice_build.commands.plan import plan_variants
from carnice_build.graph import Action

VARIANT = "qwen-nvfp4-text-mtp"
DEVICE = "cuda"
GATES = ("linear_attn.in_proj_a", "linear_attn.in_proj_b")
MAPPINGS = (
    SmoothingMapping(
        "input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    ),
    SmoothingMapping("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    SmoothingMapping("mlp.up_proj", ("mlp.down_proj",)),
)


def first_layers() -> dict[str, Action]:
    """A forward pass of the 27B's plan for each kind of layer."""
    options = Options(recipes=ROOT / "recipes", profile="shapes")
    found: dict[str, Action] = {}
    for action in plan_variants([VARIANT], options).graph:
        if isinstance(action.op, Forward):
            kinds = action.params["config"]["layer_types"]
            kind = kinds[action.params["layer"]].removesuffix("_attention")
            found.setdefault(kind, action)
    return found


def weights(action: Action) -> dict[str, Tensor]:
    """Random tensors of the layer, in memory of the processor as a file would give them."""
    generator = torch.Generator().manual_seed(0)
    specs = [ref.spec for ref in action.inputs[2:]]
    return {
        name: (torch.randn(spec.shape, generator=generator) * 0.02).bfloat16()
        for name, spec in zip(action.params["names"], specs, strict=True)
    }


def timed(what: str, work: Callable[[], Any], per: int = 1) -> None:
    """A line with the seconds of `work`, divided by `per`, and the memory at its peak."""
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    torch.cuda.synchronize()
    seconds = (time.perf_counter() - start) / per
    peak = torch.cuda.max_memory_allocated() / 1e9
    print(f"{what:44}  {seconds:8.3f} s  {peak:6.1f} GB", flush=True)


def passes(action: Action, tensors: Mapping[str, Tensor], hidden: list[Tensor]) -> None:
    """The layer over all samples, one by one and together, watched as a calibration does."""
    driver = LayerDriver(
        action.params["config"], action.params["layer"], Arithmetic("bfloat16", "sdpa", 8, DEVICE)
    )
    timed("layer to the GPU", lambda: driver.layer(tensors))
    layer, owners = driver.layer(tensors), driver.owners(tensors)

    def run(batch: int, *, watched: bool) -> None:
        rows = [torch.cat(hidden[at : at + batch]) for at in range(0, len(hidden), batch)]
        for row in rows:
            if watched:
                with seen_inputs(layer, owners):
                    driver.run(layer, driver.enter(row)).cpu()
            else:
                driver.run(layer, driver.enter(row)).cpu()

    with torch.no_grad():
        run(1, watched=False)
        for batch in (1, 4, 8):
            for watched in (False, True):
                name = f"pass, {batch} at once, {'watched' if watched else 'plain'}, a sample"
                timed(name, lambda b=batch, w=watched: run(b, watched=w), len(hidden))  # type: ignore[misc]


def search(action: Action, tensors: Mapping[str, Tensor], hidden: list[Tensor]) -> None:
    """AWQ's search over the layer."""
    arithmetic = Arithmetic("bfloat16", "sdpa", 8, DEVICE)
    driver = LayerDriver(action.params["config"], action.params["layer"], arithmetic)
    quantized = [
        name.removesuffix(".weight")
        for name in tensors
        if "proj" in name and not name.startswith("linear_attn")
    ]
    states = [state.to(DEVICE) for state in hidden]
    settings = AwqSettings(MAPPINGS)
    with torch.no_grad():
        timed(
            "AWQ's search",
            lambda: smooth_layer(driver, tensors, quantized, states, settings, lambda *_: None),
        )


def tune(action: Action, tensors: Mapping[str, Tensor], hidden: list[Tensor], iters: int) -> None:
    """AutoRound on the layer."""
    settings = AutoRoundSettings(
        iters=iters,
        batch_size=8,
        layer_bits=dict.fromkeys([name for name in GATES if f"{name}.weight" in tensors], 16),
    )
    arithmetic = Arithmetic(settings.dtype, "sdpa", 8, DEVICE)
    driver = LayerDriver(action.params["config"], action.params["layer"], arithmetic)
    states = [state.to(DEVICE) for state in hidden]
    timed(
        f"AutoRound, {iters} iterations",
        lambda: tune_layer(driver, tensors, states, None, settings),
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--iters", type=int, default=200)
    arguments = parser.parse_args()
    print(torch.cuda.get_device_name(), torch.__version__)
    for kind, action in first_layers().items():
        width = action.inputs[1].spec.shape[-1]
        tensors = weights(action)
        hidden = [
            torch.randn(1, arguments.length, width).bfloat16() for _ in range(arguments.samples)
        ]
        print(f"{kind} attention, {arguments.samples} samples of {arguments.length} tokens")
        passes(action, tensors, hidden)
        search(action, tensors, hidden)
        tune(action, tensors, hidden, arguments.iters)


if __name__ == "__main__":
    main()
