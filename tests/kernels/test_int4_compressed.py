"""The pack-quantized format against compressed-tensors and llm-compressor, the references."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from int4_weights import (
    EXPONENT,
    GROUP_SIZES,
    PATTERN,
    STORAGE,
    Array,
    all_fine,
    any_finite,
    corners,
    finite,
    from_float,
    from_torch,
    ordinary,
    random_patterns,
    to_torch,
)
from llmcompressor.observers import Observer

from carnice_build.kernels.compressed import _powers, mse_qparams
from carnice_build.kernels.integers import pack_zero_points, quantize_rows

every_dtype = pytest.mark.parametrize("dtype", STORAGE)
sixteen_bits = ("BF16", "F16")
every_searched_setting = pytest.mark.parametrize(
    ("dtype", "group_size"), [(d, g) for d in sixteen_bits for g in GROUP_SIZES]
)


def arguments(group_size: int, observer: str = "memoryless_minmax") -> QuantizationArgs:
    return QuantizationArgs(
        num_bits=4,
        type="int",
        strategy="group",
        group_size=group_size,
        symmetric=False,
        observer=observer,
    )


def observed(weight: Array, dtype: str, group_size: int, name: str) -> tuple[Array, Array]:
    """Scales and zero points by an observer of llm-compressor."""
    observer = Observer.load_from_registry(
        name, base_name="weight", args=arguments(group_size, name)
    )
    observer(to_torch(weight, dtype))
    found = observer.get_qparams()
    return from_torch(found["scale"]), from_torch(found["zero_point"])


def grid(weight: Array, group_size: int) -> tuple[Array, Array]:
    shape = weight.shape[0], weight.shape[1] // group_size
    return np.empty(shape, weight.dtype), np.full(shape, 99, np.int8)


def mse(weight: Array, dtype: str, group_size: int) -> tuple[Array, Array]:
    results = grid(weight, group_size)
    assert all_fine == mse_qparams(weight, dtype, group_size, *results)
    return results


def compress(
    weight: Array, dtype: str, group_size: int, scales: Array, zero_points: Array
) -> list[bytes]:
    """Packed weight and zero points by compressed-tensors."""
    state = PackedQuantizationCompressor.compress(
        {
            "weight": to_torch(weight, dtype),
            "weight_scale": to_torch(scales, dtype),
            "weight_zero_point": torch.from_numpy(zero_points),
        },
        QuantizationScheme(targets=["Linear"], weights=arguments(group_size)),
    )
    return [state[name].numpy().tobytes() for name in ("weight_packed", "weight_zero_point")]


def quantize(
    weight: Array, dtype: str, group_size: int, scales: Array, zero_points: Array
) -> list[bytes]:
    rows, columns = weight.shape
    packed = np.empty((rows, columns // 8), np.int32)
    packed_zeros = np.empty((-(-rows // 8), columns // group_size), np.int32)
    grid = scales, zero_points
    found = quantize_rows(weight, dtype, 4, group_size, packed, *grid, given=True)
    pack_zero_points(zero_points, 4, packed_zeros)
    assert all_fine == found
    return [packed.tobytes(), packed_zeros.tobytes()]


def as_bytes(results: tuple[Array, Array]) -> list[bytes]:
    return [array.tobytes() for array in results]


def assorted(dtype: str) -> Array:
    return np.concatenate(
        [ordinary(dtype, (67, 128)), corners(dtype), random_patterns(dtype, (60, 128))]
    )


@every_searched_setting
def test_the_search_gives_the_qparams_of_llm_compressor(dtype: str, group_size: int) -> None:
    """Scales and zero points equal those of ``mse`` bit for bit."""
    weight = assorted(dtype)

    assert as_bytes(observed(weight, dtype, group_size, "mse")) == as_bytes(
        mse(weight, dtype, group_size)
    )


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_the_search_over_any_finite_bit_patterns_gives_the_qparams_of_llm_compressor(
    data: st.DataObject,
) -> None:
    """Whatever finite floats a weight holds, the result equals llm-compressor's."""
    dtype = data.draw(st.sampled_from(sixteen_bits))
    group_size = data.draw(st.sampled_from(GROUP_SIZES))
    weight = data.draw(any_finite(dtype, group_size, 1))

    assert as_bytes(observed(weight, dtype, group_size, "mse")) == as_bytes(
        mse(weight, dtype, group_size)
    )


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from(sixteen_bits),
    group_size=st.sampled_from(GROUP_SIZES),
    rows=st.integers(1, 3),
    exponent=st.integers(-12, 8),
    tail=st.sampled_from([1, 2, 4]),
    seed=st.integers(0, 2**32 - 1),
)
# A group with a better factor after five that do not help: few draws have one.
@example(dtype="BF16", group_size=32, rows=1, exponent=-6, tail=1, seed=72)
def test_the_search_ends_where_llm_compressor_ends_it(
    dtype: str, group_size: int, rows: int, exponent: int, tail: int, seed: int
) -> None:
    """In weights of a few groups, of light and of heavy tails, five factors in a row that help
    none of them end the search for all of them."""
    draws = np.random.default_rng(seed).standard_normal((rows, group_size))
    weight = from_float(
        np.clip(np.sign(draws) * abs(draws) ** tail, -99, 99) * 2.0**exponent, dtype
    )

    assert as_bytes(observed(weight, dtype, group_size, "mse")) == as_bytes(
        mse(weight, dtype, group_size)
    )


