"""The pack-quantized format against compressed-tensors and llm-compressor, the references."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
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

from carnice_build.kernels.compressed import (
    _powers,
    minmax_qparams,
    mse_qparams,
    pack_zero_points,
    quantize_affine,
)

every_setting = pytest.mark.parametrize(
    ("dtype", "group_size"), [(d, g) for d in STORAGE for g in GROUP_SIZES]
)
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


def minmax(weight: Array, dtype: str, group_size: int) -> tuple[Array, Array]:
    results = grid(weight, group_size)
    assert all_fine == minmax_qparams(weight, dtype, group_size, *results)
    return results


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
    found = quantize_affine(weight, dtype, group_size, scales, zero_points, packed)
    pack_zero_points(zero_points, packed_zeros)
    assert all_fine == found
    return [packed.tobytes(), packed_zeros.tobytes()]


def as_bytes(results: tuple[Array, Array]) -> list[bytes]:
    return [array.tobytes() for array in results]


def assorted(dtype: str) -> Array:
    return np.concatenate(
        [ordinary(dtype, (67, 128)), corners(dtype), random_patterns(dtype, (60, 128))]
    )


@every_setting
def test_extremes_give_the_qparams_of_llm_compressor(dtype: str, group_size: int) -> None:
    """Scales and zero points equal those of ``memoryless_minmax`` bit for bit, on ordinary
    weights, on the corners of the rule and on random bit patterns."""
    weight = assorted(dtype)

    assert as_bytes(observed(weight, dtype, group_size, "memoryless_minmax")) == as_bytes(
        minmax(weight, dtype, group_size)
    )


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_extremes_of_any_finite_bit_patterns_give_the_qparams_of_llm_compressor(
    data: st.DataObject,
) -> None:
    """Whatever finite floats a weight holds, the result equals llm-compressor's."""
    dtype = data.draw(st.sampled_from(list(STORAGE)))
    group_size = data.draw(st.sampled_from(GROUP_SIZES))
    weight = data.draw(any_finite(dtype, group_size, 2))

    assert as_bytes(observed(weight, dtype, group_size, "memoryless_minmax")) == as_bytes(
        minmax(weight, dtype, group_size)
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


@every_setting
def test_every_setting_gives_the_bytes_of_compressed_tensors(dtype: str, group_size: int) -> None:
    """Packed codes and zero points equal those of the compressor, given the scales and zero
    points of the extremes."""
    weight = np.concatenate([ordinary(dtype, (67, 128)), corners(dtype)])
    qparams = minmax(weight, dtype, group_size)

    assert compress(weight, dtype, group_size, *qparams) == quantize(
        weight, dtype, group_size, *qparams
    )


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

    pack_zero_points(zero_points, packed)

    expected = pack_to_int32(torch.from_numpy(zero_points), 4, packed_dim=0)
    np.testing.assert_array_equal(expected.numpy(), packed)


@every_dtype
def test_blocks_of_rows_on_threads_give_the_bytes_of_the_whole(dtype: str) -> None:
    """Uneven blocks of rows, through both functions on four threads, leave what one call for
    all the rows leaves."""
    weight = ordinary(dtype, (301, 640))
    scales, zero_points = grid(weight, 64)
    packed = np.empty((301, 80), np.int32)
    edges = [0, 1, 8, 40, 41, 127, 200, 300, 301]

    def one_block(start: int, stop: int) -> tuple[int, int]:
        rows = slice(start, stop)
        qparams = scales[rows], zero_points[rows]
        return (
            minmax_qparams(weight[rows], dtype, 64, *qparams),
            quantize_affine(weight[rows], dtype, 64, *qparams, packed[rows]),
        )

    with ThreadPoolExecutor(4) as pool:
        found = set(pool.map(one_block, edges[:-1], edges[1:]))

    qparams = minmax(weight, dtype, 64)
    assert {(all_fine, all_fine)} == found
    assert as_bytes(qparams) == [scales.tobytes(), zero_points.tobytes()]
    assert quantize(weight, dtype, 64, *qparams)[0] == packed.tobytes()


@every_dtype
@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 128, 12345, 256 * 128 - 1])
def test_the_first_non_finite_element_is_found(dtype: str, value: float, place: int) -> None:
    """Each function gives the flat index of the first NaN or Inf, though others follow."""
    weight = ordinary(dtype, (256, 128))
    scales, zero_points = minmax(weight, dtype, 64)
    bad = from_float(np.full(1, value), dtype)[0]
    weight.reshape(-1)[[place, min(place + 500, weight.size - 1), -1]] = bad
    packed = np.empty((256, 16), np.int32)

    assert place == quantize_affine(weight, dtype, 64, scales, zero_points, packed)
    assert place == minmax_qparams(weight, dtype, 64, scales, zero_points)
    if dtype in sixteen_bits:
        assert place == mse_qparams(weight, dtype, 64, scales, zero_points)


def test_a_weight_may_be_read_only_unaligned_or_strided() -> None:
    """A view of file bytes at an odd offset, or every second row, is quantized the same."""
    weight = ordinary("BF16", (6, 128))
    qparams = minmax(weight, "BF16", 64)
    unaligned = np.frombuffer(b"x" + weight.tobytes(), np.uint16, offset=1).reshape(6, 128)
    strided = np.repeat(weight, 2, axis=0)[::2]

    expected = quantize(weight, "BF16", 64, *qparams)
    assert expected == quantize(unaligned, "BF16", 64, *qparams)
    assert expected == quantize(strided, "BF16", 64, *qparams)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"dtype": "F64"}, "dtype is 'F64', expected one of BF16, F16, F32"),
        ({"dtype": "F16"}, "weight is uint16[2, 128], expected float16[2, 128]"),
        ({"group_size": 48}, "group_size is 48, expected one of (32, 64, 128)"),
        ({"weight": np.zeros((2, 96), np.uint16)}, "shape [2, 96] is not [rows, a multiple of 64]"),
        (
            {"scales": np.zeros((2, 2), np.float32)},
            "scales is float32[2, 2], expected uint16[2, 2]",
        ),
        ({"scales": np.full((2, 2), 0x8000, np.uint16)}, "a scale is 0 or not finite"),
        ({"scales": np.full((2, 2), 0x7F80, np.uint16)}, "a scale is 0 or not finite"),
        (
            {"zero_points": np.zeros((2, 2), np.uint8)},
            "zero_points is uint8[2, 2], expected int8[2, 2]",
        ),
        ({"zero_points": np.full((2, 2), 8, np.int8)}, "a zero point is not in -8..7"),
        (
            {"packed": np.zeros((2, 12), np.int32)},
            "packed is int32[2, 12], expected int32[2, 16]",
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
        "packed": np.empty((2, 16), np.int32),
    }

    with pytest.raises(ValueError) as raised:
        quantize_affine(**(given_arguments | change))

    assert sentence == str(raised.value)


def test_the_search_in_float32_is_refused() -> None:
    """Its powers could not be those of torch."""
    weight = np.zeros((2, 128), np.float32)

    with pytest.raises(ValueError, match="dtype is 'F32', expected one of BF16, F16"):
        mse_qparams(weight, "F32", 64, *grid(weight, 64))
