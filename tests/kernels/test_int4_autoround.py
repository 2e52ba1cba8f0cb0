"""The AutoRound format against auto-round, which is the reference."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from auto_round.data_type.int import quant_tensor_rtn_sym, quant_tensor_sym
from auto_round.utils.missing_tensors import quantize_weight_rtn
from auto_round_extension.torch.qlinear_torch_zp import QuantLinear
from hypothesis import given, settings
from hypothesis import strategies as st
from int4_weights import (
    GROUP_SIZES,
    STORAGE,
    Array,
    all_fine,
    any_finite,
    corners,
    from_float,
    from_torch,
    ordinary,
    random_patterns,
    to_torch,
)

from carnice_build.kernels.autoround import (
    LARGEST,
    dequantize_rows,
    pack,
    quantize_rtn,
    unpack_rows,
)

Tensors = tuple[Array, Array, Array]

TOO_LARGE = {"BF16": 0x4880, "F16": 0x7C00, "F32": 0x48800000}
"""The exponent from which on a value may be too large for an F16 scale: that of 2**18."""

every_setting = pytest.mark.parametrize(
    ("dtype", "group_size"), [(d, g) for d in STORAGE for g in GROUP_SIZES]
)
every_dtype = pytest.mark.parametrize("dtype", STORAGE)


def outputs(out: int, columns: int, group_size: int) -> Tensors:
    groups = columns // group_size
    return (
        np.full((columns // 8, out), -1, np.int32),
        np.full((groups, out // 8), -1, np.int32),
        np.full((groups, out), np.nan, np.float16),
    )


def quantize(weight: Array, dtype: str, group_size: int) -> Tensors:
    results = outputs(*weight.shape, group_size)
    assert all_fine == quantize_rtn(weight, dtype, group_size, 0, *results)
    return results


def reference(weight: Array, dtype: str, group_size: int) -> Tensors:
    qweight, qzeros, scales = quantize_weight_rtn(to_torch(weight, dtype), 4, group_size)
    return qweight.numpy(), qzeros.numpy(), scales.numpy()


def library_pack(qdq: torch.Tensor, scale: torch.Tensor, group_size: int) -> QuantLinear:
    out, columns = qdq.shape
    linear = torch.nn.Linear(columns, out, bias=False, dtype=qdq.dtype)
    linear.weight.data = qdq
    packed = QuantLinear(4, group_size, columns, out, bias=False)
    packed.pack(linear, scale.reshape(out, -1), 8, device="cpu")
    return packed


def tensors(packed: QuantLinear) -> Tensors:
    return packed.qweight.numpy(), packed.qzeros.numpy(), packed.scales.numpy()


def as_bytes(results: Tensors) -> list[bytes]:
    return [array.tobytes() for array in results]


def rows_of_eight(rows: Array) -> Array:
    return rows[: len(rows) // 8 * 8]


@every_setting
def test_every_setting_gives_the_bytes_of_auto_round(dtype: str, group_size: int) -> None:
    """All three tensors equal those of auto-round's round-to-nearest bit for bit, on ordinary
    weights, on the corners of the rule and on random bit patterns."""
    weight = rows_of_eight(
        np.concatenate(
            [
                ordinary(dtype, (131, 128)),
                corners(dtype),
                random_patterns(dtype, (50, 128), bound=TOO_LARGE[dtype]),
            ]
        )
    )

    assert as_bytes(reference(weight, dtype, group_size)) == as_bytes(
        quantize(weight, dtype, group_size)
    )


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_finite_bit_patterns_give_the_bytes_of_auto_round(data: st.DataObject) -> None:
    """Whatever floats below 2**18 a weight holds, the result equals auto-round's."""
    dtype = data.draw(st.sampled_from(list(STORAGE)))
    group_size = data.draw(st.sampled_from(GROUP_SIZES))
    weight = data.draw(any_finite(dtype, group_size, 8, TOO_LARGE[dtype]))

    assert as_bytes(reference(weight, dtype, group_size)) == as_bytes(
        quantize(weight, dtype, group_size)
    )


@settings(max_examples=50, deadline=None)
@given(
    dtype=st.sampled_from(list(STORAGE)),
    group_size=st.sampled_from(GROUP_SIZES),
    exponent=st.integers(-18, 10),
    mean=st.floats(-4, 4),
    seed=st.integers(0, 2**32 - 1),
)
def test_weights_of_any_scale_and_offset_give_the_bytes_of_auto_round(
    dtype: str, group_size: int, exponent: int, mean: float, seed: int
) -> None:
    """Normal values times 2**exponent, around any mean, are quantized as auto-round does it."""
    draws = np.random.default_rng(seed).standard_normal((16, 256)) + mean
    weight = from_float(draws * 2.0**exponent, dtype)

    assert as_bytes(reference(weight, dtype, group_size)) == as_bytes(
        quantize(weight, dtype, group_size)
    )


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_rounding_to_nearest_is_that_of_a_layer_quantized_and_exported(dtype: str) -> None:
    """The quantizer of auto-round's layers, followed by the packer of its exporter, gives the
    same bytes."""
    weight = ordinary(dtype, (96, 384))
    qdq, scale, _ = quant_tensor_rtn_sym(to_torch(weight, dtype), 4, 128)

    assert as_bytes(tensors(library_pack(qdq, scale, 128))) == as_bytes(
        quantize(weight, dtype, 128)
    )