@pytest.mark.parametrize("dtype", sixteen_bits)
def test_powers_are_those_of_torch(dtype: str) -> None:
    """Each finite positive value to the power 2.4 is torch's, however many are taken at once."""
    values = to_torch(np.arange(EXPONENT[dtype], dtype=np.uint16).view(STORAGE[dtype]), dtype)

    for count in (values.numel(), 7):
        powers = torch.cat([part.pow(2.4) for part in values.split(count)]).float()
        np.testing.assert_array_equal(powers.numpy(), _powers(dtype)[: values.numel()])


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_qparams_give_the_bytes_of_compressed_tensors(data: st.DataObject) -> None:
    """Whatever finite floats are weights and scales, of whatever sign, and whatever the zero
    points, the result equals the compressor's."""
    dtype = data.draw(st.sampled_from(list(STORAGE)))
    group_size = data.draw(st.sampled_from(GROUP_SIZES))
    rows = data.draw(st.integers(1, 9))
    weight = data.draw(any_finite(dtype, group_size, rows))
    shape = rows, weight.shape[1] // group_size
    top = int(np.iinfo(PATTERN[dtype]).max)
    sign = PATTERN[dtype](1 << (8 * weight.itemsize - 1))
    patterns = data.draw(arrays(PATTERN[dtype], shape, elements=st.integers(1, top)))
    scales = finite(np.where(patterns & ~sign, patterns, 1).astype(patterns.dtype), dtype)
    scales[(scales.view(PATTERN[dtype]) & ~sign) == 0] = 1
    zero_points = data.draw(arrays(np.int8, shape, elements=st.integers(-8, 7)))

    assert compress(weight, dtype, group_size, scales, zero_points) == quantize(
        weight, dtype, group_size, scales, zero_points
    )


@every_dtype
def test_exact_ties_give_the_bytes_of_compressed_tensors(dtype: str) -> None:
    """Weights half a step between codes, under each zero point, are rounded as there."""
    halves = np.tile(np.arange(-16, 16) / 2, (16, 4))
    weight = from_float(halves, dtype)
    scales = from_float(np.ones((16, 4)), dtype)
    zero_points = np.repeat(np.arange(-8, 8, dtype=np.int8)[:, None], 4, axis=1)

    assert compress(weight, dtype, 32, scales, zero_points) == quantize(
        weight, dtype, 32, scales, zero_points
    )


@pytest.mark.parametrize("rows", [1, 7, 8, 9, 48])
def test_zero_points_of_any_number_of_rows_are_packed(rows: int) -> None:
    """The words equal those of ``pack_to_int32``, also where the last one is not full."""
    zero_points = np.random.default_rng(1).integers(-8, 8, (rows, 5), np.int8)
    packed = np.empty((-(-rows // 8), 5), np.int32)

    pack_zero_points(zero_points, 4, packed)

    expected = pack_to_int32(torch.from_numpy(zero_points), 4, packed_dim=0)
    np.testing.assert_array_equal(expected.numpy(), packed)


@pytest.mark.parametrize("dtype", sixteen_bits)
@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 128, 12345, 256 * 128 - 1])
def test_the_first_non_finite_element_is_found(dtype: str, value: float, place: int) -> None:
    """The search gives the flat index of the first NaN or Inf, though others follow."""
    weight = ordinary(dtype, (256, 128))
    bad = from_float(np.full(1, value), dtype)[0]
    weight.reshape(-1)[[place, min(place + 500, weight.size - 1), -1]] = bad

    assert place == mse_qparams(weight, dtype, 64, *grid(weight, 64))


def test_a_weight_may_be_read_only_unaligned_or_strided() -> None:
    """A view of file bytes at an odd offset, or every second row, is searched the same."""
    weight = ordinary("BF16", (6, 128))
    unaligned = np.frombuffer(b"x" + weight.tobytes(), np.uint16, offset=1).reshape(6, 128)
    strided = np.repeat(weight, 2, axis=0)[::2]

    expected = as_bytes(mse(weight, "BF16", 64))
    assert expected == as_bytes(mse(unaligned, "BF16", 64))
    assert expected == as_bytes(mse(strided, "BF16", 64))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"dtype": "F64"}, "dtype is 'F64', expected one of BF16, F16"),
        ({"dtype": "F16"}, "weight is uint16[2, 128], expected float16[2, 128]"),
        ({"group_size": 48}, "group_size is 48, expected one of (32, 64, 128)"),
        ({"weight": np.zeros((2, 96), np.uint16)}, "shape [2, 96] is not [rows, a multiple of 64]"),
        (
            {"scales": np.zeros((2, 2), np.float32)},
            "scales is float32[2, 2], expected uint16[2, 2]",
        ),
        (
            {"zero_points": np.zeros((2, 2), np.uint8)},
            "zero_points is uint8[2, 2], expected int8[2, 2]",
        ),
    ],
)
def test_arguments_that_do_not_fit_are_named(change: dict[str, Any], sentence: str) -> None:
    """Each misfit raises ValueError with what was given and what was expected."""
    given_arguments: dict[str, Any] = {
        "weight": np.zeros((2, 128), np.uint16),
        "dtype": "BF16",
        "group_size": 64,
        "scales": np.full((2, 2), 0x3F80, np.uint16),
        "zero_points": np.zeros((2, 2), np.int8),
    }

    with pytest.raises(ValueError) as raised:
        mse_qparams(**(given_arguments | change))

    assert sentence == str(raised.value)


def test_the_search_in_float32_is_refused() -> None:
    """Its powers could not be those of torch."""
    weight = np.zeros((2, 128), np.float32)

    with pytest.raises(ValueError, match="dtype is 'F32', expected one of BF16, F16"):
        mse_qparams(weight, "F32", 64, *grid(weight, 64))
