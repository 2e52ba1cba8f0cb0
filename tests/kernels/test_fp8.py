"""FP8 with a scale a row against compressed-tensors and llm-compressor, the references."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from compressed_tensors.compressors import compress_module
from compressed_tensors.quantization import (
    QuantizationScheme,
    initialize_module_for_quantization,
    preset_name_to_scheme,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st
from int4_weights import (
    EXPONENT,
    PATTERN,
    STORAGE,
    Array,
    all_fine,
    any_finite,
    corners,
    finite,
    from_torch,
    ordinary,
    random_patterns,
    to_float,
    to_torch,
)
from llmcompressor.entrypoints.model_free.lifecycle import calibrate_weight
from torch import nn

from carnice_build.kernels.fp8 import dequantize_rows, quantize_rows

every_dtype = pytest.mark.parametrize("dtype", STORAGE)
SCHEME: QuantizationScheme = preset_name_to_scheme("FP8_DYNAMIC", ["Linear"])


def reference(weight: Array, dtype: str) -> list[bytes]:
    """Codes and scales as `oneshot` of llm-compressor makes them of a linear's weight.

    Its `model_free_ptq` gives no zero point, and so leaves negative zero as it is.
    """
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(to_torch(weight, dtype), requires_grad=False)
    initialize_module_for_quantization(linear, SCHEME)
    calibrate_weight(linear)
    compress_module(linear)
    codes = linear.weight.view(torch.uint8).numpy()
    return [codes.tobytes(), from_torch(linear.weight_scale.detach()).tobytes()]


def quantized(weight: Array, dtype: str) -> tuple[Array, Array]:
    codes = np.full(weight.shape, 99, np.uint8)
    scales = np.empty((weight.shape[0], 1), weight.dtype)
    assert all_fine == quantize_rows(weight, dtype, codes, scales)
    return codes, scales


def as_bytes(weight: Array, dtype: str) -> list[bytes]:
    return [array.tobytes() for array in quantized(weight, dtype)]


@every_dtype
def test_ordinary_weights_have_the_bits_of_the_library(dtype: str) -> None:
    """Weights as models have them, of a width that no vector divides."""
    weight = ordinary(dtype, (64, 199))

    assert reference(weight, dtype) == as_bytes(weight, dtype)


@every_dtype
def test_corners_have_the_bits_of_the_library(dtype: str) -> None:
    """Zeros of both signs, denormals, ties, single large weights."""
    weight = corners(dtype)

    assert reference(weight, dtype) == as_bytes(weight, dtype)


@every_dtype
def test_random_patterns_have_the_bits_of_the_library(dtype: str) -> None:
    """Values of every magnitude in one row, and rows of every magnitude."""
    weight = random_patterns(dtype, (256, 128))
    shrunk = np.concatenate(
        [finite(weight.view(PATTERN[dtype]), dtype, bound) for bound in _bounds(dtype)]
    )

    assert reference(shrunk, dtype) == as_bytes(shrunk, dtype)


def _bounds(dtype: str) -> list[int]:
    """Exponents of whole rows, from denormals to the largest."""
    mask = EXPONENT[dtype]
    step = mask & -mask
    return [step * shift for shift in range(1, mask // step + 1, max(1, mask // step // 8))]


@every_dtype
@settings(max_examples=60)
@given(data=st.data())
def test_any_finite_weight_has_the_bits_of_the_library(dtype: str, data: st.DataObject) -> None:
    """Whatever the bit patterns are."""
    weight = data.draw(any_finite(dtype, 32, 2))

    assert reference(weight, dtype) == as_bytes(weight, dtype)


@every_dtype
def test_every_sixteen_bit_value_has_the_code_of_the_library(dtype: str) -> None:
    """Every finite value of the format beside the largest that gives a scale of 1."""
    every = np.arange(1 << 16, dtype=np.uint16)
    if dtype == "F32":
        every = (every.astype(np.uint32) << 16) | 0x8000
    weight = finite(every, dtype).reshape(-1, 128).copy()
    weight = np.where(np.abs(to_float(weight, dtype)) <= 448, weight, weight.dtype.type(0))
    weight[:, 0] = {"BF16": 0x43E0, "F16": 448, "F32": 448}[dtype]

    assert reference(weight, dtype) == as_bytes(weight, dtype)


@every_dtype
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_found(dtype: str, value: float) -> None:
    """The index is that of the first one, in whatever row."""
    weight = ordinary(dtype, (5, 64))
    bits = {"BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F800000}[dtype]
    pattern = bits + (1 if np.isnan(value) else 0) + (bits + (bits & -bits) if value < 0 else 0)
    weight.view(PATTERN[dtype])[3, 17] = pattern
    codes, scales = np.empty(weight.shape, np.uint8), np.empty((5, 1), weight.dtype)

    assert 3 * 64 + 17 == quantize_rows(weight, dtype, codes, scales)


@every_dtype
def test_rows_are_independent(dtype: str) -> None:
    """Any split into blocks of rows gives the bytes of the whole."""
    weight = random_patterns(dtype, (9, 64))
    parts = [quantized(weight[start : start + 4], dtype) for start in range(0, 9, 4)]
    whole = quantized(weight, dtype)

    assert all(
        np.concatenate(pair).tobytes() == one.tobytes()
        for pair, one in zip(zip(*parts, strict=True), whole, strict=True)
    )


@every_dtype
def test_dequantizing_is_the_product_of_code_and_scale(dtype: str) -> None:
    """For every code, NaN included, as torch widens it."""
    codes = np.arange(256, dtype=np.uint8).reshape(2, 128)
    scales = np.array([[0.5], [3.0]], np.float32)
    out = np.empty(codes.shape, np.float32)
    dequantize_rows(codes, scales, out)
    wanted = torch.from_numpy(codes).view(torch.float8_e4m3fn).float().numpy() * scales

    assert np.array_equal(wanted, out, equal_nan=True)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (4,), (2, 2, 2)])
def test_shapes_that_are_no_weight_are_refused(shape: tuple[int, ...]) -> None:
    """One ValueError for what has no rows or no columns."""
    weight, scales = np.zeros(shape, np.uint16), np.empty((shape[0], 1), np.uint16)
    with pytest.raises(ValueError, match="shape"):
        quantize_rows(weight, "BF16", np.empty(shape, np.uint8), scales)


@given(weight=any_finite("BF16", 32, 2))
@example(weight=corners("BF16"))
@settings(max_examples=30)
def test_a_weight_of_negative_zero_becomes_zero(weight: Array) -> None:
    """llm-compressor adds a zero point of 0, which makes it so."""
    codes, _ = quantized(weight, "BF16")

    assert not codes[weight == 0x8000].any()
