"""MXFP4 and MXFP8 against llm-compressor, the reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from int4_weights import (
    EXPONENT,
    PATTERN,
    STORAGE,
    Array,
    all_fine,
    any_finite,
    ordinary,
    to_float,
)
from storage_samples import assorted, compressed, content, every_pattern, exponents, preset

from carnice_build.kernels.mx import dequantize_rows, quantize_rows

every_dtype = pytest.mark.parametrize("dtype", STORAGE)
NAMES = {4: ("weight_packed", "weight_scale"), 8: ("weight", "weight_scale")}
every_width = pytest.mark.parametrize("bits", NAMES)


def reference(weight: Array, dtype: str, bits: int) -> list[bytes]:
    tensors = compressed(weight, dtype, preset(f"MXFP{bits}A16"))
    return [content(tensors[name]) for name in NAMES[bits]]


def quantized(weight: Array, dtype: str, bits: int) -> list[Array]:
    rows, columns = weight.shape
    codes = np.full((rows, columns * bits // 8), 99, np.uint8)
    scales = np.full((rows, columns // 32), 99, np.uint8)
    assert all_fine == quantize_rows(weight, dtype, bits, codes, scales)
    return [codes, scales]


def as_bytes(weight: Array, dtype: str, bits: int) -> list[bytes]:
    return [array.tobytes() for array in quantized(weight, dtype, bits)]


def bearable(weight: Array, dtype: str) -> Array:
    """The weight without what is too large for a scale."""
    largest = {"F16": 57344}.get(dtype, 1.75 * 2.0**127)
    return np.where(np.abs(to_float(weight, dtype)) < largest, weight, weight.dtype.type(0))


@every_dtype
@every_width
def test_weights_have_the_bits_of_the_library(dtype: str, bits: int) -> None:
    """Ordinary ones, zeros of both signs, denormals, ties, single large ones, random patterns."""
    weight = assorted(dtype)

    assert reference(weight, dtype, bits) == as_bytes(weight, dtype, bits)


@every_dtype
@every_width
def test_every_sixteen_bit_value_has_the_code_of_the_library(dtype: str, bits: int) -> None:
    """In blocks of every magnitude, down to scales that the type does not hold."""
    for exponent in exponents(dtype, 16):
        weight = bearable(every_pattern(dtype, exponent), dtype)

        assert reference(weight, dtype, bits) == as_bytes(weight, dtype, bits)


@every_dtype
@every_width
def test_every_magnitude_has_the_scale_of_the_library(dtype: str, bits: int) -> None:
    """For every 16-bit value as the largest of its block, denormals among them."""
    patterns = np.arange(EXPONENT["BF16" if dtype == "F32" else dtype], dtype=np.uint16)
    if dtype == "F32":
        patterns = patterns.astype(np.uint32) << 16
    weight = np.zeros((len(patterns), 32), patterns.dtype)
    weight[:, 5] = patterns
    weight = bearable(weight.view(STORAGE[dtype]), dtype)

    assert reference(weight, dtype, bits) == as_bytes(weight, dtype, bits)


@every_width
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_finite_weight_has_the_bits_of_the_library(bits: int, data: st.DataObject) -> None:
    """Whatever the bit patterns are."""
    dtype = data.draw(st.sampled_from(list(STORAGE)))
    weight = bearable(data.draw(any_finite(dtype, 32, 2)), dtype)

    assert reference(weight, dtype, bits) == as_bytes(weight, dtype, bits)


@every_dtype
@every_width
@pytest.mark.parametrize("pattern", [0, 1])
def test_nan_and_infinity_are_found(dtype: str, bits: int, pattern: int) -> None:
    """The index is that of the first one."""
    weight = ordinary(dtype, (40, 64))
    weight.view(PATTERN[dtype])[[33, 38], 17] = EXPONENT[dtype] + pattern
    outputs = np.empty((40, 64 * bits // 8), np.uint8), np.empty((40, 2), np.uint8)

    assert 33 * 64 + 17 == quantize_rows(weight, dtype, bits, *outputs)


@every_dtype
def test_what_no_scale_is_large_enough_for_is_refused(dtype: str) -> None:
    """The library makes zeros of its block."""
    weight = np.zeros((1, 32), STORAGE[dtype])
    weight.view(PATTERN[dtype])[0, 3] = EXPONENT[dtype] - 1
    outputs = np.empty((1, 16), np.uint8), np.empty((1, 1), np.uint8)

    assert not np.frombuffer(reference(weight, dtype, 4)[0], np.uint8).any()
    with pytest.raises(ValueError, match="has no scale in"):
        quantize_rows(weight, dtype, 4, *outputs)


def test_rows_are_independent() -> None:
    """Any split into blocks of rows gives the bytes of the whole."""
    weight = assorted("BF16")
    whole = as_bytes(weight, "BF16", 8)
    parts = [as_bytes(weight[i : i + 7], "BF16", 8) for i in range(0, len(weight), 7)]

    assert whole == [b"".join(made) for made in zip(*parts, strict=True)]


def test_dequantizing_is_the_product_of_code_and_scale() -> None:
    """For every code, and the exponents of all scales."""
    codes = np.tile(np.arange(256, dtype=np.uint8), (2, 16))
    scales = np.tile(np.arange(0, 255, 4, dtype=np.uint8), 2)[:256].reshape(2, -1)
    scales = np.resize(scales, (2, 128))
    out = np.empty(codes.shape, np.float32)
    dequantize_rows(codes, 8, scales, out)
    steps = np.repeat(np.exp2(scales.astype(np.float64) - 127), 32, axis=1).astype(np.float32)
    with np.errstate(over="ignore"):
        wanted = torch.from_numpy(codes).view(torch.float8_e4m3fn).float().numpy() * steps

    assert np.array_equal(wanted, out, equal_nan=True)
    four = np.empty((2, 2 * codes.shape[1]), np.float32)
    dequantize_rows(codes, 4, np.full((2, 256), 128, np.uint8), four)
    halves = np.stack([codes & 15, codes >> 4], axis=-1).reshape(2, -1)
    values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)[halves & 7] * 2

    assert np.array_equal(np.where(halves < 8, values, -values), four)


@pytest.mark.parametrize(
    ("shape", "bits", "sentence"),
    [((2, 48), 4, "a multiple of 32"), ((2, 32), 5, "bits is 5"), ((32,), 4, "a multiple of 32")],
)
def test_arguments_that_do_not_fit_are_named(
    shape: tuple[int, ...], bits: int, sentence: str
) -> None:
    """Each raises ValueError."""
    outputs = np.empty((2, 16), np.uint8), np.empty((2, 1), np.uint8)
    with pytest.raises(ValueError, match=sentence):
        quantize_rows(np.zeros(shape, np.uint16), "BF16", bits, *outputs)
