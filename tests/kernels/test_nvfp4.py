"""NVFP4 quantization against modelopt, which is the reference."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import modelopt.torch.quantization as mtq
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from modelopt.torch.export.unified_export_hf import _export_quantized_weight
from modelopt.torch.quantization.qtensor import NVFP4QTensor

from carnice_build.kernels.nvfp4 import (
    amax,
    dequantize_rows,
    input_scale,
    quantize_rows,
    round_rows,
    weight_scale_2,
)

Array = np.ndarray[Any, Any]
Quantized = tuple[Array, Array]

STORAGE = {"BF16": np.uint16, "F16": np.float16, "F32": np.float32}
PATTERN = {"BF16": np.uint16, "F16": np.uint16, "F32": np.uint32}
EXPONENT = {"BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F800000}
TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}

TIES = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
"""The quotients that lie midway between two values of E2M1."""

ONE, SMALLEST, LARGEST = 0x38, 0x01, 0x7E
"""1, 2**-9 and 448 in E4M3."""

all_finite = -1
"""What a kernel returns that met no NaN and no Inf."""

every_dtype = pytest.mark.parametrize("dtype", STORAGE)


def to_torch(array: Array, dtype: str) -> torch.Tensor:
    return torch.from_numpy(array.copy()).view(TORCH[dtype])


def from_torch(tensor: torch.Tensor) -> Array:
    narrow = {torch.bfloat16: torch.uint16, torch.float8_e4m3fn: torch.uint8}
    view: Array = tensor.detach().view(narrow.get(tensor.dtype, tensor.dtype)).numpy()
    return view


def from_float(values: Any, dtype: str) -> Array:
    """Rounded to ``dtype`` by torch, in the storage of ``dtype``."""
    return from_torch(torch.tensor(np.asarray(values, np.float64)).to(TORCH[dtype]))


def outputs(weight: Array) -> Quantized:
    rows, cols = weight.shape
    return np.empty((rows, cols // 2), np.uint8), np.empty((rows, cols // 16), np.uint8)


def quantize(weight: Array, dtype: str, scale_2: float) -> Quantized:
    results = outputs(weight)
    assert all_finite == quantize_rows(weight, dtype, scale_2, *results)
    return results


def reference(weight: Array, dtype: str, scale_2: float) -> Quantized:
    quantized, scales, _ = NVFP4QTensor.quantize(
        to_torch(weight, dtype), 16, None, torch.tensor(scale_2, dtype=torch.float32)
    )
    return quantized._quantized_data.numpy(), from_torch(scales)


def dequantize(packed: Array, scales: Array, scale_2: float) -> Array:
    restored = np.empty((packed.shape[0], packed.shape[1] * 2), np.float32)
    dequantize_rows(packed, scales, scale_2, restored)
    return restored


def rounded(rows: Array, scale_2: float) -> Array:
    out = np.empty_like(rows)
    assert all_finite == round_rows(rows, scale_2, out)
    return out


def as_bytes(arrays: Any) -> list[bytes]:
    return [array.tobytes() for array in arrays]


def scale_2_of(weight: Array, dtype: str) -> np.float32:
    largest, bad = amax(weight, dtype)
    assert all_finite == bad
    return weight_scale_2(largest)


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
    return from_float(np.random.default_rng(seed).standard_normal(shape) * 0.02, dtype)


def ties(dtype: str) -> Array:
    """One block per power of two, whose step is that power under ``scale_2`` 1: its values lie
    at every midpoint of E2M1 and next to it, with both signs."""
    middle = np.array(TIES[:-1]) * np.array(
        [[1], [1 + 2.0**-7], [1 - 2.0**-8], [1 + 2.0**-23], [1 - 2.0**-24]]
    )
    blocks = [
        np.concatenate([[6, 5], sign * row, -sign * row, [0, -0.0]])
        for row in middle
        for sign in (1, -1)
    ]
    blocks += [np.array([6, 5, -5, 5.03125, 4.96875, -5.03125, -4.96875] + [0.0] * 9)]
    powers = 2.0 ** np.arange(-8, 8)
    return from_float(np.stack([block * p for p in powers for block in blocks]), dtype)


def one_block(*values: float) -> Array:
    block = np.zeros((1, 16), np.float32)
    block[0, : len(values)] = values
    return block


@every_dtype
def test_weights_get_the_bytes_of_modelopt(dtype: str) -> None:
    """Codes and scales equal modelopt's bit for bit, on ordinary weights and on random bit
    patterns, with the scale_2 that modelopt computes."""
    for weight in (ordinary(dtype, (300, 160)), random_patterns(dtype, (300, 160))):
        scale_2 = scale_2_of(weight, dtype)
        theirs = NVFP4QTensor.get_weights_scaling_factor_2(to_torch(weight, dtype))

        assert theirs.item() == scale_2
        assert as_bytes(reference(weight, dtype, scale_2)) == as_bytes(
            quantize(weight, dtype, scale_2)
        )


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_finite_bit_patterns_and_any_scale_get_the_bytes_of_modelopt(
    data: st.DataObject,
) -> None:
    """Whatever finite floats a weight holds, and whatever positive float32 scale_2 is, the
    result equals modelopt's bit for bit."""
    dtype = data.draw(st.sampled_from(list(STORAGE)))
    shape = (data.draw(st.integers(1, 3)), 16 * data.draw(st.integers(1, 3)))
    top = int(np.iinfo(PATTERN[dtype]).max)
    weight = finite(
        data.draw(arrays(PATTERN[dtype], shape, elements=st.integers(0, top))),
        dtype,
    )
    scale_2 = data.draw(st.floats(0, 2.0**127, width=32, exclude_min=True))

    assert as_bytes(reference(weight, dtype, scale_2)) == as_bytes(quantize(weight, dtype, scale_2))


