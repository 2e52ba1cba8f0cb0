"""Affine quantization against mlx, which is the reference."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from carnice_build.kernels.affine import BITS, GROUP_SIZES, dequantize_rows, quantize_rows

Array = np.ndarray[Any, Any]
Quantized = tuple[Array, Array, Array]

STORAGE = {"BF16": np.uint16, "F16": np.float16, "F32": np.float32}
PATTERN = {"BF16": np.uint16, "F16": np.uint16, "F32": np.uint32}
EXPONENT = {"BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F800000}
all_finite = -1
"""What a kernel returns that met no NaN and no Inf."""

MLX = {"BF16": mx.bfloat16, "F16": mx.float16, "F32": mx.float32}

every_setting = pytest.mark.parametrize(
    ("bits", "group_size", "dtype"), [(b, g, d) for b in BITS for g in GROUP_SIZES for d in STORAGE]
)
every_dtype = pytest.mark.parametrize("dtype", STORAGE)


@pytest.fixture(autouse=True)
def _mlx_on_the_cpu() -> None:
    mx.set_default_device(mx.cpu)


def to_mlx(array: Array, dtype: str) -> mx.array:
    return mx.array(array).view(MLX[dtype])


def from_float32(values: Array, dtype: str) -> Array:
    """Rounded to ``dtype`` by mlx, in the storage of ``dtype``."""
    rounded = mx.array(values.astype(np.float32)).astype(MLX[dtype])
    return np.array(rounded.view(mx.uint16) if dtype == "BF16" else rounded)


def outputs(weight: Array, bits: int, group_size: int) -> Quantized:
    rows, cols = weight.shape
    packed = np.empty((rows, cols * bits // 32), np.uint32)
    scales = np.empty((rows, cols // group_size), weight.dtype)
    return packed, scales, np.empty_like(scales)


def quantize(weight: Array, dtype: str, bits: int, group_size: int) -> Quantized:
    results = outputs(weight, bits, group_size)
    assert all_finite == quantize_rows(weight, dtype, bits, group_size, *results)
    return results


def reference(weight: Array, dtype: str, bits: int, group_size: int) -> Quantized:
    packed, scales, biases = mx.quantize(to_mlx(weight, dtype), group_size, bits, mode="affine")
    if dtype == "BF16":
        scales, biases = scales.view(mx.uint16), biases.view(mx.uint16)
    return np.array(packed), np.array(scales), np.array(biases)


def as_bytes(results: Quantized) -> list[bytes]:
    return [array.tobytes() for array in results]


def finite(patterns: Array, dtype: str) -> Array:
    """The patterns as floats, each NaN and Inf made finite by its lowest exponent bit."""
    mask = EXPONENT[dtype]
    special = (patterns & mask) == mask
    return (patterns ^ np.where(special, mask & -mask, 0).astype(patterns.dtype)).view(
        STORAGE[dtype]
    )


def random_patterns(dtype: str, shape: tuple[int, int], seed: int = 0) -> Array:
    """Values of every magnitude the format has, denormals and both zeros among them."""
    top = np.iinfo(PATTERN[dtype]).max
    draws = np.random.default_rng(seed).integers(0, top, shape, PATTERN[dtype], endpoint=True)
    return finite(draws, dtype)


def ordinary(dtype: str, shape: tuple[int, int], seed: int = 0) -> Array:
    """Values as weights have them."""
    return from_float32(np.random.default_rng(seed).standard_normal(shape) * 0.02, dtype)


def adversarial(dtype: str) -> Array:
    """Rows of 128 values at the corners of the rule."""
    largest = {"BF16": 3.38e38, "F16": 65504.0, "F32": 3.4e38}[dtype]
    smallest = {"BF16": 1e-40, "F16": 6e-8, "F32": 1e-45}[dtype]
    ramp = np.arange(128, dtype=np.float64)
    rows = [
        ramp * 0,
        ramp * -0.0,
        np.where(ramp % 2, -0.0, 0.0),
        ramp * 0 + 1,
        ramp * 0 - 1,
        ramp * 0 + largest,
        ramp * 0 - largest,
        np.where(ramp % 2, largest, -largest),
        np.where(ramp % 3, largest / 2, -largest),
        ramp * 0 + smallest,
        ramp * smallest,
        ramp * -smallest,
        np.where(ramp % 2, smallest, -smallest),
        np.where(ramp % 2, 1e-7, -1e-7),
        np.where(ramp % 5, 0.4e-7, -0.6e-7),
        np.where(ramp % 32, 0, 1),
        np.where(ramp % 32, 0, -1),
        np.where(ramp % 32, 1e-3, 100),
        ramp + 1,
        -ramp - 1,
        ramp - 64,
        (ramp - 63.5) / 8,
        (ramp % 16) / 2,
        -(ramp % 16) / 2,
        (ramp % 32) / 4 - 4,
        np.where(ramp % 2, 1, -1),
        np.where(ramp % 2, 1 + 2**-7, -1),
        np.where(ramp % 2, 1, -1 - 2**-7),
    ]
    return from_float32(np.stack(rows), dtype)


@every_setting
def test_every_setting_gives_the_bytes_of_mlx(bits: int, group_size: int, dtype: str) -> None:
    """Codes, scales and biases equal mlx's bit for bit, on ordinary weights, on the corners
    of the rule and on random bit patterns."""
    weight = np.concatenate(
        [
            ordinary(dtype, (67, 128)),
            adversarial(dtype),
            random_patterns(dtype, (50, 128)),
        ]
    )

    assert as_bytes(reference(weight, dtype, bits, group_size)) == as_bytes(
        quantize(weight, dtype, bits, group_size)
    )


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_finite_bit_patterns_give_the_bytes_of_mlx(data: st.DataObject) -> None:
    """Whatever finite floats a weight holds, the result equals mlx's bit for bit."""
    dtype = data.draw(st.sampled_from(list(STORAGE)))
    bits = data.draw(st.sampled_from(BITS))
    group_size = data.draw(st.sampled_from(GROUP_SIZES))
    shape = (data.draw(st.integers(1, 3)), group_size * data.draw(st.integers(1, 2)))
    top = int(np.iinfo(PATTERN[dtype]).max)
    weight = finite(
        data.draw(arrays(PATTERN[dtype], shape, elements=st.integers(0, top))),
        dtype,
    )

    assert as_bytes(reference(weight, dtype, bits, group_size)) == as_bytes(
        quantize(weight, dtype, bits, group_size)
    )


