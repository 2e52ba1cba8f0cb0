"""MLX's floating-point modes against mlx, which is the reference."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from test_affine import (
    EXPONENT,
    PATTERN,
    STORAGE,
    adversarial,
    all_finite,
    every_dtype,
    finite,
    from_float32,
    ordinary,
    random_patterns,
    to_mlx,
)

from carnice_build.kernels.mlx_floats import MODES, dequantize_rows, quantize_rows

Array = np.ndarray[Any, Any]
Quantized = tuple[Array, Array]

LARGEST = {"mxfp4": 6.0, "nvfp4": 6.0, "mxfp8": 448.0}
NEAR_ALL_CODES = 448 * 2.0**25
"""Above it, float32 cannot tell which code of `nvfp4` is the nearest, and mlx takes the first."""

every_mode = pytest.mark.parametrize("mode", MODES)


@pytest.fixture(autouse=True)
def _mlx_on_the_cpu() -> None:
    mx.set_default_device(mx.cpu)


def outputs(shape: tuple[int, int], mode: str) -> Quantized:
    (rows, cols), made = shape, MODES[mode]
    packed = np.empty((rows, cols * made.bits // 32), np.uint32)
    return packed, np.empty((rows, cols // made.group_size), np.uint8)


def quantize(weight: Array, dtype: str, mode: str) -> Quantized:
    results = outputs(weight.shape, mode)
    assert all_finite == quantize_rows(weight, dtype, mode, *results)
    return results


def reference(weight: Array, dtype: str, mode: str) -> Quantized:
    packed, scales = mx.quantize(to_mlx(weight, dtype), mode=mode)
    return np.array(packed), np.array(scales)


def as_bytes(results: Quantized) -> list[bytes]:
    return [array.tobytes() for array in results]


def as_float32(weight: Array, dtype: str) -> Array:
    return np.array(to_mlx(weight, dtype).astype(mx.float32))


def sane(weight: Array, dtype: str, mode: str) -> Array:
    """The weight with zeros for the groups of which mlx's bytes stand for other numbers."""
    values = np.abs(as_float32(weight, dtype)).reshape(-1, MODES[mode].group_size)
    peaks = values.max(axis=1)
    if mode == "nvfp4":
        bad = peaks > NEAR_ALL_CODES
    else:
        bad = (peaks > 0) & (peaks <= np.float32(LARGEST[mode] * 2.0**-127))
    patterns = weight.view(PATTERN[dtype]).reshape(values.shape)
    kept = np.where(bad[:, None], 0, patterns).astype(PATTERN[dtype])
    return kept.reshape(weight.shape).view(STORAGE[dtype])


def check(weight: Array, dtype: str, mode: str) -> None:
    weight = sane(weight, dtype, mode)

    assert as_bytes(reference(weight, dtype, mode)) == as_bytes(quantize(weight, dtype, mode))


@every_mode
@every_dtype
def test_every_mode_gives_the_bytes_of_mlx(mode: str, dtype: str) -> None:
    """Codes and scales equal mlx's bit for bit, on ordinary weights, on corners and on random bit
    patterns."""
    for weight in (
        ordinary(dtype, (67, 128)),
        adversarial(dtype),
        random_patterns(dtype, (200, 128)),
    ):
        check(weight, dtype, mode)


@every_mode
@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_every_16_bit_value_gives_the_bytes_of_mlx(mode: str, dtype: str) -> None:
    """Each value that is finite, as the largest of its group, and beside values of its size."""
    patterns = np.arange(1 << 16, dtype=np.uint16)
    patterns = patterns[(patterns & EXPONENT[dtype]) != EXPONENT[dtype]]
    alone = np.zeros((len(patterns), 32), np.uint16)
    alone[:, [0, 16]] = patterns[:, None]
    # By magnitude: of neighbours, and of values that some powers of two lie between.
    ordered = patterns[np.argsort(patterns & 0x7FFF, kind="stable")]
    spread = ordered.reshape(-1, 32, {"BF16": 60, "F16": 64}[dtype]).swapaxes(1, 2)
    for weight in (alone, spread.reshape(-1, 32), ordered.reshape(-1, 32)):
        check(np.ascontiguousarray(weight).view(STORAGE[dtype]), dtype, mode)


