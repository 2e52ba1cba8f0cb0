"""Smoothing against the same expressions in torch, as llm-compressor has them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from carnice_build.kernels.smoothing import divide_rows, multiply_columns, smooth_gain
from carnice_build.models.base import SmoothingMapping
from carnice_build.models.smoothing import mappings_of_layer

Array = np.ndarray[Any, Any]

TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
BITS = {"BF16": torch.int16, "F16": torch.int16, "F32": torch.int32}
STORAGE = {"BF16": "uint16", "F16": "float16", "F32": "float32"}
all_finite = -1
"""What a kernel returns that met no NaN and no Inf."""

every_dtype = pytest.mark.parametrize("dtype", TORCH)
seeds = st.integers(0, 2**32 - 1)


def array(tensor: torch.Tensor, dtype: str) -> Array:
    """The tensor as the project's arrays carry it."""
    return tensor.contiguous().view(BITS[dtype]).numpy().view(STORAGE[dtype])


def equal(expected: torch.Tensor, actual: Array, dtype: str) -> bool:
    """Whether every bit is the same."""
    return array(expected, dtype).tobytes() == actual.tobytes()


def random_case(seed: int, *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Values, and scales over several powers of two on either side of one."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator)
    scales = torch.randn(max(shape), generator=generator, dtype=torch.float64).mul(2).exp()
    return values, scales


@every_dtype
@given(seed=seeds, rows=st.integers(1, 5), columns=st.integers(1, 40))
def test_columns_are_multiplied_as_in_torch(dtype: str, seed: int, rows: int, columns: int) -> None:
    """A product with scales in float64, assigned to a weight, has the bits that torch gives it."""
    values, scales = random_case(seed, rows, columns)
    weight, scales = values.to(TORCH[dtype]), scales[:columns]
    source = array(weight, dtype)
    out = np.empty_like(source)

    assert all_finite == multiply_columns(source, dtype, scales.numpy(), out)
    assert equal(weight.clone().copy_(weight * scales.view(1, -1)), out, dtype)


@every_dtype
@given(seed=seeds, rows=st.integers(1, 40), columns=st.integers(1, 5))
def test_rows_are_divided_as_in_torch(dtype: str, seed: int, rows: int, columns: int) -> None:
    """A division in place by scales in float64 has the bits that torch gives it."""
    values, scales = random_case(seed, rows, columns)
    weight, scales = values.to(TORCH[dtype]), scales[:rows]
    source = array(weight, dtype)
    out = np.empty_like(source)

    assert all_finite == divide_rows(source, dtype, scales.numpy(), out)
    assert equal(weight.clone().div_(scales.view(-1, 1)), out, dtype)


@every_dtype
@given(seed=seeds, size=st.integers(1, 40))
def test_a_gain_is_divided_as_in_torch(dtype: str, seed: int, size: int) -> None:
    """A norm's weight, which has no columns, is divided as a matrix of one column would be."""
    values, scales = random_case(seed, size)
    weight = values.to(TORCH[dtype])
    source = array(weight, dtype)
    out = np.empty_like(source)

    assert all_finite == divide_rows(source, dtype, scales.numpy(), out)
    assert equal(weight.clone().div_(scales), out, dtype)


@every_dtype
@pytest.mark.parametrize("smoothed", [False, True], ids=["untouched", "smoothed"])
@given(seed=seeds, size=st.integers(1, 40))
def test_rounded_gains_are_those_of_the_library(
    dtype: str, smoothed: bool, seed: int, size: int
) -> None:
    """A norm that went through `CalibrationOffsetNorm` and back has the same stored weight."""
    from llmcompressor.modeling.offset_norm import CalibrationOffsetNorm

    values, scales = random_case(seed, size)
    norm = torch.nn.RMSNorm(size, eps=1e-6, dtype=TORCH[dtype])
    norm.weight.data = values.to(TORCH[dtype])
    source = array(norm.weight.data, dtype)
    out = np.empty_like(source)
    divisor = scales.numpy() if smoothed else None

    assert all_finite == smooth_gain(source, dtype, divisor, False, out)

    replacement = CalibrationOffsetNorm(norm, config=None)
    if smoothed:
        replacement.weight.data.div_(scales)
    assert equal(replacement.restore(norm).weight.data, out, dtype)


@every_dtype
@given(seed=seeds, size=st.integers(1, 40))
def test_exact_gains_are_off_by_one_rounding(dtype: str, seed: int, size: int) -> None:
    """An exact gain differs from (1 + w) / s by the rounding of w and a few steps of float32."""
    values, scales = random_case(seed, size)
    weight = values.to(TORCH[dtype])
    source = array(weight, dtype)
    out = np.empty_like(source)

    assert all_finite == smooth_gain(source, dtype, scales.numpy(), True, out)

    gain = (1 + weight.double()) / scales
    stored = torch.from_numpy(out.view(f"int{8 * out.itemsize}")).view(TORCH[dtype]).double()
    step = torch.finfo(TORCH[dtype]).eps * (gain - 1).abs() / 2
    smallest = torch.finfo(TORCH[dtype]).smallest_normal
    assert ((1 + stored - gain).abs() <= step + 2**-22 * (1 + gain.abs()) + smallest).all()


@every_dtype
def test_an_exact_gain_that_nothing_smooths_stays(dtype: str) -> None:
    """Without scales and without rounding the stored weight keeps its bits."""
    source = array(random_case(1, 1000)[0].to(TORCH[dtype]), dtype)
    out = np.empty_like(source)

    assert all_finite == smooth_gain(source, dtype, None, True, out)
    assert source.tobytes() == out.tobytes()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_found(value: float) -> None:
    """The flat index of the first one is returned."""
    weight = np.ones((3, 4), np.float32)
    weight[1, 2] = value
    gain = weight[1].copy()

    assert 6 == multiply_columns(weight, "F32", np.ones(4), np.empty_like(weight))
    assert 6 == divide_rows(weight, "F32", np.ones(3), np.empty_like(weight))
    assert 2 == smooth_gain(gain, "F32", None, False, np.empty_like(gain))


def test_rows_may_be_given_in_any_blocks() -> None:
    """More weights than one block holds give the same as their halves, in place too."""
    values, _ = random_case(2, 9)
    weight = np.tile(values.numpy(), (200_000, 1))
    scales = np.linspace(0.5, 2, 9)
    whole, halves = np.empty_like(weight), weight.copy()
    multiply_columns(weight, "F32", scales, whole)
    for half in (halves[:77_777], halves[77_777:]):
        multiply_columns(half, "F32", scales, half)

    assert whole.tobytes() == halves.tobytes()


def test_scales_must_fit() -> None:
    """Scales of another number than the channels are refused."""
    weight = np.ones((3, 4), np.float32)

    with pytest.raises(ValueError, match="scales is float64"):
        multiply_columns(weight, "F32", np.ones(3), np.empty_like(weight))
    with pytest.raises(ValueError, match="scales is float64"):
        divide_rows(weight, "F32", np.ones(4), np.empty_like(weight))


def test_a_mapping_needs_all_its_modules_and_one_that_is_quantized() -> None:
    """Mappings of another kind of layer, and those that nothing would gain by, are left out.

    What is smoothed may be quantized as well; by its rounding no scale is chosen.
    """
    attention = SmoothingMapping("norm1", ("q", "k"))
    mlp = SmoothingMapping("norm2", ("up",))
    down = SmoothingMapping("up", ("down",))
    mappings = [attention, mlp, down]
    modules = ["norm1", "q", "norm2", "up", "down"]

    assert [mlp, down] == list(mappings_of_layer(mappings, modules, ["q", "up", "down"]))
    assert [mlp] == list(mappings_of_layer(mappings, modules, ["q", "up"]))
    assert [] == list(mappings_of_layer(mappings, modules, ["q"]))
