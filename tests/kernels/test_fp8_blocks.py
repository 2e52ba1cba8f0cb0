"""FP8 with a scale a block or a weight against llm-compressor, the reference."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from int4_weights import EXPONENT, PATTERN, STORAGE, Array, all_fine, any_finite, ordinary
from storage_samples import assorted, compressed, content, every_pattern, exponents, preset

from carnice_build.kernels.fp8 import block_grid, dequantize_blocks, quantize_blocks

every_dtype = pytest.mark.parametrize("dtype", STORAGE)
SCHEMES = ("FP8", "FP8_BLOCK")
every_scheme = pytest.mark.parametrize("scheme", SCHEMES)


def reference(weight: Array, dtype: str, scheme: str) -> list[bytes]:
    tensors = compressed(weight, dtype, preset(scheme))
    return [content(tensors[name]) for name in ("weight", "weight_scale")]


def quantized(weight: Array, dtype: str, scheme: str) -> list[bytes]:
    block = (128, 128) if scheme == "FP8_BLOCK" else weight.shape
    codes = np.full(weight.shape, 99, np.uint8)
    scales = np.empty(block_grid(weight.shape, *block), weight.dtype)
    assert all_fine == quantize_blocks(weight, dtype, *block, codes, scales)
    return [codes.tobytes(), scales.tobytes()]


@every_dtype
@every_scheme
@pytest.mark.parametrize("shape", [(256, 128), (130, 200), (1, 1), (127, 129)])
def test_weights_of_any_shape_have_the_bits_of_the_library(
    dtype: str, scheme: str, shape: tuple[int, int]
) -> None:
    """Where blocks do not divide a weight, the last ones are as small as what is left."""
    weight = ordinary(dtype, shape)

    assert reference(weight, dtype, scheme) == quantized(weight, dtype, scheme)


@every_dtype
@every_scheme
def test_corners_have_the_bits_of_the_library(dtype: str, scheme: str) -> None:
    """Zeros of both signs, denormals, ties, single large weights, random patterns."""
    weight = assorted(dtype)
    tall = np.concatenate([weight, weight * 0 if dtype != "BF16" else weight & 0x8000, weight])

    assert reference(tall, dtype, scheme) == quantized(tall, dtype, scheme)


@every_dtype
@every_scheme
def test_every_sixteen_bit_value_has_the_code_of_the_library(dtype: str, scheme: str) -> None:
    """Under scales of every magnitude."""
    for exponent in exponents(dtype, 8):
        weight = every_pattern(dtype, exponent)

        assert reference(weight, dtype, scheme) == quantized(weight, dtype, scheme)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_finite_weight_has_the_bits_of_the_library(data: st.DataObject) -> None:
    """Whatever the bit patterns are."""
    dtype = data.draw(st.sampled_from(list(STORAGE)))
    scheme = data.draw(st.sampled_from(SCHEMES))
    weight = data.draw(any_finite(dtype, 32, 2))

    assert reference(weight, dtype, scheme) == quantized(weight, dtype, scheme)


@every_dtype
@pytest.mark.parametrize("pattern", [0, 1])
def test_nan_and_infinity_are_found(dtype: str, pattern: int) -> None:
    """The index is that of the first one, in whatever block."""
    weight = ordinary(dtype, (40, 64))
    weight.view(PATTERN[dtype])[[33, 38], 17] = EXPONENT[dtype] + pattern
    codes, scales = np.empty(weight.shape, np.uint8), np.empty((3, 2), weight.dtype)

    assert 33 * 64 + 17 == quantize_blocks(weight, dtype, 16, 32, codes, scales)


def test_whole_lines_of_blocks_are_independent() -> None:
    """Any split between blocks gives the bytes of the whole."""
    weight = ordinary("BF16", (256, 200))
    whole = quantized(weight, "BF16", "FP8_BLOCK")
    parts = [quantized(weight[start : start + 128], "BF16", "FP8_BLOCK") for start in (0, 128)]

    assert whole == [b"".join(pair) for pair in zip(*parts, strict=True)]


def test_dequantizing_takes_the_scale_of_the_block() -> None:
    """Code times scale, in blocks that do not divide a row."""
    codes = np.full((2, 5), 0x38, np.uint8)
    out = np.empty(codes.shape, np.float32)
    dequantize_blocks(codes, np.array([[1, 2], [3, 4]], np.float32), 3, out)

    assert [[1, 1, 1, 2, 2], [3, 3, 3, 4, 4]] == out.tolist()


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (4,), (2, 2, 2)])
def test_shapes_that_are_no_weight_are_refused(shape: tuple[int, ...]) -> None:
    """One ValueError for what has no rows or no columns."""
    with pytest.raises(ValueError, match="has no weight"):
        quantize_blocks(
            np.zeros(shape, np.uint16), "BF16", 2, 2, np.empty(shape, np.uint8), np.empty((1, 1))
        )