@every_dtype
def test_blocks_of_rows_on_threads_give_the_bytes_of_the_whole(dtype: str) -> None:
    """Uneven blocks of rows, quantized by four threads into one set of tensors, leave what one
    call for all the rows leaves."""
    weight = ordinary(dtype, (304, 640))
    parts = outputs(304, 640, 64)
    edges = [0, 1, 8, 40, 41, 127, 200, 300, 304]

    def one_block(start: int, stop: int) -> int:
        return quantize_rtn(weight[start:stop], dtype, 64, start, *parts)

    with ThreadPoolExecutor(4) as pool:
        found = set(pool.map(one_block, edges[:-1], edges[1:]))

    assert {all_fine} == found
    assert as_bytes(quantize(weight, dtype, 64)) == as_bytes(parts)


@every_dtype
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, LARGEST, -LARGEST])
@pytest.mark.parametrize("place", [0, 127, 128, 12345, 256 * 128 - 1])
def test_the_first_weight_without_a_finite_scale_is_found(
    dtype: str, value: float, place: int
) -> None:
    """The result is the flat index of the first NaN, Inf or value from ``LARGEST`` on, which F16
    holds as Inf, though others follow."""
    weight = ordinary(dtype, (256, 128))
    bad = from_float(np.full(1, value), dtype)[0]
    weight.reshape(-1)[[place, min(place + 500, weight.size - 1), -1]] = bad

    assert place == quantize_rtn(weight, dtype, 64, 0, *outputs(256, 128, 64))


def test_a_weight_just_below_the_largest_has_a_scale() -> None:
    """The float32 below ``LARGEST`` is quantized, under F16's largest scale."""
    weight = np.full((8, 32), np.nextafter(np.float32(LARGEST), np.float32(0)))

    assert -65504 == quantize(weight, "F32", 32)[2].min()


