"""Merging into a quantized base, against what each way claims to minimise."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from auto_round.data_type.int import quant_tensor_sym
from hypothesis import given, settings
from hypothesis import strategies as st
from int4_weights import (
    GROUP_SIZES,
    STORAGE,
    Array,
    all_fine,
    from_float,
    from_torch,
    ordinary,
    to_float,
    to_torch,
)

from carnice_build.kernels.autoround import dequantize_rows, pack, quantize_rtn, unpack_rows
from carnice_build.kernels.autoround_merge import (
    GridResidual,
    Merge,
    grid_residual,
    merge_delta,
    merge_reround,
)

Tensors = tuple[Array, Array, Array]

OUT, IN = 72, 256

every_setting = pytest.mark.parametrize(
    ("dtype", "group_size"), [(d, g) for d in STORAGE for g in GROUP_SIZES]
)
every_dtype = pytest.mark.parametrize("dtype", STORAGE)


def outputs(group_size: int) -> Tensors:
    groups = IN // group_size
    return (
        np.empty((IN // 8, OUT), np.int32),
        np.empty((groups, OUT // 8), np.int32),
        np.empty((groups, OUT), np.float16),
    )


def nearest_base(weight: Array, dtype: str, group_size: int) -> Tensors:
    """A base that was rounded to nearest."""
    results = outputs(group_size)
    assert all_fine == quantize_rtn(weight, dtype, group_size, 0, *results)
    return results


def learned_base(weight: Array, dtype: str, group_size: int) -> Tensors:
    """A base as auto-round's tuning leaves it: each weight up or down, ranges shrunk."""
    generator = torch.Generator().manual_seed(3)
    groups = weight.size // group_size
    v = torch.rand((groups, group_size), generator=generator) - 0.5
    shrink = torch.rand(groups, generator=generator) / 4 + 0.75
    qdq, scale, _ = quant_tensor_sym(
        to_torch(weight, dtype), 4, group_size, v=v, min_scale=shrink, max_scale=shrink
    )
    results = outputs(group_size)
    tuned = scale.reshape(OUT, -1).numpy()
    assert all_fine == pack(from_torch(qdq), dtype, tuned, 0, *results)
    return results


def any_grid(group_size: int, seed: int) -> Tensors:
    """Any codes and zero points, under scales of either sign."""
    rng = np.random.default_rng(seed)
    qweight, qzeros, scales = outputs(group_size)
    words = np.iinfo(np.int32)
    qweight[...] = rng.integers(words.min, words.max, qweight.shape, endpoint=True)
    qzeros[...] = rng.integers(words.min, words.max, qzeros.shape, endpoint=True)
    scales[...] = rng.choice([-1, 1], scales.shape) * rng.uniform(0.002, 0.01, scales.shape)
    return qweight, qzeros, scales


def codes_of(qweight: Array) -> Array:
    codes = np.empty((OUT, IN), np.uint8)
    unpack_rows(qweight, 0, codes)
    return codes


def values_of(qweight: Array, qzeros: Array, scales: Array) -> Array:
    values = np.empty((OUT, IN), np.float32)
    dequantize_rows(qweight, qzeros, scales, 0, values)
    return values.astype(np.float64)