@settings(max_examples=100, deadline=None)
@given(
    dtype=st.sampled_from(list(STORAGE)),
    exponent=st.integers(-30, 30),
    spread=st.integers(0, 20),
    headroom=st.floats(0.01, 100),
    seed=st.integers(0, 2**32 - 1),
)
def test_weights_of_any_scale_get_the_bytes_of_modelopt(
    dtype: str, exponent: int, spread: int, headroom: float, seed: int
) -> None:
    """Normal values whose blocks differ by powers of two are quantized as modelopt does it,
    under the scale_2 of a tensor larger or smaller than they are."""
    generator = np.random.default_rng(seed)
    draws = generator.standard_normal((8, 4, 16)) * 2.0**exponent
    draws *= 2.0 ** generator.integers(-spread, 1, (8, 4, 1))
    limit = 60000 if dtype == "F16" else 1e30
    weight = from_float(np.clip(draws, -limit, limit).reshape(8, 64), dtype)
    scale_2 = np.float32(scale_2_of(weight, dtype) * np.float32(headroom))

    assert as_bytes(reference(weight, dtype, scale_2)) == as_bytes(quantize(weight, dtype, scale_2))


@every_dtype
def test_midpoints_go_to_the_even_code(dtype: str) -> None:
    """Quotients at every midpoint of E2M1, and next to it, get the code of modelopt."""
    weight = ties(dtype)

    assert as_bytes(reference(weight, dtype, 1.0)) == as_bytes(quantize(weight, dtype, 1.0))


def test_each_midpoint_has_its_code() -> None:
    """0.25 becomes 0, 0.75 becomes 1, and so on: of two neighbours the one with an even code."""
    packed, _ = quantize(one_block(6, 0, *TIES), "F32", 1.0)

    codes = np.stack([packed & 0xF, packed >> 4], axis=-1).reshape(-1)
    assert [7, 0, 0, 2, 2, 4, 4, 6, 6] == codes[:9].tolist()


def test_scales_stay_within_e4m3() -> None:
    """A block too small for its tensor gets the scale 2**-9, one too large 448, as in modelopt,
    and a block of zeros 1."""
    weight = np.concatenate([one_block(1e-6), one_block(6e4), one_block(0, -0.0)])
    results = quantize(weight, "F32", 1.0)

    assert [[SMALLEST], [LARGEST], [ONE]] == results[1].tolist()
    assert as_bytes(reference(weight, "F32", 1.0)) == as_bytes(results)


