"""Integers of two to eight bits against compressed-tensors and llm-compressor, the references."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
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
    random_patterns,
)
from storage_samples import assorted, compressed, content, every_pattern, exponents, integers

from carnice_build.kernels.compressed import mse_qparams
from carnice_build.kernels.integers import (
    BITS,
    dequantize_rows,
    pack_rows,
    pack_zero_points,
    quantize_rows,
    unpack_rows,
    unpack_zero_points,
    words,
)

every_dtype = pytest.mark.parametrize("dtype", STORAGE)


def packed(
    weight: Array, dtype: str, bits: int, group_size: int | None, symmetric: bool
) -> dict[str, bytes]:
    """The tensors of pack-quantized."""
    rows, columns = weight.shape
    group = group_size or columns
    codes = np.full((rows, words(columns, bits)), 99, np.int32)
    scales = np.empty((rows, columns // group), weight.dtype)
    zeros = None if symmetric else np.empty(scales.shape, np.int8)
    assert all_fine == quantize_rows(weight, dtype, bits, group, codes, scales, zeros)
    found = {"weight_packed": codes.tobytes(), "weight_scale": scales.tobytes()}
    if zeros is not None:
        turned = np.full((words(rows, bits), scales.shape[1]), 99, np.int32)
        pack_zero_points(zeros, bits, turned)
        found["weight_zero_point"] = turned.tobytes()
    return found


def as_bytes(
    weight: Array, dtype: str, bits: int, group_size: int | None, symmetric: bool
) -> dict[str, bytes]:
    """The tensors of int-quantized."""
    rows, columns = weight.shape
    group = group_size or columns
    codes = np.full(weight.shape, 99, np.int8)
    scales = np.empty((rows, columns // group), weight.dtype)
    zeros = None if symmetric else np.empty(scales.shape, np.int8)
    assert all_fine == quantize_rows(weight, dtype, bits, group, codes, scales, zeros)
    found = {"weight": codes.tobytes(), "weight_scale": scales.tobytes()}
    return found if zeros is None else {**found, "weight_zero_point": zeros.tobytes()}


MAKERS = {"pack-quantized": packed, "int-quantized": as_bytes}
every_storage = pytest.mark.parametrize("storage", MAKERS)


def reference(
    weight: Array, dtype: str, bits: int, group_size: int | None, symmetric: bool, storage: str
) -> dict[str, bytes]:
    """As the library has them."""
    tensors = compressed(weight, dtype, integers(bits, group_size, symmetric, storage))
    return {name: content(item) for name, item in tensors.items() if name != "weight_shape"}


@every_dtype
@every_storage
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_groups_have_the_bits_of_the_library(
    dtype: str, bits: int, symmetric: bool, storage: str
) -> None:
    """Ordinary weights, corners of the rule and random bit patterns."""
    weight = assorted(dtype, 30000)

    assert reference(weight, dtype, bits, 32, symmetric, storage) == MAKERS[storage](
        weight, dtype, bits, 32, symmetric
    )


@every_storage
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("columns", [1, 31, 126])
def test_channels_have_the_bits_of_the_library(
    bits: int, symmetric: bool, storage: str, columns: int
) -> None:
    """Of as many columns as there are: what the last word of a row lacks is zeros."""
    weight = assorted("BF16")[:, :columns].copy()

    assert reference(weight, "BF16", bits, None, symmetric, storage) == MAKERS[storage](
        weight, "BF16", bits, None, symmetric
    )


@every_dtype
@pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (8, True), (8, False)])
def test_every_sixteen_bit_value_has_the_bits_of_the_library(
    dtype: str, bits: int, symmetric: bool
) -> None:
    """In groups of every magnitude."""
    for exponent in exponents(dtype, 6)[:-1]:
        weight = every_pattern(dtype, exponent)

        assert reference(weight, dtype, bits, 128, symmetric, "pack-quantized") == packed(
            weight, dtype, bits, 128, symmetric
        )


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_finite_weight_has_the_bits_of_the_library(data: st.DataObject) -> None:
    """Whatever the bit patterns are."""
    dtype = data.draw(st.sampled_from(list(STORAGE)))
    bits = data.draw(st.sampled_from(BITS))
    symmetric = data.draw(st.booleans())
    storage = data.draw(st.sampled_from(list(MAKERS)))
    step = EXPONENT[dtype] & -EXPONENT[dtype]
    weight = data.draw(any_finite(dtype, 32, 2, None if symmetric else EXPONENT[dtype] - step))

    assert reference(weight, dtype, bits, 32, symmetric, storage) == MAKERS[storage](
        weight, dtype, bits, 32, symmetric
    )


@every_dtype
@pytest.mark.parametrize("bits", BITS)
def test_packed_codes_come_back(dtype: str, bits: int) -> None:
    """Codes along columns and zero points along rows, in counts that no word divides."""
    half = 1 << (bits - 1)
    codes = np.random.default_rng(bits).integers(-half, half, (13, 45), np.int8)
    for pack, unpack, shape in (
        (pack_rows, unpack_rows, (13, words(45, bits))),
        (pack_zero_points, unpack_zero_points, (words(13, bits), 45)),
    ):
        held, found = np.full(shape, 99, np.int32), np.full(codes.shape, 99, np.int8)
        pack(codes, bits, held)
        unpack(held, bits, found)

        assert np.array_equal(codes, found)


@every_dtype
@pytest.mark.parametrize("value", [np.nan, -np.inf])
@pytest.mark.parametrize("symmetric", [True, False])
def test_nan_and_infinity_are_found(dtype: str, value: float, symmetric: bool) -> None:
    """The index is that of the first one, in whatever row."""
    weight = ordinary(dtype, (5, 64))
    sign = EXPONENT[dtype] + (EXPONENT[dtype] & -EXPONENT[dtype])
    pattern = EXPONENT[dtype] + (1 if np.isnan(value) else sign)
    weight.view(PATTERN[dtype])[3, [17, 40]] = pattern
    scales = np.empty((5, 2), weight.dtype)
    zeros = None if symmetric else np.empty((5, 2), np.int8)

    assert 3 * 64 + 17 == quantize_rows(
        weight, dtype, 4, 32, np.empty((5, 8), np.int32), scales, zeros
    )


@every_dtype
def test_rows_are_independent(dtype: str) -> None:
    """Any split into blocks of rows gives the bytes of the whole."""
    weight = random_patterns(dtype, (9, 64))
    whole = packed(weight, dtype, 3, 32, True)
    parts = [packed(weight[start : start + 4], dtype, 3, 32, True) for start in range(0, 9, 4)]

    assert whole == {name: b"".join(part[name] for part in parts) for name in whole}


def test_dequantizing_subtracts_the_zero_point_first() -> None:
    """As torch does, in float32."""
    codes = np.arange(-128, 128, dtype=np.int8).reshape(2, 128)
    scales = np.array([[0.5, 3.0], [0.1, 7.0]], np.float32)
    zeros = np.array([[1, -128], [0, 127]], np.int8)
    out = np.empty(codes.shape, np.float32)
    dequantize_rows(codes, scales, zeros, out)
    each = np.repeat(np.stack([scales, zeros.astype(np.float32)]), 64, axis=2)

    assert np.array_equal((codes.astype(np.float32) - each[1]) * each[0], out)


def test_a_range_that_overflows_has_no_scale() -> None:
    """It is refused where the library makes zeros of the group."""
    weight = np.array([[65504, -65504]], np.float16)
    outputs = np.empty((1, 2), np.int8), np.empty((1, 1), np.float16), np.empty((1, 1), np.int8)

    with pytest.raises(ValueError, match="overflows"):
        quantize_rows(weight, "F16", 4, 2, *outputs)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"dtype": "F64"}, "dtype is 'F64', expected one of BF16, F16, F32"),
        ({"bits": 9}, "bits is 9, expected one of (2, 3, 4, 5, 6, 7, 8)"),
        ({"group_size": 48}, "shape [2, 64] is not [rows, a multiple of 48]"),
        ({"rows": np.zeros((0, 64), np.uint16)}, "shape [0, 64] is not [rows, a multiple of 32]"),
        ({"codes": np.zeros((2, 9), np.int32)}, "codes is int32[2, 9], expected int32[2, 8]"),
        ({"codes": np.zeros((2, 8), np.int8)}, "codes is int8[2, 8], expected int8[2, 64]"),
        ({"scales": np.zeros((2, 1), np.uint16)}, "scales is uint16[2, 1], expected uint16[2, 2]"),
        (
            {"zero_points": np.zeros((2, 1), np.int8)},
            "zero_points is int8[2, 1], expected int8[2, 2]",
        ),
    ],
)
def test_arguments_that_do_not_fit_are_named(change: dict[str, Any], sentence: str) -> None:
    """Each misfit raises ValueError with what was given and what was expected."""
    given_arguments: dict[str, Any] = {
        "rows": np.zeros((2, 64), np.uint16),
        "dtype": "BF16",
        "bits": 4,
        "group_size": 32,
        "codes": np.zeros((2, 8), np.int32),
        "scales": np.zeros((2, 2), np.uint16),
        "zero_points": np.zeros((2, 2), np.int8),
    }
    with pytest.raises(ValueError) as raised:
        quantize_rows(**{**given_arguments, **change})

    assert sentence == str(raised.value)


def test_a_code_out_of_range_is_not_packed() -> None:
    """It would change its neighbours."""
    with pytest.raises(ValueError, match=r"a code is not in -8\.\.7"):
        pack_rows(np.array([[8]], np.int8), 4, np.empty((1, 1), np.int32))


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", [32, 128])
def test_ranges_of_the_least_error_have_the_bits_of_the_library(
    dtype: str, symmetric: bool, bits: int, group_size: int
) -> None:
    """Whatever the codes are; `compressed.mse_qparams` says what is searched."""
    weight = assorted(dtype, 30000)
    scheme = integers(bits, group_size, symmetric, "pack-quantized")
    assert scheme.weights is not None
    scheme.weights.observer = "memoryless_mse"
    tensors = compressed(weight, dtype, scheme)
    rows, columns = weight.shape
    scales = np.empty((rows, columns // group_size), weight.dtype)
    zeros = None if symmetric else np.empty(scales.shape, np.int8)
    codes = np.full((rows, words(columns, bits)), 99, np.int32)

    assert all_fine == mse_qparams(weight, dtype, group_size, scales, zeros, bits)
    assert all_fine == quantize_rows(
        weight, dtype, bits, group_size, codes, scales, zeros, given=True
    )
    assert content(tensors["weight_scale"]) == scales.tobytes()
    assert content(tensors["weight_packed"]) == codes.tobytes()
    if zeros is not None:
        turned = np.empty((words(rows, bits), scales.shape[1]), np.int32)
        pack_zero_points(zeros, bits, turned)

        assert content(tensors["weight_zero_point"]) == turned.tobytes()


@pytest.mark.parametrize("scale", [0.0, -0.0, np.inf, np.nan])
def test_a_scale_that_is_given_is_a_number_but_zero(scale: float) -> None:
    """Nothing can be divided by others."""
    scales = np.array([[1.0, scale]], np.float32)
    outputs = np.empty((1, 8), np.int8), scales
    with pytest.raises(ValueError, match="a scale is 0 or not finite"):
        quantize_rows(np.zeros((1, 8), np.float32), "F32", 4, 4, *outputs, given=True)