def tuned(dtype: str, out: int, columns: int, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight and its scale as auto-round's tuning leaves them: each rounded up or down as
    some ``v`` says, on a range shrunk by half at most."""
    generator = torch.Generator().manual_seed(5)
    weight = to_torch(ordinary(dtype, (out, columns)), dtype)
    groups = out * columns // group_size
    v = torch.rand((groups, group_size), generator=generator) - 0.5
    shrink = torch.rand(groups, generator=generator) / 2 + 0.5
    qdq, scale, _ = quant_tensor_sym(weight, 4, group_size, v=v, min_scale=shrink, max_scale=shrink)
    return qdq, scale.reshape(out, -1)


@every_setting
def test_a_tuned_weight_is_packed_as_auto_round_packs_it(dtype: str, group_size: int) -> None:
    """A weight that lies on its grid gives the three tensors of ``QuantLinear.pack``."""
    qdq, scale = tuned(dtype, 96, 256, group_size)
    results = outputs(96, 256, group_size)

    found = pack(from_torch(qdq), dtype, scale.numpy(), 0, *results)

    assert all_fine == found
    assert as_bytes(tensors(library_pack(qdq, scale, group_size))) == as_bytes(results)


@every_dtype
def test_packing_blocks_of_rows_gives_the_bytes_of_the_whole(dtype: str) -> None:
    """Two calls for uneven halves leave what one call leaves."""
    qdq, scale = tuned(dtype, 96, 256, 64)
    weight, scales = from_torch(qdq), scale.numpy()
    whole, parts = outputs(96, 256, 64), outputs(96, 256, 64)

    pack(weight, dtype, scales, 0, *whole)
    pack(weight[:67], dtype, scales[:67], 0, *parts)
    pack(weight[67:], dtype, scales[67:], 67, *parts)

    assert as_bytes(whole) == as_bytes(parts)


@pytest.mark.parametrize("steps", [0.4, 8.0, -9.0, np.nan, np.inf])
@pytest.mark.parametrize("place", [0, 5000, 96 * 256 - 1])
def test_a_weight_off_its_grid_is_found(steps: float, place: int) -> None:
    """The result is the flat index of the first weight that is no code times its scale."""
    qdq, scale = tuned("F32", 96, 256, 64)
    weight = from_torch(qdq)
    bad = steps * np.repeat(scale.numpy().astype(np.float32), 64, axis=1)
    weight.reshape(-1)[[place, -1]] = bad.reshape(-1)[[place, -1]]

    assert place == pack(weight, "F32", scale.numpy(), 0, *outputs(96, 256, 64))


@pytest.mark.parametrize("scale", [0.0, np.nan, np.inf])
def test_a_scale_that_makes_no_grid_is_found(scale: float) -> None:
    """Under a scale that is 0 or not finite, no weight is on the grid, not even 0."""
    scales = np.full((8, 4), 0.5, np.float16)
    scales[3, 1] = scale
    results = outputs(8, 256, 64)

    assert 3 * 256 + 64 == pack(np.zeros((8, 256), np.float32), "F32", scales, 0, *results)


def random_format(out: int, columns: int, group_size: int) -> Tensors:
    """Any codes and zero points, under scales of either sign."""
    rng = np.random.default_rng(7)
    groups = columns // group_size
    words = np.iinfo(np.int32)
    qzeros = rng.integers(0, 16, (groups, out // 8, 8)) << np.arange(0, 32, 4)
    return (
        rng.integers(words.min, words.max, (columns // 8, out), np.int32, endpoint=True),
        qzeros.sum(-1).astype(np.uint32).view(np.int32),
        (rng.standard_normal((groups, out)) * 0.02).astype(np.float16),
    )


@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_dequantized_rows_are_those_that_auto_round_multiplies_by(group_size: int) -> None:
    """Rounded to F16, values equal auto-round's own product with the identity, for any codes
    and zero points."""
    parts = random_format(96, 256, group_size)
    layer = QuantLinear(4, group_size, 256, 96, bias=False)
    layer.qweight, layer.qzeros, layer.scales = map(torch.from_numpy, parts)
    values = np.empty((96, 256), np.float32)

    dequantize_rows(*parts, 0, values)

    np.testing.assert_array_equal(
        layer(torch.eye(256, dtype=torch.float16)).T.numpy(), values.astype(np.float16)
    )


def test_codes_are_the_nibbles_of_the_words() -> None:
    """Code n of a column is nibble n % 8 of its word n // 8."""
    qweight = random_format(16, 128, 64)[0]
    codes = np.empty((16, 128), np.uint8)

    unpack_rows(qweight, 0, codes)

    expected = [[qweight[n // 8, o] >> 4 * (n % 8) & 15 for n in range(128)] for o in range(16)]
    np.testing.assert_array_equal(expected, codes)


def test_any_rows_are_unpacked_and_dequantized_alone() -> None:
    """Rows 67 to 93 are those of the whole."""
    parts = random_format(96, 256, 64)
    values, some_values = np.empty((96, 256), np.float32), np.empty((26, 256), np.float32)
    codes, some_codes = np.empty((96, 256), np.uint8), np.empty((26, 256), np.uint8)

    dequantize_rows(*parts, 0, values)
    dequantize_rows(*parts, 67, some_values)
    unpack_rows(parts[0], 0, codes)
    unpack_rows(parts[0], 67, some_codes)

    np.testing.assert_array_equal(values[67:93], some_values)
    np.testing.assert_array_equal(codes[67:93], some_codes)


def test_a_weight_may_be_read_only_unaligned_or_strided() -> None:
    """A view of file bytes at an odd offset, or every second row, is quantized the same."""
    weight = ordinary("BF16", (8, 128))
    unaligned = np.frombuffer(b"x" + weight.tobytes(), np.uint16, offset=1).reshape(8, 128)
    strided = np.repeat(weight, 2, axis=0)[::2]

    assert as_bytes(quantize(weight, "BF16", 64)) == as_bytes(quantize(unaligned, "BF16", 64))
    assert as_bytes(quantize(weight, "BF16", 64)) == as_bytes(quantize(strided, "BF16", 64))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"dtype": "F64"}, "dtype is 'F64', expected one of BF16, F16, F32"),
        ({"dtype": "F16"}, "weight is uint16[8, 128], expected float16[8, 128]"),
        ({"group_size": 48}, "group_size is 48, expected one of (32, 64, 128)"),
        ({"weight": np.zeros((8, 96), np.uint16)}, "shape [8, 96] is not [rows, a multiple of 64]"),
        ({"group_size": 32}, "qzeros is int32[2, 1], expected int32[4, 1]"),
        ({"first": 1}, "qweight is int32[16, 8], expected int32[16, 9]"),
        ({"first": -1}, "first is -1, expected 0 or more"),
        (
            {"qweight": np.zeros((16, 12), np.int32)},
            "qweight has 12 columns, expected a multiple of 8",
        ),
        (
            {"qweight": np.zeros((16, 8), np.uint32)},
            "qweight is uint32[16, 8], expected int32[16, 8]",
        ),
        (
            {"scales": np.zeros((2, 8), np.uint16)},
            "scales is uint16[2, 8], expected float16[2, 8]",
        ),
        (
            {"scales": np.zeros((2, 16), np.float16)[:, ::2]},
            "scales must be C-contiguous and aligned",
        ),
    ],
)
def test_arguments_that_do_not_fit_are_named(change: dict[str, Any], sentence: str) -> None:
    """Each misfit raises ValueError with what was given and what was expected."""
    qweight, qzeros, scales = outputs(8, 128, 64)
    arguments: dict[str, Any] = {
        "weight": np.zeros((8, 128), np.uint16),
        "dtype": "BF16",
        "group_size": 64,
        "first": 0,
        "qweight": qweight,
        "qzeros": qzeros,
        "scales": scales,
    }

    with pytest.raises(ValueError) as raised:
        quantize_rtn(**(arguments | change))

    assert sentence == str(raised.value)
