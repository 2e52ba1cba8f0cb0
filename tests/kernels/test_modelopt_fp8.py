"""FP8 and MXFP8 of modelopt's export, which is the reference."""

from __future__ import annotations

from typing import Any

import modelopt.torch.quantization as mtq
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from modelopt.torch.export.unified_export_hf import _export_quantized_weight
from modelopt.torch.quantization.qtensor import MXFP8QTensor

from carnice_build.kernels.modelopt_fp8 import (
    dequantize_rows,
    dequantize_tensor,
    input_scale,
    quantize_rows,
    quantize_tensor,
    weight_scale,
)
from carnice_build.kernels.nvfp4 import amax

Array = np.ndarray[Any, Any]

STORAGE = {"BF16": np.uint16, "F16": np.float16, "F32": np.float32}
PATTERN = {"BF16": np.uint16, "F16": np.uint16, "F32": np.uint32}
EXPONENT = {"BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F800000}
TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}

all_finite = -1

every_dtype = pytest.mark.parametrize("dtype", STORAGE)


def to_torch(array: Array, dtype: str) -> torch.Tensor:
    return torch.from_numpy(array.copy()).view(TORCH[dtype])


def from_float(values: Any, dtype: str) -> Array:
    tensor = torch.tensor(np.asarray(values, np.float64)).to(TORCH[dtype])
    view: Array = tensor.view({"BF16": torch.uint16}.get(dtype, TORCH[dtype])).numpy()
    return view


def finite(patterns: Array, dtype: str) -> Array:
    """The patterns as floats, each NaN and Inf made finite by its lowest exponent bit."""
    mask = EXPONENT[dtype]
    special = (patterns & mask) == mask
    return (patterns ^ np.where(special, mask & -mask, 0).astype(patterns.dtype)).view(
        STORAGE[dtype]
    )


def all_patterns(dtype: str) -> Array:
    """All 65,536 values of 16 bits, or as many of 32, NaN and Inf made finite."""
    if dtype == "F32":
        draws = np.random.default_rng(0).integers(0, 2**32, 65536, np.uint32)
        return finite(draws, dtype).reshape(64, 1024)
    return finite(np.arange(65536, dtype=np.uint16), dtype).reshape(64, 1024)


def hostile(dtype: str) -> Array:
    """Zeros of both signs, denormals, ties, one huge value, a row of zeros, and every pattern."""
    ties = np.array([1.0625, 0.0009765625, 0.0029296875, 17, 19, 21, 440, -440, 432, 447.9, 464])
    rows = [
        np.zeros(1024),
        np.where(np.arange(1024) % 2, -0.0, 0.0),
        np.resize(ties, 1024),
        np.resize(ties * 448 / 464, 1024),
        np.r_[np.full(1023, 1e-6), 6e4],
    ]
    return np.concatenate([from_float(np.stack(rows), dtype), all_patterns(dtype)])


def exported(weight: Array, dtype: str, config: dict[str, Any]) -> dict[str, Array]:
    """What modelopt's export makes of a linear's weight."""
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=TORCH[dtype])
    linear.weight.data = to_torch(weight, dtype)
    model = torch.nn.Sequential(linear)
    mtq.quantize(model, config, lambda _: None)
    _export_quantized_weight(model[0], TORCH[dtype])
    codes = model[0].weight.data.view(torch.uint8)
    return {"codes": codes.numpy(), "scale": model[0].weight_scale.numpy()}


def fp8(weight: Array, dtype: str) -> tuple[Array, np.float32]:
    codes = np.empty(weight.shape, np.uint8)
    largest, bad = amax(weight, dtype)
    assert all_finite == bad
    scale = weight_scale(largest)
    assert all_finite == quantize_tensor(weight, dtype, scale, codes)
    return codes, scale


