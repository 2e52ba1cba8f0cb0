"""Blocks of ggml's types read back: as ggml does it, and as near to their sources as can be."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

from carnice_build.checkpoint.gguf_types import TYPES
from carnice_build.formats.gguf.blocks import KINDS, Groups, allowed, unpacked
from carnice_build.kernels.ggml import quantize

Floats = NDArray[np.float32]

ROWS, COLUMNS = 16, 512


def values(groups: Groups) -> Floats:
    """The weights [groups, size], rounded as ggml rounds them."""
    return groups.levels * groups.step - groups.shift


def families(random: np.random.Generator) -> Iterator[Floats]:
    """Weights of many distributions, of BF16's precision."""
    normal = random.standard_normal((ROWS, COLUMNS))
    scales = np.repeat(10.0 ** random.uniform(-4, 0, (ROWS, COLUMNS // 16)), 16, axis=1)
    for values in (
        normal * 0.02,
        random.standard_t(3, (ROWS, COLUMNS)) * 0.01,
        random.uniform(-1, 1, (ROWS, COLUMNS)),
        np.abs(normal),
        normal * 0.001 + 0.05,
        normal * scales,
        normal * 1e-5,
        normal * 1e-7,
        np.zeros((ROWS, COLUMNS)),
        np.full((ROWS, COLUMNS), -0.3),
    ):
        yield (values.astype(np.float32).view(np.uint32) & 0xFFFF0000).view(np.float32)


def stored(kind: str, weights: Floats, importance: Floats | None = None) -> tuple[Groups, Floats]:
    """The groups that ggml makes of weights, and the weights in the shape of these."""
    raw, bad = quantize(kind, weights, importance)
    assert bad < 0
    groups = unpacked(kind, raw)
    return groups, weights.reshape(groups.levels.shape)


@pytest.mark.parametrize("kind", KINDS)
def test_values_are_those_of_the_gguf_package(kind: str) -> None:
    """Bit for bit, of any bytes; that of NaN apart."""
    quants = pytest.importorskip("gguf.quants")
    number = TYPES[kind].number
    raw = np.random.default_rng(1).integers(0, 256, (64, 2 * TYPES[kind].nbytes), np.uint8)

    with np.errstate(all="ignore"):
        ours = values(unpacked(kind, raw)).reshape(len(raw), -1)
        theirs = quants.dequantize(raw, number)

    np.testing.assert_array_equal(theirs, ours)


@pytest.mark.parametrize("kind", KINDS)
def test_what_ggml_makes_is_within_bounds(kind: str) -> None:
    """All of it, but for a share of the types of fewest bits that is stated."""
    for weights in families(np.random.default_rng(2)):
        groups, source = stored(kind, weights)

        outside = np.abs(values(groups) - source) > allowed(kind, groups, source)

        assert outside.mean() <= KINDS[kind].tolerated


@pytest.mark.parametrize("kind", KINDS)
def test_importance_moves_what_matters_little(kind: str) -> None:
    """Within the range of a step each weight still has its level, and no step is for nothing."""
    random = np.random.default_rng(3)
    importance = np.exp(1.5 * random.standard_normal(COLUMNS)).astype(np.float32)
    for weights in families(random):
        groups, source = stored(kind, weights, importance)

        bound = allowed(kind, groups, source, weighted=True)

        outside = np.abs(values(groups) - source) > bound
        assert outside.mean() <= KINDS[kind].tolerated_weighted


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weighted", [False, True])
def test_rows_of_others_are_out_of_bounds(kind: str, weighted: bool) -> None:
    """Most weights of a row that stands in the place of another are."""
    weights = next(families(np.random.default_rng(4)))
    groups, source = stored(kind, weights)
    other = np.roll(weights, 1, axis=0).reshape(source.shape)

    outside = np.abs(values(groups) - other) > allowed(kind, groups, other, weighted=weighted)

    assert outside.mean() > 0.45


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_of_nothing_is_out_of_bounds(kind: str) -> None:
    """Weights beyond the range of a step are only so far beyond it as a search leaves them."""
    weights = next(families(np.random.default_rng(5)))
    groups, source = stored(kind, weights)
    none = np.zeros_like(groups.step)
    emptied = Groups(groups.levels, none, groups.shift, none, groups.shift_unit)

    outside = np.abs(values(emptied) - source) > allowed(kind, emptied, source)

    assert outside.mean() > 0.9