@every_mode
@every_dtype
def test_ties_give_the_bytes_of_mlx(mode: str, dtype: str) -> None:
    """Values halfway between two codes, and next to that, of both signs and at every scale."""
    steps = np.arange(-64, 65, dtype=np.float32) / 8
    near = np.concatenate([steps, steps * (1 + 2**-7), steps * (1 - 2**-8)])
    near = np.resize(near, (len(near) + 31) // 32 * 32).reshape(-1, 32)
    # The first of each group decides its scale.
    near[:, [0, 16]] = LARGEST[mode] if mode != "mxfp8" else 14
    exponents = range(-14, 6)
    rows = np.concatenate([near * 2.0**exponent for exponent in exponents])
    check(from_float32(rows, dtype), dtype, mode)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_finite_bit_patterns_give_the_bytes_of_mlx(data: st.DataObject) -> None:
    """Whatever finite floats a weight holds, the result equals mlx's bit for bit."""
    dtype = data.draw(st.sampled_from(list(STORAGE)))
    mode = data.draw(st.sampled_from(list(MODES)))
    shape = (data.draw(st.integers(1, 3)), 32 * data.draw(st.integers(1, 2)))
    top = int(np.iinfo(PATTERN[dtype]).max)
    drawn = data.draw(arrays(PATTERN[dtype], shape, elements=st.integers(0, top)))
    check(finite(drawn, dtype), dtype, mode)


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from(list(STORAGE)),
    mode=st.sampled_from(list(MODES)),
    exponent=st.integers(-30, 30),
    huge=st.floats(1, 1e4),
    seed=st.integers(0, 2**32 - 1),
)
def test_weights_of_any_scale_and_one_huge_value_give_the_bytes_of_mlx(
    dtype: str, mode: str, exponent: int, huge: float, seed: int
) -> None:
    """Normal values times 2**exponent, one of them far larger, are quantized as mlx does it."""
    draws = np.random.default_rng(seed).standard_normal((16, 128))
    draws[3, 5] *= huge
    limit = 60000 if dtype == "F16" else 1e30
    weight = from_float32(np.clip(draws * 2.0**exponent, -limit, limit), dtype)
    check(weight, dtype, mode)


@pytest.mark.parametrize("mode", ["mxfp4", "mxfp8"])
@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_the_least_scale_is_the_least_there_is(mode: str, dtype: str) -> None:
    """A group of numbers near the smallest gets 2**-127, of which they are fractions; mlx writes a
    scale of 2**100 or more, and its numbers are then nothing like the weight's."""
    weight = from_float32(np.full((1, 32), LARGEST[mode] * 2.0**-128), dtype)
    ours, theirs = (np.empty((1, 32), np.float32) for _ in range(2))
    dequantize_rows(*quantize(weight, dtype, mode), mode, ours)
    dequantize_rows(*reference(weight, dtype, mode), mode, theirs)

    assert (ours == LARGEST[mode] * 2.0**-128).all()
    assert (theirs > 2.0**100).all()


def test_what_is_beyond_nvfp4_becomes_its_largest() -> None:
    """Numbers that dwarf all codes are the largest one; mlx makes 0 of them."""
    weight = from_float32(np.full((1, 32), -1e30), "BF16")
    ours, theirs = (np.empty((1, 32), np.float32) for _ in range(2))
    dequantize_rows(*quantize(weight, "BF16", "nvfp4"), "nvfp4", ours)
    dequantize_rows(*reference(weight, "BF16", "nvfp4"), "nvfp4", theirs)

    assert (ours == -6 * 448).all()
    assert (theirs == 0).all()