@settings(max_examples=50, deadline=None)
@given(
    dtype=st.sampled_from(list(STORAGE)),
    bits=st.sampled_from(BITS),
    exponent=st.integers(-30, 30),
    mean=st.floats(-4, 4),
    seed=st.integers(0, 2**32 - 1),
)
def test_weights_of_any_scale_and_offset_give_the_bytes_of_mlx(
    dtype: str, bits: int, exponent: int, mean: float, seed: int
) -> None:
    """Normal values times 2**exponent, around any mean, are quantized as mlx does it."""
    draws = np.random.default_rng(seed).standard_normal((16, 128)) + mean
    limit = 60000 if dtype == "F16" else 1e30
    weight = from_float32(np.clip(draws * 2.0**exponent, -limit, limit), dtype)

    assert as_bytes(reference(weight, dtype, bits, 64)) == as_bytes(
        quantize(weight, dtype, bits, 64)
    )


@every_dtype
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_blocks_of_rows_on_threads_give_the_bytes_of_the_whole(dtype: str, group_size: int) -> None:
    """Uneven blocks of rows, quantized by four threads into one set of outputs, leave what one
    call for all the rows leaves."""
    weight = ordinary(dtype, (301, 640))
    parts = outputs(weight, 3, group_size)
    edges = [0, 1, 8, 40, 41, 127, 200, 300, 301]

    def one_block(start: int, stop: int) -> int:
        blocks = [array[start:stop] for array in parts]
        return quantize_rows(weight[start:stop], dtype, 3, group_size, *blocks)

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(one_block, edges[:-1], edges[1:]))

    assert {all_finite} == set(found)
    assert as_bytes(quantize(weight, dtype, 3, group_size)) == as_bytes(parts)


@every_dtype
@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 127, 128, 4096, 12345, 256 * 128 - 1])
def test_the_first_non_finite_element_is_found(dtype: str, value: float, place: int) -> None:
    """The result is the flat index of the first NaN or Inf, though others follow."""
    weight = ordinary(dtype, (256, 128))
    bad = from_float32(np.full(1, value), dtype)[0]
    weight.reshape(-1)[[place, min(place + 500, weight.size - 1), -1]] = bad

    assert place == quantize_rows(weight, dtype, 4, 64, *outputs(weight, 4, 64))


@every_dtype
def test_the_largest_finite_values_are_not_taken_for_infinite(dtype: str) -> None:
    """Patterns one below Inf, of either sign, pass."""
    weight = np.full((2, 64), EXPONENT[dtype] - 1, PATTERN[dtype])
    weight[1] |= PATTERN[dtype](1 << (8 * weight.itemsize - 1))

    quantize(weight.view(STORAGE[dtype]), dtype, 4, 64)