def test_the_sign_of_zero_is_that_of_modelopt() -> None:
    """A negative value that rounds to zero keeps its sign bit; negative zero has none."""
    weight = one_block(6, 6, -0.1, 0.1, -0.0, 0.0)
    packed, scales = quantize(weight, "F32", 1.0)

    assert [0x77, 0x08, 0x00] == packed[0, :3].tolist()
    assert as_bytes(reference(weight, "F32", 1.0)) == as_bytes((packed, scales))


@every_dtype
def test_a_weight_of_zeros_becomes_exact_zeros(dtype: str) -> None:
    """Where modelopt gives NaN scales, ours are 1 and every value is restored as zero."""
    weight = from_float(np.zeros((4, 32)), dtype)
    scale_2 = scale_2_of(weight, dtype)
    packed, scales = quantize(weight, dtype, scale_2)
    _, theirs, _ = NVFP4QTensor.quantize(to_torch(weight, dtype), 16)

    assert theirs.float().isnan().all()
    assert np.float32(1 / 448) == scale_2
    assert {ONE} == set(scales.flat)
    np.testing.assert_array_equal(
        np.zeros((4, 32), np.float32), dequantize(packed, scales, scale_2)
    )


def test_a_weight_too_small_for_a_scale_becomes_exact_zeros() -> None:
    """Where amax / 2688 underflows, every value is restored as zero."""
    weight = one_block(1e-42, -1e-42)
    scale_2 = scale_2_of(weight, "F32")

    assert not dequantize(*quantize(weight, "F32", scale_2), scale_2).any()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("gain", [1.0, 0.0])
def test_a_linear_is_exported_as_modelopt_exports_it(gain: float) -> None:
    """weight, weight_scale, weight_scale_2 and input_scale of a calibrated linear equal what
    modelopt's export makes of it, also where calibration saw only zeros."""
    inputs = torch.randn(5, 64, dtype=torch.bfloat16) * gain
    linear = torch.nn.Linear(64, 32, bias=False, dtype=torch.bfloat16)
    weight = from_torch(linear.weight).copy()
    model = mtq.quantize(torch.nn.Sequential(linear), mtq.NVFP4_DEFAULT_CFG, lambda m: m(inputs))
    _export_quantized_weight(model[0], torch.bfloat16)
    exported = model[0].state_dict()
    scale_2 = scale_2_of(weight, "BF16")
    packed, scales = quantize(weight, "BF16", scale_2)

    assert exported["weight_scale_2"].item() == scale_2
    assert exported["input_scale"].item() == input_scale(float(inputs.abs().max()))
    np.testing.assert_array_equal(from_torch(exported["weight_scale"]), scales)
    np.testing.assert_array_equal(exported["weight"].numpy(), packed)


@every_dtype
def test_blocks_of_rows_on_threads_give_the_bytes_of_the_whole(dtype: str) -> None:
    """Uneven blocks of rows, quantized by four threads into one set of outputs, leave what one
    call for all the rows leaves."""
    weight = ordinary(dtype, (301, 640))
    parts = outputs(weight)
    edges = [0, 1, 8, 40, 41, 127, 200, 300, 301]

    def one_part(start: int, stop: int) -> int:
        return quantize_rows(weight[start:stop], dtype, 3e-5, *(a[start:stop] for a in parts))

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(one_part, edges[:-1], edges[1:]))

    assert {all_finite} == set(found)
    assert as_bytes(quantize(weight, dtype, 3e-5)) == as_bytes(parts)


@every_dtype
@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 127, 4095, 4096, 12345, 256 * 128 - 1])
def test_the_first_non_finite_element_is_found(dtype: str, value: float, place: int) -> None:
    """Both passes over a weight return the flat index of the first NaN or Inf, though others
    follow."""
    weight = ordinary(dtype, (256, 128))
    bad = from_float([value], dtype)[0]
    weight.reshape(-1)[[place, min(place + 500, weight.size - 1), -1]] = bad

    assert place == quantize_rows(weight, dtype, 1.0, *outputs(weight))
    assert place == amax(weight, dtype)[1]