@every_mode
def test_any_bytes_are_read_as_mlx_reads_them(mode: str) -> None:
    """Every code with every scale gives the bits of mlx's own number, in float32."""
    made, draws = MODES[mode], np.random.default_rng(0)
    codes = draws.integers(0, 256, (256, made.group_size * made.bits // 8 * 8), np.uint8)
    codes[:, :32] = np.arange(256, dtype=np.uint8).reshape(8, 32)[np.arange(256) % 8]
    packed = codes.view(np.uint32)
    scales = np.arange(256 * 8, dtype=np.uint16).astype(np.uint8).reshape(8, 256).T.copy()
    found = np.empty((256, 8 * made.group_size), np.float32)
    with np.errstate(all="ignore"):
        dequantize_rows(packed, scales, mode, found)
    theirs = np.array(
        mx.dequantize(mx.array(packed), mx.array(scales), mode=mode, dtype=mx.float32)
    )
    number = ~np.isnan(theirs)

    assert (number == ~np.isnan(found)).all()
    assert (found.view(np.uint32) == theirs.view(np.uint32))[number].all()


@every_mode
@every_dtype
def test_blocks_of_rows_give_the_bytes_of_the_whole(mode: str, dtype: str) -> None:
    """Uneven blocks of rows leave what one call for all the rows leaves."""
    weight = ordinary(dtype, (301, 160))
    parts = outputs(weight.shape, mode)
    edges = [0, 1, 8, 40, 41, 127, 200, 300, 301]
    for start, stop in pairwise(edges):
        blocks = [array[start:stop] for array in parts]
        assert all_finite == quantize_rows(weight[start:stop], dtype, mode, *blocks)

    assert as_bytes(quantize(weight, dtype, mode)) == as_bytes(parts)


@every_mode
@every_dtype
@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 127, 4096, 256 * 128 - 1])
def test_the_first_non_finite_element_is_found(
    mode: str, dtype: str, value: float, place: int
) -> None:
    """The result is the flat index of the first NaN or Inf, though others follow."""
    weight = ordinary(dtype, (256, 128))
    bad = from_float32(np.full(1, value), dtype)[0]
    weight.reshape(-1)[[place, min(place + 500, weight.size - 1), -1]] = bad

    assert place == quantize_rows(weight, dtype, mode, *outputs(weight.shape, mode))


def test_a_weight_may_be_read_only_unaligned_or_strided() -> None:
    """A view of file bytes at an odd offset, or every second row, is quantized the same."""
    weight = ordinary("BF16", (6, 128))
    unaligned = np.frombuffer(b"x" + weight.tobytes(), np.uint16, offset=1).reshape(6, 128)
    strided = np.repeat(weight, 2, axis=0)[::2]
    expected = as_bytes(quantize(weight, "BF16", "mxfp4"))

    assert expected == as_bytes(quantize(unaligned, "BF16", "mxfp4"))
    assert expected == as_bytes(quantize(strided, "BF16", "mxfp4"))


def test_a_weight_without_rows_is_nothing_to_do() -> None:
    """Zero rows are quantized to zero rows."""
    quantize(np.empty((0, 128), np.uint16), "BF16", "nvfp4")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"dtype": "F64"}, "dtype is 'F64', expected one of BF16, F16, F32"),
        ({"dtype": "F16"}, "weight is uint16[2, 128], expected float16[2, 128]"),
        ({"mode": "mxfp6"}, "mode is 'mxfp6', expected one of mxfp4, nvfp4, mxfp8"),
        ({"weight": np.zeros((2, 48), np.uint16)}, "shape [2, 48] is not [rows, a multiple of 32]"),
        ({"mode": "mxfp8"}, "packed is uint32[2, 16], expected uint32[2, 32]"),
        ({"mode": "nvfp4"}, "scales is uint8[2, 4], expected uint8[2, 8]"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(change: dict[str, Any], sentence: str) -> None:
    """Nothing is written, and the error says what was expected."""
    weight = np.zeros((2, 128), np.uint16)
    packed, scales = outputs(weight.shape, "mxfp4")
    given = {"weight": weight, "dtype": "BF16", "mode": "mxfp4", "packed": packed, "scales": scales}
    with pytest.raises(ValueError) as caught:
        quantize_rows(**{**given, **change})

    assert sentence == str(caught.value)
