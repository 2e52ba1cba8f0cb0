"""A text model run one decoder layer at a time, against transformers' whole model and modelopt."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping

import numpy as np
import pytest
import torch
from demo_model import CONFIG, KINDS, layer_tensors, sample, source, weights, whole_model
from qwen import BODY
from torch import Tensor

from carnice_build.backends.tensors import as_data, as_tensor
from carnice_build.calibration.driver import Arithmetic, LayerDriver
from carnice_build.calibration.text_model import OpenModel
from carnice_build.calibration.watch import NonFiniteInput, seen_inputs
from carnice_build.graph import TensorData

SAMPLES = [sample(length, seed=length) for length in (64, 67)]
"""One is a whole chunk of the delta rule, one is not."""

every_arithmetic = pytest.mark.parametrize(
    ("dtype", "attention"),
    [(dtype, attention) for dtype in ("bfloat16", "float32") for attention in ("sdpa", "eager")],
)


def layerwise(dtype: str, attention: str) -> OpenModel:
    return OpenModel(source(), Arithmetic(dtype, attention, threads=1))


def driver(layer: int) -> LayerDriver:
    return LayerDriver(CONFIG, layer, Arithmetic("bfloat16", "sdpa", threads=1))


def embedded(tokens: Tensor) -> Tensor:
    return weights()[f"{BODY}embed_tokens.weight"][tokens][None]


def hidden_states(model: OpenModel, tokens: Tensor) -> Iterator[Tensor]:
    """The input of every layer, then the last one's output."""
    (state,) = model.embedded([tokens])
    yield state.hidden
    for index in range(len(KINDS)):
        state = model.layer(index)(state)
        yield state.hidden


@every_arithmetic
def test_hidden_states_and_logits_are_those_of_the_whole_model(dtype: str, attention: str) -> None:
    """Every hidden state and every logit has the bits that transformers' model gives."""
    model = layerwise(dtype, attention)
    whole = whole_model(dtype, attention)
    ending = model.ending()
    for tokens in SAMPLES:
        with torch.no_grad():
            expected = whole(tokens[None], use_cache=False, output_hidden_states=True)

        *inputs, last = hidden_states(model, tokens)

        # transformers reports the last state after the final norm.
        for theirs, ours in zip(
            expected.hidden_states, [*inputs, ending.states(last)], strict=True
        ):
            assert torch.equal(theirs, ours)
        assert torch.equal(expected.logits, ending.scores(ending.states(last)))


@every_arithmetic
def test_no_position_sees_a_later_one(dtype: str, attention: str) -> None:
    """Other tokens at the end leave the hidden states before them as they were."""
    model = layerwise(dtype, attention)
    tokens = SAMPLES[0]
    changed = torch.cat([tokens[:40], tokens[40:].flip(0)])

    *_, before = hidden_states(model, tokens)
    *_, after = hidden_states(model, changed)

    assert torch.equal(before[:, :40], after[:, :40])


def test_a_layer_takes_exactly_its_own_tensors() -> None:
    """A tensor too few or too many is refused, and named."""
    layers = driver(0)
    tensors = layer_tensors(0)
    lacking = {name: tensor for name, tensor in tensors.items() if name != "mlp.up_proj.weight"}

    with pytest.raises(RuntimeError, match=r"mlp\.up_proj\.weight"):
        layers.layer(lacking)
    with pytest.raises(RuntimeError, match=r"extra\.weight"):
        layers.layer({**tensors, "extra.weight": torch.ones(1)})


@pytest.fixture(scope="module")
def modelopt_amax() -> Mapping[str, float]:
    """`input_quantizer.amax` of every enabled linear after modelopt's calibration."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import modelopt.torch.quantization as mtq

        whole = whole_model("bfloat16", "sdpa")

        def calibrate(model: torch.nn.Module) -> None:
            for tokens in SAMPLES:
                model(tokens[None], use_cache=False)

        mtq.quantize(whole, mtq.NVFP4_DEFAULT_CFG, calibrate)
    return {
        name: module.input_quantizer.amax.item()
        for name, module in whole.model.layers.named_modules()
        if hasattr(module, "input_quantizer") and module.input_quantizer.is_enabled
    }


def test_seen_inputs_is_what_modelopt_calibrates(modelopt_amax: Mapping[str, float]) -> None:
    """The largest input of every linear that modelopt's NVFP4 enables has modelopt's bits."""
    found = {}
    hidden = [embedded(tokens) for tokens in SAMPLES]
    for index in range(len(KINDS)):
        layers, tensors = driver(index), layer_tensors(index)
        layer = layers.layer(tensors)
        with seen_inputs(layer, layers.owners(tensors)) as seen:
            hidden = [layers.run(layer, sample) for sample in hidden]
        found |= {f"{index}.{name}": value for name, value in seen.amax.items()}

    assert 50 == len(modelopt_amax)
    assert modelopt_amax == {name: found[name] for name in modelopt_amax}


def test_seen_inputs_leaves_the_layer_as_it_was() -> None:
    """After the context, passes are no longer watched."""
    layers = driver(0)
    layer = layers.layer(layer_tensors(0))
    with seen_inputs(layer, layers.owners(layer_tensors(0))) as seen:
        pass

    layers.run(layer, embedded(SAMPLES[0]))

    assert {} == seen.amax


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_seen_inputs_names_the_linear_that_meets_a_value_that_is_not_finite(bad: float) -> None:
    """NaN and infinity raise, with the first linear that they reach."""
    layers = driver(0)
    tensors = layer_tensors(0)
    up = tensors["mlp.up_proj.weight"].clone()
    up[3, 5] = bad
    layer = layers.layer({**tensors, "mlp.up_proj.weight": up})

    with (
        seen_inputs(layer, layers.owners(tensors)),
        pytest.raises(NonFiniteInput) as raised,
    ):
        layers.run(layer, embedded(SAMPLES[0]))

    assert "mlp.down_proj" == raised.value.linear


@pytest.mark.parametrize(
    ("dtype", "numpy_type", "torch_type"),
    [
        ("BF16", np.uint16, torch.bfloat16),
        ("F16", np.float16, torch.float16),
        ("F32", np.float32, torch.float32),
        ("F8_E4M3", np.uint8, torch.float8_e4m3fn),
        ("U8", np.uint8, torch.uint8),
        ("I32", np.int32, torch.int32),
    ],
)
def test_tensors_and_arrays_share_memory(
    dtype: str, numpy_type: type, torch_type: torch.dtype
) -> None:
    """A tensor over an array sees later writes to it, and goes back to the same memory."""
    array = np.zeros((2, 3), numpy_type)

    tensor = as_tensor(TensorData(dtype, array))
    array.view(np.uint8)[...] = 0x3C
    back = as_data(tensor)

    assert torch_type == tensor.dtype
    assert (tensor.float() != 0).all()
    assert dtype == back.dtype
    assert array.dtype == back.array.dtype
    assert np.shares_memory(array, back.array)
