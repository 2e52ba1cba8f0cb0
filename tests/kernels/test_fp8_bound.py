"""How far FP8 weights may be off, as `verify` says, against what the kernel makes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from int4_weights import Array, any_finite, corners, to_float

from carnice_build.formats.compressed_tensors.storages.row_floats_values import allowance
from carnice_build.kernels.fp8 import dequantize_rows, quantize_rows


def dequantized(weight: Array, dtype: str) -> Array:
    """What a folder would say of the weight."""
    codes, scales = np.empty(weight.shape, np.uint8), np.empty((len(weight), 1), weight.dtype)
    quantize_rows(weight, dtype, codes, scales)
    out = np.empty(weight.shape, np.float32)
    dequantize_rows(codes, to_float(scales, dtype), out)
    return out


def outside(weight: Array, dtype: str, found: Array) -> int:
    """Weights that are further off than their bits allow."""
    source = to_float(weight, dtype)
    return int((np.abs(found - source) > allowance(source, dtype)).sum())


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_corners_keep_the_bound(dtype: str) -> None:
    """Zeros, denormals, ties and rows of one large weight."""
    weight = corners(dtype)

    assert 0 == outside(weight, dtype, dequantized(weight, dtype))


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@settings(max_examples=60)
@given(data=st.data())
def test_whatever_the_quantizer_makes_keeps_the_bound(dtype: str, data: st.DataObject) -> None:
    """Of any finite bit patterns."""
    weight = data.draw(any_finite(dtype, 32, 2))

    assert 0 == outside(weight, dtype, dequantized(weight, dtype))


def test_a_code_beside_the_nearest_breaks_the_bound() -> None:
    """Most weights that are moved by one code are seen."""
    weight = np.random.default_rng(1).standard_normal((32, 128)).astype(np.float32)
    codes, scales = np.empty(weight.shape, np.uint8), np.empty((32, 1), np.float32)
    quantize_rows(weight, "F32", codes, scales)
    out = np.empty_like(weight)
    dequantize_rows(codes ^ 1, scales, out)

    assert outside(weight, "F32", out) > 0.9 * weight.size