def test_a_weight_may_be_read_only_unaligned_or_strided() -> None:
    """A view of file bytes at an odd offset, or every second row, is quantized the same."""
    weight = ordinary("BF16", (6, 128))
    unaligned = np.frombuffer(b"x" + weight.tobytes(), np.uint16, offset=1).reshape(6, 128)
    strided = np.repeat(weight, 2, axis=0)[::2]

    assert as_bytes(quantize(weight, "BF16", 4, 64)) == as_bytes(quantize(unaligned, "BF16", 4, 64))
    assert as_bytes(quantize(weight, "BF16", 4, 64)) == as_bytes(quantize(strided, "BF16", 4, 64))


def test_a_weight_without_rows_is_nothing_to_do() -> None:
    """Zero rows are quantized to zero rows."""
    quantize(np.empty((0, 128), np.uint16), "BF16", 4, 64)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"dtype": "F64"}, "dtype is 'F64', expected one of BF16, F16, F32"),
        ({"dtype": "F16"}, "weight is uint16[2, 128], expected float16[2, 128]"),
        ({"bits": 7}, "bits is 7, expected one of (2, 3, 4, 5, 6, 8)"),
        ({"group_size": 48}, "group_size is 48, expected one of (32, 64, 128)"),
        ({"weight": np.zeros((2, 96), np.uint16)}, "shape [2, 96] is not [rows, a multiple of 64]"),
        ({"weight": np.zeros(128, np.uint16)}, "shape [128] is not [rows, a multiple of 64]"),
        ({"bits": 3}, "packed is uint32[2, 16], expected uint32[2, 12]"),
        (
            {"scales": np.zeros((2, 2), np.float32)},
            "scales is float32[2, 2], expected uint16[2, 2]",
        ),
        ({"biases": np.zeros((2, 3), np.uint16)}, "biases is uint16[2, 3], expected uint16[2, 2]"),
        (
            {"packed": np.zeros((2, 32), np.uint32)[:, ::2]},
            "packed must be C-contiguous and aligned",
        ),
    ],
)
def test_arguments_that_do_not_fit_are_named(change: dict[str, Any], sentence: str) -> None:
    """Each misfit raises ValueError with what was given and what was expected."""
    weight = np.zeros((2, 128), np.uint16)
    packed, scales, biases = outputs(weight, 4, 64)
    arguments: dict[str, Any] = {
        "weight": weight,
        "dtype": "BF16",
        "bits": 4,
        "group_size": 64,
        "packed": packed,
        "scales": scales,
        "biases": biases,
    }

    with pytest.raises(ValueError) as raised:
        quantize_rows(**(arguments | change))

    assert sentence == str(raised.value)


@every_setting
def test_dequantizing_equals_mlx_in_float32(bits: int, group_size: int, dtype: str) -> None:
    """The result equals mlx.dequantize of the same codes with scales and biases widened to
    float32, bit for bit."""
    weight = np.concatenate([ordinary(dtype, (20, 384)), random_patterns(dtype, (20, 384))])
    packed, scales, biases = quantize(weight, dtype, bits, group_size)
    wide = [to_mlx(part, dtype).astype(mx.float32) for part in (scales, biases)]
    expected = mx.dequantize(mx.array(packed), *wide, group_size, bits)
    restored = np.empty(weight.shape, np.float32)

    dequantize_rows(packed, scales, biases, dtype, bits, group_size, restored)

    np.testing.assert_array_equal(np.array(expected), restored)


@pytest.mark.parametrize("bits", BITS)
def test_a_restored_weight_is_within_a_step_of_the_original(bits: int) -> None:
    """No float32 weight moves by more than its group's scale."""
    weight = ordinary("F32", (32, 256))
    packed, scales, biases = quantize(weight, "F32", bits, 64)
    restored = np.empty_like(weight)

    dequantize_rows(packed, scales, biases, "F32", bits, 64, restored)

    step = np.repeat(np.abs(scales), 64, axis=1)
    assert np.all(np.abs(restored - weight) <= step * 1.0001)


def test_a_second_process_loads_the_kernel_from_disk() -> None:
    """Once compiled here, a kernel is loaded, not compiled, by another process."""
    quantize(ordinary("BF16", (2, 128)), "BF16", 4, 64)
    script = (
        "import numpy as np\n"
        "from carnice_build.kernels import _affine_loops as loops\n"
        "from carnice_build.kernels.affine import quantize_rows\n"
        "scales = np.empty((2, 2), np.uint16)\n"
        "packed = np.empty((2, 12), np.uint32)\n"
        "weight = np.ones((2, 128), np.uint16)\n"
        "quantize_rows(weight, 'BF16', 3, 64, packed, scales, scales.copy())\n"
        "stats = loops.quantize_bf16.stats\n"
        "print(sum(stats.cache_hits.values()), sum(stats.cache_misses.values()))\n"
    )

    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)

    hits_and_misses = "1 0\n"
    assert hits_and_misses == done.stdout, done.stderr
