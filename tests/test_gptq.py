"""GPTQ one decoder layer at a time, against llm-compressor's `oneshot` on the whole model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from demo_model import CONFIG, KINDS, layer_tensors, weights
from oneshot import WEIGHTS, run_gptq, samples
from qwen import BODY
from test_awq import FULL, differing, quantized
from torch import Tensor

from carnice_build.backends.compressed import WeightScheme
from carnice_build.backends.gptq import (
    GptqSettings,
    NonFiniteInput,
    dequantize,
    gather_hessians,
    pass_on,
    quantize,
)
from carnice_build.calibration.driver import Arithmetic, LayerDriver
from carnice_build.errors import BackendError
from carnice_build.formats.compressed_tensors.gptq_ops import comes_back

SHARING = [
    ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    ["self_attn.o_proj"],
    ["mlp.gate_proj", "mlp.up_proj"],
    ["mlp.down_proj"],
]
LAYERS = len(KINDS)


@dataclass(frozen=True)
class Case:
    """What is other than in `WEIGHTS`, and the knobs of the library's modifier."""

    weights: Mapping[str, Any] = field(default_factory=dict)
    knobs: Mapping[str, Any] = field(default_factory=dict)
    propagate_error: bool = True

    @property
    def settings(self) -> GptqSettings:
        stated = {**WEIGHTS, **self.weights}
        names = ("num_bits", "group_size", "strategy", "symmetric")
        scheme = WeightScheme(**{name: stated[name] for name in names})
        return GptqSettings(scheme, stated.get("observer", "memoryless_minmax"), **self.knobs)


CHANNEL = {"strategy": "channel", "group_size": None}
CASES = {"as the recipe": Case({"observer": "mse"})}
OTHERS = {
    "w8a16": Case({**CHANNEL, "num_bits": 8, "symmetric": True, "observer": "mse"}),
    "as they were": Case({"observer": "mse"}, propagate_error=False),
    "symmetric": Case(
        {"symmetric": True, "group_size": 32, "observer": "memoryless_minmax"},
        {"actorder": "weight", "block_size": 48, "dampening_frac": 0.1},
    ),
    "channel": Case({**CHANNEL, "observer": "memoryless_minmax"}, {"actorder": None}),
    "3 bits": Case({"num_bits": 3, "symmetric": True, "observer": "memoryless_minmax"}),
    "asymmetric 5 bits": Case({"num_bits": 5, "group_size": 64, "observer": "mse"}),
    "asymmetric 6 bits": Case({"num_bits": 6, "observer": "memoryless_minmax"}),
    "asymmetric 8 bits": Case({"num_bits": 8, "observer": "mse"}, {"actorder": None}),
}
"""What of the library's offer recipes and `GptqSettings` can ask for."""


def driver(layer: int) -> LayerDriver:
    return LayerDriver(CONFIG, layer, Arithmetic("bfloat16", "eager", threads=1))


def sharing(layer: int) -> list[list[str]]:
    """The linears that the published recipe quantizes, those together that read one input."""
    chosen = quantized(layer)
    return [group for names in SHARING if (group := [n for n in names if n in chosen])]


