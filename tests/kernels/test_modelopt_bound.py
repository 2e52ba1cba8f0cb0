"""How far weights in modelopt's FP8 and MXFP8 may be from their source, by what is stored."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from carnice_build.formats.nvfp4.stored import fp8_allowance, mxfp8_allowance
from carnice_build.kernels import modelopt_fp8, nvfp4
from carnice_build.kernels._floats import widen

Array = np.ndarray[Any, Any]


def weights(seed: int) -> Array:
    """BF16 of ordinary size, of every magnitude up to 2^20, and with a row of zeros."""
    random = np.random.default_rng(seed)
    ordinary = random.standard_normal((64, 128)).astype(np.float32)
    wide = np.exp2(random.uniform(-120, 20, (64, 128))).astype(np.float32)
    rows = np.concatenate([ordinary, wide, -wide, np.zeros((1, 128), np.float32)])
    bits: Array = (rows.view(np.uint32) >> 16).astype(np.uint16)
    return bits


def nearness(source: Array, restored: Array, allowed: Array) -> float:
    """The largest error as a share of what is allowed."""
    error = np.abs(restored.astype(np.float64) - source)
    assert (error <= allowed).all()
    return float((error[allowed > 0] / allowed[allowed > 0]).max())


@pytest.mark.parametrize("seed", range(3))
def test_no_weight_is_further_off_than_allowed(seed: int) -> None:
    """And some are nearly as far, so that the bounds are worth something."""
    bits = weights(seed)
    source = widen(bits, "BF16")
    codes, restored = np.empty(bits.shape, np.uint8), np.empty(bits.shape, np.float32)
    scale = modelopt_fp8.weight_scale(nvfp4.amax(bits, "BF16")[0])
    modelopt_fp8.quantize_tensor(bits, "BF16", scale, codes)
    modelopt_fp8.dequantize_tensor(codes, scale, restored)
    assert 0.8 < nearness(source, restored, fp8_allowance(source, float(scale), 2.0**-8))

    scales = np.empty((len(bits), bits.shape[1] // 32), np.uint8)
    modelopt_fp8.quantize_rows(bits, "BF16", codes, scales)
    modelopt_fp8.dequantize_rows(codes, scales, restored)
    assert 0.9 < nearness(source, restored, mxfp8_allowance(source))


def test_another_power_of_two_is_further_off_than_allowed() -> None:
    """A folder whose exponents are one too large, or too small, does not pass."""
    bits = weights(0)[:64]
    source = widen(bits, "BF16")
    codes, restored = np.empty(bits.shape, np.uint8), np.empty(bits.shape, np.float32)
    scales = np.empty((len(bits), bits.shape[1] // 32), np.uint8)
    modelopt_fp8.quantize_rows(bits, "BF16", codes, scales)
    for other in (scales + np.uint8(1), scales - np.uint8(1)):
        modelopt_fp8.dequantize_rows(codes, other, restored)
        assert (np.abs(restored - source) > mxfp8_allowance(source)).any()