def mxfp8(weight: Array, dtype: str) -> tuple[Array, Array]:
    codes = np.empty(weight.shape, np.uint8)
    scales = np.empty((weight.shape[0], weight.shape[1] // 32), np.uint8)
    assert all_finite == quantize_rows(weight, dtype, codes, scales)
    return codes, scales


def library_mxfp8(weight: Array, dtype: str) -> tuple[Array, Array]:
    tensor = to_torch(weight, dtype)
    scales = MXFP8QTensor.get_weights_scaling_factor(tensor)
    codes = MXFP8QTensor.quantize_with_scale(tensor, scales)
    return codes.view(torch.uint8).numpy(), scales.numpy()


def test_fp8_has_the_bytes_of_the_export() -> None:
    """Codes and the scale, of ordinary weights and of every pattern in one tensor."""
    for dtype in STORAGE:
        ordinary = np.random.default_rng(0).standard_normal((48, 96)) * 0.02
        for weight in (from_float(ordinary, dtype), hostile(dtype)):
            theirs = exported(weight, dtype, mtq.FP8_DEFAULT_CFG)
            codes, scale = fp8(weight, dtype)
            assert theirs["scale"].tobytes() == scale.tobytes()
            assert np.array_equal(theirs["codes"], codes)


def test_mxfp8_has_the_bytes_of_the_export() -> None:
    """Codes and exponents; float32 weights lie nowhere near 448 times a power of two."""
    for dtype in STORAGE:
        ordinary = np.random.default_rng(0).standard_normal((48, 96)) * 0.02
        theirs = exported(from_float(ordinary, dtype), dtype, mtq.MXFP8_DEFAULT_CFG)
        codes, scales = mxfp8(from_float(ordinary, dtype), dtype)
        assert np.array_equal(theirs["scale"], scales)
        assert np.array_equal(theirs["codes"], codes)


@every_dtype
def test_every_pattern_in_mxfp8(dtype: str) -> None:
    """In any company, and each magnitude of 16 bits the largest of a block.

    So the powers of two times 448 and their neighbours are among these.
    """
    weights = [hostile(dtype)]
    if dtype != "F32":
        alone = np.zeros((EXPONENT[dtype], 32), np.uint16)
        alone[:, 0] = np.arange(len(alone))
        weights.append(alone.view(STORAGE[dtype]))
    for weight in weights:
        ours, theirs = mxfp8(weight, dtype), library_mxfp8(weight, dtype)
        assert np.array_equal(theirs[1], ours[1])
        assert np.array_equal(theirs[0], ours[0])


@settings(max_examples=60, deadline=None)
@given(st.data())
@every_dtype
def test_random_patterns_have_the_librarys_bytes(dtype: str, data: st.DataObject) -> None:
    """Whatever the bits are, in both formats."""
    patterns = data.draw(arrays(PATTERN[dtype], (3, 64)))
    weight = finite(patterns, dtype)
    ours, theirs = mxfp8(weight, dtype), library_mxfp8(weight, dtype)
    codes, scale = fp8(weight, dtype)
    tensor = to_torch(weight, dtype)
    by_scale = (tensor / torch.tensor(scale)).to(torch.float8_e4m3fn).view(torch.uint8).numpy()

    assert np.array_equal(theirs[1], ours[1])
    assert np.array_equal(theirs[0], ours[0])
    assert np.array_equal(by_scale, codes)


def test_the_exponent_of_float32_is_exact_where_the_library_takes_a_logarithm() -> None:
    """The float32 after 448 * 2**64 needs the next power of two, which the library misses."""
    weight = np.zeros((1, 32), np.float32)
    weight[0, 0] = np.nextafter(np.float32(448 * 2.0**64), np.float32(np.inf))

    assert 127 + 65 == mxfp8(weight, "F32")[1][0, 0]
    assert 127 + 64 == library_mxfp8(weight, "F32")[1][0, 0]


def test_a_tensor_of_zeros_has_a_finite_scale() -> None:
    """modelopt's FP8 has the scale 0 and codes of NaN; of MXFP8 both are zeros."""
    zeros = np.zeros((2, 32), np.uint16)
    theirs = exported(zeros, "BF16", mtq.FP8_DEFAULT_CFG)
    codes, scale = fp8(zeros, "BF16")

    assert 0 == theirs["scale"]
    assert {0x7F} == set((theirs["codes"] & 0x7F).reshape(-1).tolist())
    assert (1, 0) == (scale, codes.max())
    assert 0 == mxfp8(zeros, "BF16")[0].max() == mxfp8(zeros, "BF16")[1].max()


@pytest.mark.parametrize("largest", [0.0, 1e-45, 1.2e-38, 0.3, 7.0, 1e30])
def test_input_scales_are_the_exports(largest: float) -> None:
    """Those of inputs that were all zero, and of denormals, too."""
    linear = torch.nn.Sequential(torch.nn.Linear(32, 8, bias=False))
    sample = torch.full((1, 32), largest)
    mtq.quantize(linear, mtq.FP8_DEFAULT_CFG, lambda model: model(sample))
    _export_quantized_weight(linear[0], torch.float32)

    assert linear[0].input_scale.numpy().tobytes() == input_scale(np.float32(largest)).tobytes()


@every_dtype
def test_a_nan_is_named_by_its_place(dtype: str) -> None:
    """As a flat index, in both formats."""
    weight = from_float(np.ones((4, 64)), dtype)
    weight.view(PATTERN[dtype])[2, 33] = EXPONENT[dtype] | 1
    codes = np.empty(weight.shape, np.uint8)

    assert 161 == quantize_tensor(weight, dtype, 1.0, codes)
    assert 161 == quantize_rows(weight, dtype, codes, np.empty((4, 2), np.uint8))


def test_reading_back_is_code_times_scale() -> None:
    """As the library dequantizes, in float32."""
    weight = from_float(np.random.default_rng(1).standard_normal((5, 64)), "BF16")
    codes, scale = fp8(weight, "BF16")
    out = np.empty(codes.shape, np.float32)
    dequantize_tensor(codes, scale, out)
    expected = torch.from_numpy(codes).view(torch.float8_e4m3fn).float() * float(scale)
    assert np.array_equal(expected.numpy(), out)

    codes, scales = mxfp8(weight, "BF16")
    dequantize_rows(codes, scales, out)
    stored = MXFP8QTensor(
        torch.Size(codes.shape),
        torch.float32,
        torch.from_numpy(codes).view(torch.float8_e4m3fn),
    )
    theirs = stored.dequantize(torch.float32, scale=torch.from_numpy(scales))
    assert np.array_equal(theirs.numpy(), out)


def test_shapes_that_do_not_fit_are_refused() -> None:
    """Blocks of 32 must divide a row."""
    with pytest.raises(ValueError, match="a multiple of 32"):
        quantize_rows(
            np.zeros((2, 48), np.uint16),
            "BF16",
            np.empty((2, 48), np.uint8),
            np.empty((2, 1), np.uint8),
        )