def hessians(
    layer: int, inputs: Sequence[Tensor], groups: Sequence[Sequence[str]] | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    """Those of a layer's groups, and what the layer makes of its inputs."""
    outputs: list[Tensor] = []
    found = gather_hessians(
        driver(layer),
        layer_tensors(layer),
        sharing(layer) if groups is None else groups,
        inputs,
        lambda _, output: outputs.append(output),
    )
    return found, outputs


def embedded() -> list[Tensor]:
    """The first layer's inputs."""
    return [weights()[f"{BODY}embed_tokens.weight"][ids][None] for ids in samples()]


def passed(layer: int, tensors: Mapping[str, Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    """What a layer with these tensors makes of its inputs."""
    outputs: list[Tensor] = []
    pass_on(driver(layer), tensors, inputs, lambda _, output: outputs.append(output))
    return outputs


def walk(case: Case) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The tensors on disk of each linear, by its module path."""
    inputs = embedded()
    for layer in range(LAYERS):
        tensors = {name: tensor.clone() for name, tensor in layer_tensors(layer).items()}
        found, outputs = hessians(layer, inputs)
        for names, hessian in zip(sharing(layer), found, strict=True):
            for name in names:
                made = quantize(tensors[f"{name}.weight"], hessian.clone(), case.settings)
                assert not made.nearest
                tensors[f"{name}.weight"] = made.weight
                if comes_back(case.settings.scheme.num_bits):
                    again = dequantize(made.tensors, case.settings.scheme)
                    assert torch.equal(made.weight, again)
                yield f"{BODY}layers.{layer}.{name}", made.tensors
        inputs = passed(layer, tensors, inputs) if case.propagate_error else outputs


@pytest.mark.parametrize(
    "case",
    [
        *(pytest.param(case, id=name) for name, case in CASES.items()),
        *(pytest.param(case, id=name, marks=pytest.mark.wide) for name, case in OTHERS.items()),
    ],
)
def test_every_linear_of_oneshot_is_made_layer_by_layer(case: Case, tmp_path: Path) -> None:
    """Codes, scales and zero points of all layers are equal, bit for bit.

    Whichever the scheme, and whichever outputs the next layer is calibrated with.
    """
    reference = run_gptq(case.weights, tmp_path, propagate_error=case.propagate_error, **case.knobs)
    actual = {
        f"{module}.{end}": tensor
        for module, tensors in walk(case)
        for end, tensor in tensors.items()
    }
    modules = {name.rpartition(".")[0] for name in actual}
    expected = {
        name: tensor
        for name, tensor in reference.written.items()
        if name.rpartition(".")[0] in modules
    }

    assert 32 == len(modules)
    assert [] == differing(expected, actual)


# --- bad input -----------------------------------------------------------------------------------

WEIGHT, SETTINGS = "mlp.up_proj.weight", CASES["as the recipe"].settings


def test_a_hessian_without_an_inverse_rounds_to_nearest_and_says_so() -> None:
    """As the library does; each weight is then within half a step of its own value."""
    weight = layer_tensors(0)[WEIGHT]
    made = quantize(weight.clone(), -torch.eye(weight.shape[1]), SETTINGS)
    off = (dequantize(made.tensors, SETTINGS.scheme).float() - weight.float()).abs()
    steps = made.tensors["weight_scale"].float().repeat_interleave(128, dim=1)
    inside = weight.float().abs() < 3 * steps

    assert made.nearest
    assert (off / steps)[inside].max() < 0.52


def test_a_hessian_that_overflows_is_an_error() -> None:
    """Sums of squares may, though no input does; the library ends there in one of torch's."""
    weight = layer_tensors(0)[WEIGHT]
    hessian = torch.eye(weight.shape[1])
    hessian[3, 3] = torch.inf

    with pytest.raises(BackendError, match="finds no inverse"):
        quantize(weight.clone(), hessian, SETTINGS)


def test_a_column_that_is_given_nothing_becomes_zero() -> None:
    """As in the library: whatever stands there is never multiplied by anything."""
    weight = layer_tensors(0)[WEIGHT]
    hessian = torch.eye(weight.shape[1])
    hessian[5, 5] = 0
    made = quantize(weight.clone(), hessian, SETTINGS)
    result = dequantize(made.tensors, SETTINGS.scheme)

    assert not made.nearest
    assert weight[:, 5].any()
    assert not result[:, 5].any()
    assert result[:, 4].any()


def test_hidden_states_that_are_not_finite_name_their_linear_and_sample() -> None:
    """Where the library would round to nearest without a word about why."""
    inputs = embedded()
    inputs[1][0, 0, 0] = torch.nan

    with pytest.raises(NonFiniteInput) as error:
        hessians(0, inputs)

    assert ("mlp.up_proj", 1) == (error.value.linear.replace("gate", "up"), error.value.index)


def test_linears_that_are_said_to_share_an_input_must_do_so() -> None:
    """One Hessian for both would be that of another input: a table that is wrong ends here."""
    with pytest.raises(BackendError, match=r"o_proj is given something else than self_attn.q"):
        hessians(FULL, embedded(), [["self_attn.q_proj", "self_attn.o_proj"]])


def test_a_pass_leaves_its_tensors_alone_and_nothing_is_printed(
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The layer's weights are as before, and the library's bars and logs stay within."""
    before = {name: tensor.clone() for name, tensor in layer_tensors(FULL).items()}
    (hessian, *_), _ = hessians(FULL, embedded())
    quantize(before["self_attn.q_proj.weight"].clone(), hessian, SETTINGS)

    assert [] == differing(before, layer_tensors(FULL))
    assert ("", "") == capfd.readouterr()