def test_the_first_non_finite_activation_is_found() -> None:
    """Rounding returns the flat index of the first NaN or Inf."""
    rows = ordinary("F32", (400, 32))
    rows[300, 5] = np.nan
    rows[301, 0] = np.inf

    assert 300 * 32 + 5 == round_rows(rows, 1.0, np.empty_like(rows))


@every_dtype
def test_the_largest_finite_values_are_not_taken_for_infinite(dtype: str) -> None:
    """Patterns one below Inf, of either sign, pass, and are the amax."""
    patterns = np.full((2, 32), EXPONENT[dtype] - 1, PATTERN[dtype])
    patterns[1] |= PATTERN[dtype](1 << (8 * patterns.itemsize - 1))
    weight = patterns.view(STORAGE[dtype])

    assert (torch.finfo(TORCH[dtype]).max, all_finite) == amax(weight, dtype)
    quantize(weight, dtype, 1.0)


@every_dtype
def test_amax_is_the_largest_magnitude(dtype: str) -> None:
    """It equals torch's, of values of either sign and any magnitude; of nothing it is 0."""
    for weight in (ordinary(dtype, (7, 23)), random_patterns(dtype, (64, 48))):
        expected = to_torch(weight, dtype).abs().max().item()

        assert (expected, all_finite) == amax(weight, dtype)
    assert (0, all_finite) == amax(weight[:0], dtype)


def test_every_code_under_every_scale_is_restored_as_modelopt_does() -> None:
    """All 256 pairs of codes under all 256 bit patterns of E4M3, NaN and negative ones too,
    equal ``NVFP4QTensor.dequantize`` to float32 bit for bit."""
    packed = np.tile(np.arange(256, dtype=np.uint8), (256, 1))
    scales = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 32, axis=1)
    scale_2 = np.float32(1.7e-5)
    tensor = NVFP4QTensor(torch.Size((256, 512)), torch.float32, torch.from_numpy(packed))
    expected = tensor.dequantize(
        scale=torch.from_numpy(scales).view(torch.float8_e4m3fn),
        double_scale=torch.tensor(scale_2),
        block_sizes={-1: 16},
    ).numpy()

    restored = dequantize(packed, scales, scale_2)

    number = ~np.isnan(expected)
    np.testing.assert_array_equal(expected, restored)
    np.testing.assert_array_equal(np.signbit(expected)[number], np.signbit(restored)[number])


@settings(max_examples=50, deadline=None)
@given(exponent=st.integers(-1, 20), headroom=st.floats(0.25, 4), seed=st.integers(0, 2**32 - 1))
def test_rounding_is_quantizing_and_restoring(exponent: int, headroom: float, seed: int) -> None:
    """Activations of usual size are rounded to what modelopt restores from their codes, bit for
    bit, below and beyond the calibrated amax."""
    rows = np.random.default_rng(seed).standard_normal((4, 64), np.float32) * 2.0**exponent
    rows = np.concatenate([rows.astype(np.float32), one_block(0, -0.0).repeat(4, axis=1)])
    scale_2 = np.float32(input_scale(float(np.abs(rows).max())) * np.float32(headroom))
    quantized, scales, double = NVFP4QTensor.quantize(
        torch.from_numpy(rows.copy()), 16, None, torch.tensor(scale_2)
    )
    expected = quantized.dequantize(scale=scales, double_scale=double, block_sizes={-1: 16})

    assert expected.numpy().tobytes() == rounded(rows, scale_2).tobytes()


