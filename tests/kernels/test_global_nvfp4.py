"""NVFP4 under a global scale against llm-compressor, the reference, and beside ModelOpt's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from compressed_tensors.quantization.utils import generate_gparam
from hypothesis import given, settings
from hypothesis import strategies as st
from int4_weights import (
    EXPONENT,
    PATTERN,
    STORAGE,
    TORCH,
    Array,
    all_fine,
    any_finite,
    from_float,
    ordinary,
    to_float,
    to_torch,
)
from storage_samples import assorted, compressed, content, every_pattern, exponents, preset

from carnice_build.kernels import nvfp4
from carnice_build.kernels.global_nvfp4 import dequantize_rows, global_scale, quantize_rows

every_dtype = pytest.mark.parametrize("dtype", STORAGE)
NAMES = ("weight_packed", "weight_scale", "weight_global_scale")


def reference(weight: Array, dtype: str) -> list[bytes]:
    tensors = compressed(weight, dtype, preset("NVFP4A16"))
    return [content(tensors[name]) for name in NAMES]


def quantized(weight: Array, dtype: str) -> tuple[Array, Array, Array]:
    rows, columns = weight.shape
    scale = global_scale(nvfp4.amax(weight, dtype)[0], dtype)
    packed = np.full((rows, columns // 2), 99, np.uint8)
    scales = np.full((rows, columns // 16), 99, np.uint8)
    assert all_fine == quantize_rows(weight, dtype, scale, packed, scales)
    return packed, scales, np.array([scale], np.float32)


def as_bytes(weight: Array, dtype: str) -> list[bytes]:
    return [array.tobytes() for array in quantized(weight, dtype)]


@every_dtype
@pytest.mark.parametrize("largest", [1, 50000])
def test_weights_have_the_bits_of_the_library(dtype: str, largest: float) -> None:
    """Ordinary ones, zeros of both signs, denormals, ties, random patterns; single large ones."""
    weight = assorted(dtype, largest)

    assert reference(weight, dtype) == as_bytes(weight, dtype)


@every_dtype
def test_every_sixteen_bit_value_has_the_code_of_the_library(dtype: str) -> None:
    """Under global scales of every magnitude, and where F16 has none."""
    for exponent in exponents(dtype, 12):
        weight = every_pattern(dtype, exponent)

        assert reference(weight, dtype) == as_bytes(weight, dtype)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_finite_weight_has_the_bits_of_the_library(data: st.DataObject) -> None:
    """Whatever the bit patterns are."""
    dtype = data.draw(st.sampled_from(list(STORAGE)))
    weight = data.draw(any_finite(dtype, 32, 2))

    assert reference(weight, dtype) == as_bytes(weight, dtype)


@every_dtype
def test_every_magnitude_has_the_global_scale_of_the_library(dtype: str) -> None:
    """For every 16-bit value, zero and denormals among them."""
    count = EXPONENT["BF16" if dtype == "F32" else dtype]
    patterns = np.arange(count, dtype=np.uint16)
    amax = to_torch(
        patterns.view(STORAGE[dtype]) if dtype != "F32" else patterns.astype(np.uint32) << 16, dtype
    )
    amax = amax.view(TORCH[dtype])
    wanted = torch.cat([generate_gparam(-one.reshape(1), one.reshape(1)) for one in amax[::7]])
    found = [global_scale(one, dtype) for one in amax[::7].float().numpy()]

    assert wanted.numpy().tobytes() == np.array(found, np.float32).tobytes()


@every_dtype
@pytest.mark.parametrize("pattern", [0, 1])
def test_nan_and_infinity_are_found(dtype: str, pattern: int) -> None:
    """The index is that of the first one."""
    weight = ordinary(dtype, (40, 64))
    weight.view(PATTERN[dtype])[[33, 38], 17] = EXPONENT[dtype] + pattern
    outputs = np.empty((40, 32), np.uint8), np.empty((40, 4), np.uint8)

    assert 33 * 64 + 17 == quantize_rows(weight, dtype, 100.0, *outputs)


def test_rows_are_independent() -> None:
    """Any split into blocks of rows gives the bytes of the whole, under one global scale."""
    weight = assorted("BF16")
    packed, scales, (scale,) = quantized(weight, "BF16")
    for start in range(0, len(weight), 7):
        part = weight[start : start + 7]
        found = np.empty_like(packed[: len(part)]), np.empty_like(scales[: len(part)])
        quantize_rows(part, "BF16", scale, *found)

        assert packed[start : start + 7].tobytes() == found[0].tobytes()
        assert scales[start : start + 7].tobytes() == found[1].tobytes()


def test_dequantizing_divides_by_the_global_scale() -> None:
    """For every code and every scale, as torch has it in float32."""
    packed = np.tile(np.arange(256, dtype=np.uint8), 2).reshape(2, -1)
    scales = np.arange(64, dtype=np.uint8).reshape(2, 32) + 1
    out = np.empty((2, 512), np.float32)
    dequantize_rows(packed, scales, 3.0, out)
    codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(2, 512)
    values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)[codes & 7]
    steps = torch.from_numpy(scales).view(torch.float8_e4m3fn).float() / torch.tensor(3.0)
    wanted = np.where(codes < 8, values, -values) * np.repeat(steps.numpy(), 16, axis=1)

    assert np.array_equal(wanted, out)


@pytest.mark.parametrize("scale", [0.0, -1.0, np.inf, np.nan])
def test_a_global_scale_is_a_positive_number(scale: float) -> None:
    """All else is refused."""
    outputs = np.empty((1, 8), np.uint8), np.empty((1, 1), np.uint8)
    with pytest.raises(ValueError, match="expected a positive finite number"):
        quantize_rows(np.zeros((1, 16), np.uint16), "BF16", scale, *outputs)


def test_modelopt_makes_other_codes_of_the_same_weight() -> None:
    """Its steps are not rounded to BF16: near ties some codes differ, a few in a hundred."""
    weight = from_float(np.random.default_rng(3).standard_normal((64, 256)) * 0.02, "BF16")
    packed, scales, _ = quantized(weight, "BF16")
    others = np.empty_like(packed), np.empty_like(scales)
    amax, _ = nvfp4.amax(weight, "BF16")
    nvfp4.quantize_rows(weight, "BF16", nvfp4.weight_scale_2(amax), *others)

    assert 0 < np.mean(packed != others[0]) < 0.1
    assert 0 < np.mean(scales != others[1]) < 0.1


def test_modelopt_makes_the_same_of_a_weight_whose_scales_are_exact() -> None:
    """As where the largest magnitude is 21 times a power of two, and so are the blocks'."""
    values = np.where(np.arange(256) % 16, 0.5, 21.0).reshape(2, 128)
    weight = from_float(values, "BF16")
    packed, scales, scale = quantized(weight, "BF16")
    others = np.empty_like(packed), np.empty_like(scales)
    amax, _ = nvfp4.amax(weight, "BF16")
    nvfp4.quantize_rows(weight, "BF16", nvfp4.weight_scale_2(amax), *others)

    assert to_float(weight, "BF16").max() == amax == 21
    assert [1 / scale[0], packed.tobytes(), scales.tobytes()] == [
        nvfp4.weight_scale_2(amax),
        others[0].tobytes(),
        others[1].tobytes(),
    ]