def every_value(qzeros: Array, scales: Array) -> Array:
    """What each of the 16 codes stands for, [16, OUT, IN]."""
    word = 0x11111111
    uniform = (np.full((IN // 8, OUT), code * word, np.uint32).view(np.int32) for code in range(16))
    return np.stack([values_of(qweight, qzeros, scales) for qweight in uniform])


def reround(weight: Array, dtype: str, base: Tensors) -> tuple[Array, Merge]:
    qweight = np.empty_like(base[0])
    return qweight, merge_reround(weight, dtype, 0, *base, qweight)


def delta(weight: Array, before: Array, dtype: str, base: Tensors) -> tuple[Array, Merge]:
    qweight = np.empty_like(base[0])
    return qweight, merge_delta(weight, before, dtype, 0, *base, qweight)


@every_setting
def test_rerounding_minimises_the_error_of_each_weight(dtype: str, group_size: int) -> None:
    """No code of the grid, whatever its scales and zero points, is nearer to the weight."""
    base = any_grid(group_size, seed=1)
    weight = ordinary(dtype, (OUT, IN))
    wide = to_float(weight, dtype)

    qweight, _ = reround(weight, dtype, base)

    errors = np.abs(every_value(*base[1:]) - wide)
    found = np.abs(values_of(qweight, *base[1:]) - wide)
    np.testing.assert_allclose(errors.min(axis=0), found, rtol=0, atol=1e-8)


@every_setting
def test_merging_the_delta_minimises_the_error_of_the_difference(
    dtype: str, group_size: int
) -> None:
    """No code of the grid makes a difference to the base's value that is nearer to the
    difference of the weights."""
    base = any_grid(group_size, seed=2)
    before = ordinary(dtype, (OUT, IN), seed=1)
    weight = ordinary(dtype, (OUT, IN), seed=2)
    wanted = to_float(weight, dtype).astype(np.float64) - to_float(before, dtype)

    qweight, _ = delta(weight, before, dtype, base)

    values = values_of(*base)
    errors = np.abs(every_value(*base[1:]) - values - wanted)
    found = np.abs(values_of(qweight, *base[1:]) - values - wanted)
    np.testing.assert_allclose(errors.min(axis=0), found, rtol=0, atol=1e-8)


@settings(max_examples=40, deadline=None)
@given(
    dtype=st.sampled_from(list(STORAGE)),
    group_size=st.sampled_from(GROUP_SIZES),
    spread=st.sampled_from([0.001, 0.02, 1.0]),
    seed=st.integers(0, 2**32 - 1),
)
def test_codes_and_counts_follow_the_formulas(
    dtype: str, group_size: int, spread: float, seed: int
) -> None:
    """Codes, clipped codes and changed codes are those of the two formulas in numpy."""
    base = any_grid(group_size, seed)
    rng = np.random.default_rng(seed)
    before = from_float(rng.standard_normal((OUT, IN)) * 0.02, dtype)
    wide_before = to_float(before, dtype)
    weight = from_float(wide_before + rng.standard_normal((OUT, IN)) * spread, dtype)
    wide = to_float(weight, dtype)
    step = np.repeat(base[2].T, group_size, axis=1).astype(np.float32)
    nibbles = base[1].view(np.uint32)[:, :, None] >> np.arange(0, 32, 4, dtype=np.uint32) & 15
    zero = np.repeat(nibbles.reshape(-1, OUT).T + 1, group_size, axis=1).astype(np.float32)
    old = codes_of(base[0])

    for (qweight, found), wanted in (
        (reround(weight, dtype, base), np.rint(wide / step) + zero),
        (delta(weight, before, dtype, base), old + np.rint((wide - wide_before) / step)),
    ):
        expected = np.clip(wanted, 0, 15)
        clipped, changed = np.sum(expected != wanted), np.sum(expected != old)
        np.testing.assert_array_equal(expected, codes_of(qweight))
        assert Merge(all_fine, int(clipped), int(changed)) == found


@every_setting
def test_the_base_itself_rounds_to_its_nearest_codes(dtype: str, group_size: int) -> None:
    """A base that was rounded to nearest is left as it is by rounding it again."""
    weight = ordinary(dtype, (OUT, IN))
    base = nearest_base(weight, dtype, group_size)

    qweight, found = reround(weight, dtype, base)

    np.testing.assert_array_equal(base[0], qweight)
    assert 0 == found.changed


@every_setting
def test_differences_below_half_a_step_leave_learned_codes(dtype: str, group_size: int) -> None:
    """Where a fine-tune moved no weight by half a step, the delta's merge is the base, whose
    learned codes are not the nearest."""
    before = ordinary(dtype, (OUT, IN))
    base = learned_base(before, dtype, group_size)
    step = np.repeat(base[2].T, group_size, axis=1).astype(np.float32)
    weight = from_float(to_float(before, dtype) + 0.4 * step, dtype)

    qweight, found = delta(weight, before, dtype, base)

    np.testing.assert_array_equal(base[0], qweight)
    assert Merge(all_fine, 0, 0) == found
    assert reround(before, dtype, base)[1].changed > OUT * IN / 10


def correlated_inputs(count: int, seed: int) -> torch.Tensor:
    """Inputs of a layer as they are in practice: mostly in a space of few dimensions."""
    directions = torch.randn((16, IN), generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn((count, IN), generator=generator)
    return torch.randn((count, 16), generator=generator) @ directions + noise / 2


def tuned_base(weight: Array) -> Tensors:
    """A float32 base whose rounding was learned on inputs, by signed gradient descent."""
    inputs = correlated_inputs(256, seed=1)
    target = torch.from_numpy(weight)
    v = torch.zeros((weight.size // 64, 64), requires_grad=True)
    for step in range(100):
        qdq, _, _ = quant_tensor_sym(target, 4, 64, v=v)
        ((inputs @ (qdq - target).T) ** 2).mean().backward()
        with torch.no_grad():
            v -= v.grad.sign() * (1 - step / 100) / 100
            v.clamp_(-0.5, 0.5)
        v.grad = None
    qdq, scale, _ = quant_tensor_sym(target, 4, 64, v=v.detach())
    results = outputs(64)
    tuned = scale.reshape(OUT, -1).numpy()
    assert all_fine == pack(qdq.numpy(), "F32", tuned, 0, *results)
    return results


@pytest.mark.parametrize(("steps", "better"), [(0.05, "delta"), (0.6, "reround")])
def test_which_merge_is_better_depends_on_the_difference(steps: float, better: str) -> None:
    """On a base with learned rounding, the layer's output error is smaller by the delta's merge
    for differences far below a step, and by rerounding for those near it."""
    before = ordinary("F32", (OUT, IN))
    base = tuned_base(before)
    inputs = correlated_inputs(1024, seed=2).numpy()
    moves = np.random.default_rng(3).standard_normal((OUT, IN))
    weight = from_float(before + moves * steps * np.abs(base[2]).mean(), "F32")

    def output_error(qweight: Array) -> float:
        return float(np.square(inputs @ (values_of(qweight, *base[1:]) - weight).T).mean())

    errors = {
        "delta": output_error(delta(weight, before, "F32", base)[0]),
        "reround": output_error(reround(weight, "F32", base)[0]),
    }
    assert better == min(errors, key=errors.__getitem__)


@every_dtype
@pytest.mark.parametrize("scale", [0.0, np.nan, np.inf, -np.inf])
def test_a_group_without_a_usable_scale_is_left_at_rest(dtype: str, scale: float) -> None:
    """Merging the delta keeps the group's codes, rerounding sets them to its zero point."""
    before, weight = ordinary(dtype, (OUT, IN), seed=1), ordinary(dtype, (OUT, IN), seed=2)
    base = nearest_base(before, dtype, 64)
    base[2][1, 5] = scale

    kept, _ = delta(weight, before, dtype, base)
    zeroed, _ = reround(weight, dtype, base)

    np.testing.assert_array_equal(codes_of(base[0])[5, 64:128], codes_of(kept)[5, 64:128])
    np.testing.assert_array_equal(np.full(64, 8), codes_of(zeroed)[5, 64:128])


@every_setting
def test_a_learned_grid_lies_within_a_step_of_its_base(dtype: str, group_size: int) -> None:
    """Codes that tuning chose up or down, on ranges that it shrunk, are at most a step away,
    but for the rounding of the arithmetic."""
    weight = ordinary(dtype, (OUT, IN))

    found = grid_residual(
        weight, dtype, 0, *learned_base(weight, dtype, group_size), tolerance=0.05
    )

    assert (all_fine, 0, 0) == (found.non_finite, found.far, found.unusable_groups)
    assert 0.9 < found.largest <= 1.05


def test_a_grid_of_another_base_does_not() -> None:
    """Under the codes of another weight, most codes are farther than a step."""
    base = learned_base(ordinary("BF16", (OUT, IN), seed=1), "BF16", 64)

    found = grid_residual(ordinary("BF16", (OUT, IN), seed=2), "BF16", 0, *base, tolerance=0.05)

    assert found.far > OUT * IN / 2


def test_residuals_are_those_of_the_definition() -> None:
    """Three weights put 2.5, 4 and 100 steps from where they were, the last one beyond the
    grid's end, are the three that are far; the largest distance is to that end."""
    weight = np.tile(np.linspace(-1, 0.75, 32, dtype=np.float32), (OUT, IN // 32))
    base = nearest_base(weight, "F32", 32)
    weight[[3, 20, 71], [16, 18, 16]] += np.float32(0.125) * np.array([2.5, 4, 100], np.float32)
    position = weight[[3, 20, 71], [16, 18, 16]] / 0.125 + 8
    codes = codes_of(base[0])[[3, 20, 71], [16, 18, 16]]

    found = grid_residual(weight, "F32", 0, *base, tolerance=0.0)

    assert float(np.abs(np.clip(position, 0, 15) - codes).max()) == found.largest
    assert (all_fine, 3, 0) == (found.non_finite, found.far, found.unusable_groups)


@pytest.mark.parametrize("scale", [0.0, np.nan, np.inf])
def test_groups_without_a_usable_scale_are_left_out_and_counted(scale: float) -> None:
    """Two such groups are reported, and have no part in the distances."""
    weight = ordinary("BF16", (OUT, IN))
    base = nearest_base(weight, "BF16", 64)
    expected = grid_residual(weight, "BF16", 0, *base, tolerance=0.0).far
    base[2][[0, 3], [7, 70]] = scale

    found = grid_residual(weight, "BF16", 0, *base, tolerance=0.0)

    assert (2, expected) == (found.unusable_groups, found.far)


@every_dtype
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 5000, OUT * IN - 1])
def test_the_first_non_finite_element_is_found(dtype: str, value: float, place: int) -> None:
    """Each function gives the flat index of the first NaN or Inf, in either weight."""
    good = ordinary(dtype, (OUT, IN))
    base = nearest_base(good, dtype, 64)
    bad = good.copy()
    bad.reshape(-1)[[place, -1]] = from_float(np.full(1, value), dtype)[0]

    found = (
        reround(bad, dtype, base)[1].non_finite,
        delta(bad, good, dtype, base)[1].non_finite,
        delta(good, bad, dtype, base)[1].non_finite,
        grid_residual(bad, dtype, 0, *base, tolerance=0.0).non_finite,
    )

    assert (place,) * 4 == found


def test_blocks_of_rows_give_what_the_whole_gives() -> None:
    """Uneven blocks leave the same codes, and their counts add up."""
    before, weight = ordinary("BF16", (OUT, IN), seed=1), ordinary("BF16", (OUT, IN), seed=2)
    base = learned_base(before, "BF16", 64)
    whole, by_delta = delta(weight, before, "BF16", base)
    again, by_reround = reround(weight, "BF16", base)
    parts, parts_again = np.empty_like(whole), np.empty_like(whole)
    blocks = [slice(0, 3), slice(3, 70), slice(70, OUT)]

    deltas = [
        merge_delta(weight[rows], before[rows], "BF16", rows.start, *base, parts) for rows in blocks
    ]
    rerounds = [
        merge_reround(weight[rows], "BF16", rows.start, *base, parts_again) for rows in blocks
    ]
    residuals = [
        grid_residual(weight[rows], "BF16", rows.start, *base, tolerance=0.0) for rows in blocks
    ]

    np.testing.assert_array_equal(whole, parts)
    np.testing.assert_array_equal(again, parts_again)
    assert (by_delta.clipped, by_delta.changed) == tuple(np.sum(deltas, axis=0)[1:])
    assert (by_reround.clipped, by_reround.changed) == tuple(np.sum(rerounds, axis=0)[1:])
    assert grid_residual(weight, "BF16", 0, *base, tolerance=0.0) == GridResidual(
        all_fine,
        max(part.largest for part in residuals),
        sum(part.far for part in residuals),
        0,
    )


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"dtype": "F16"}, "weight is uint16[72, 256], expected float16[72, 256]"),
        ({"base": np.zeros((OUT - 1, IN), np.uint16)}, "base is [71, 256], expected [72, 256]"),
        (
            {"qweight": np.zeros((IN // 8, 80), np.int32)},
            "qweight is int32[32, 80], expected int32[32, 72]",
        ),
        (
            {"scales": np.zeros((5, OUT), np.float16)},
            "group_size is 51, expected one of (32, 64, 128)",
        ),
    ],
)
def test_arguments_that_do_not_fit_are_named(change: dict[str, Any], sentence: str) -> None:
    """Each misfit raises ValueError with what was given and what was expected."""
    base_qweight, qzeros, scales = outputs(64)
    arguments: dict[str, Any] = {
        "weight": np.zeros((OUT, IN), np.uint16),
        "base": np.zeros((OUT, IN), np.uint16),
        "dtype": "BF16",
        "first": 0,
        "base_qweight": base_qweight,
        "qzeros": qzeros,
        "scales": scales,
        "qweight": np.empty_like(base_qweight),
    }

    with pytest.raises(ValueError) as raised:
        merge_delta(**(arguments | change))

    assert sentence == str(raised.value)