@pytest.mark.parametrize(
    ("values", "scale_2", "expected"),
    [
        ((3e-3, -1e-3), 1.0, (0, 0)),
        ((6 * 2.0**-9, -0.5 * 2.0**-9), 1.0, (6 * 2.0**-9, -0.5 * 2.0**-9)),
        ((6 * 2.0**-10 * 1.01,), 1.0, (3 * 2.0**-9,)),
        ((6 * 9e-6, -3 * 9e-6), 1e-6, (0, 0)),
        ((6 * 11e-6, -3 * 11e-6), 1e-6, (66e-6, -33e-6)),
    ],
)
def test_small_blocks_are_rounded_as_on_a_gpu(
    values: tuple[float, ...], scale_2: float, expected: tuple[float, ...]
) -> None:
    """A scale that rounds to zero, and a step below 1e-5, make zeros of a block; the smallest
    ones above these do not."""
    result = rounded(one_block(*values), scale_2)

    np.testing.assert_allclose(one_block(*expected), result, rtol=1e-6)
    assert not np.signbit(result[result == 0]).any()


def test_activations_may_be_rounded_in_place() -> None:
    """The result may take the place of the activations."""
    rows = ordinary("F32", (40, 256))
    expected = rounded(rows, 1e-5)

    assert all_finite == round_rows(rows, 1e-5, rows)
    np.testing.assert_array_equal(expected, rows)


def test_a_weight_may_be_read_only_unaligned_or_strided() -> None:
    """A view of file bytes at an odd offset, or every second row, is quantized the same."""
    weight = ordinary("BF16", (6, 128))
    unaligned = np.frombuffer(b"x" + weight.tobytes(), np.uint16, offset=1).reshape(6, 128)
    strided = np.repeat(weight, 2, axis=0)[::2]
    expected = as_bytes(quantize(weight, "BF16", 3e-5))

    assert expected == as_bytes(quantize(unaligned, "BF16", 3e-5))
    assert expected == as_bytes(quantize(strided, "BF16", 3e-5))
    assert amax(weight, "BF16") == amax(unaligned, "BF16") == amax(strided, "BF16")


def test_a_weight_without_rows_is_nothing_to_do() -> None:
    """Zero rows are quantized to zero rows."""
    quantize(np.empty((0, 128), np.uint16), "BF16", 1.0)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"dtype": "F64"}, "dtype is 'F64', expected one of BF16, F16, F32"),
        ({"dtype": "F16"}, "rows is uint16[2, 128], expected float16[2, 128]"),
        ({"rows": np.zeros((2, 40), np.uint16)}, "shape [2, 40] is not [rows, a multiple of 16]"),
        ({"scale_2": 0.0}, "scale_2 is 0.0, expected a positive finite number"),
        ({"scale_2": float("nan")}, "scale_2 is nan, expected a positive finite number"),
        ({"scale_2": 1e-60}, "scale_2 is 1e-60, expected a positive finite number"),
        ({"packed": np.zeros((2, 65), np.uint8)}, "packed is uint8[2, 65], expected uint8[2, 64]"),
        ({"scales": np.zeros((2, 8), np.int8)}, "scales is int8[2, 8], expected uint8[2, 8]"),
        (
            {"packed": np.zeros((2, 128), np.uint8)[:, ::2]},
            "packed must be C-contiguous and aligned",
        ),
    ],
)
def test_arguments_that_do_not_fit_are_named(change: dict[str, Any], sentence: str) -> None:
    """Each misfit raises ValueError with what was given and what was expected."""
    rows = np.zeros((2, 128), np.uint16)
    packed, scales = outputs(rows)
    arguments: dict[str, Any] = {
        "rows": rows,
        "dtype": "BF16",
        "scale_2": 1.0,
        "packed": packed,
        "scales": scales,
    }

    with pytest.raises(ValueError) as raised:
        quantize_rows(**(arguments | change))

    assert sentence == str(raised.value)


@pytest.mark.parametrize("value", [-1.0, np.nan, np.inf])
def test_an_amax_that_is_no_magnitude_is_refused(value: float) -> None:
    """Neither scale is computed from a negative, infinite or NaN amax."""
    for scale in (weight_scale_2, input_scale):
        with pytest.raises(ValueError, match=f"amax is {value}, expected a finite number"):
            scale(value)
