"""Q3_K, Q6_K, IQ4, MXFP4, the types of 32 values and casts against ggml, which is the reference."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from ggml_weights import (
    Array,
    differing,
    drawn,
    every_bf16,
    families,
    importances,
    made,
    reference,
    to_bf16,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from carnice_build.kernels.ggml import QUANTIZERS
from carnice_build.kernels.ggml._iq4_loops import BOUNDS

K_QUANTS = ("Q2_K", "Q4_K", "Q5_K")
"""Of which ``test_ggml_kernels`` speaks."""

TYPES = [name for name in QUANTIZERS if name not in K_QUANTS]

every_type = pytest.mark.parametrize("name", TYPES)
every_weighted_type = pytest.mark.parametrize(
    "name", [name for name in TYPES if QUANTIZERS[name].weighted is not None]
)


def ways(name: str, columns: int, seed: int = 0) -> Mapping[str, Any]:
    """No importance, and those of each kind where the type has regard of them."""
    given = importances(columns, seed) if QUANTIZERS[name].weighted is not None else {}
    return {"none": None, **given}


def with_zeros(seed: int = 0, shape: tuple[int, int] = (8, 1024)) -> Mapping[str, Array]:
    """Zeros of both signs beside numbers of one sign, and blocks of them alone."""
    draw = np.random.default_rng(seed)
    zeros = draw.choice(np.array([0.0, -0.0], np.float32), shape)
    sizes = np.abs(draw.standard_normal(shape)).astype(np.float32)
    found = draw.random(shape) < draw.choice([0, 0.02, 0.5], (shape[0], 1))
    return {
        "zeros and more": np.where(found, sizes, zeros),
        "zeros and less": np.where(found, -sizes, zeros),
        "opposite and of one size": np.where(found, np.float32(0.5), np.float32(-0.5)),
    }


@every_type
def test_weights_of_every_kind_get_the_bytes_of_ggml(name: str) -> None:
    """Whatever the weights are like, and whether columns have no importance, a measured one, or
    one of absurd numbers, every byte is that of ggml_quantize_chunk."""
    assert [] == differing(name, {**families(), **with_zeros()}, ways(name, 1024))


@every_type
def test_every_value_of_bf16_gets_the_bytes_of_ggml(name: str) -> None:
    """So do all finite values of BF16, in order and shuffled."""
    assert [] == differing(
        name, every_bf16(), {"none": None, "one": importances(256)["as measured"]}
    )


@every_type
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_floats_get_the_bytes_of_ggml(name: str, data: st.DataObject) -> None:
    """Whatever finite floats weights and importances are, the bytes are those of ggml."""
    rows, importance = drawn(data)

    assert reference(name, rows, importance).tobytes() == made(name, rows, importance).tobytes()


@pytest.mark.wide
@every_type
@pytest.mark.parametrize("seed", range(1, 11))
def test_many_weights_of_every_kind_get_the_bytes_of_ggml(name: str, seed: int) -> None:
    """The kinds of weights and importances, drawn again and again, four times as many rows."""
    shape = (32, 1024)
    weights = {**families(seed, shape), **with_zeros(seed, shape)}

    assert [] == differing(name, weights, ways(name, 1024, seed))


def test_the_exponent_of_mxfp4_is_that_of_a_float_logarithm() -> None:
    """Just below a power of two, log2 in float32 rounds up to the integer, and so does the scale:
    at every exponent, denormals included, it is ggml's."""
    below = np.arange(-60, 4, dtype=np.int64)
    normal = (np.arange(1, 255, dtype=np.int64) << 23)[:, None] + below
    denormal = (1 << np.arange(8, 24, dtype=np.int64))[:, None] + below
    patterns = np.concatenate([normal.reshape(-1), denormal.reshape(-1)])
    rows = np.zeros((patterns.size, 32), np.float32)
    rows[:, 5] = patterns.astype(np.uint32).view(np.float32)
    rows[:, 7] = rows[:, 5] * np.float32(-0.3)

    assert reference("MXFP4", rows).tobytes() == made("MXFP4", rows).tobytes()


@pytest.mark.parametrize("name", ["IQ4_NL", "IQ4_XS"])
def test_a_value_on_a_bound_of_iq4_goes_where_ggml_puts_it(name: str) -> None:
    """Values that lie midway between two levels of a scale of 1, and next to that."""
    on = np.concatenate(
        [BOUNDS, np.nextafter(BOUNDS, np.float32(-200)), np.nextafter(BOUNDS, np.float32(200))]
    )
    rows = np.resize(on.astype(np.float32), (8, 1024))
    rows[:, ::32] = -127

    assert [] == differing(name, {"on bounds": rows, "negated": -rows}, ways(name, 1024))


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@every_type
def test_rows_are_independent(name: str, weighted: bool) -> None:
    """Rows quantized one by one have the bytes they have together, though blocks of several rows
    are quantized side by side, and one row has 3 of 256."""
    rows = np.random.default_rng(0).standard_normal((23, 768), np.float32)
    importance = importances(768)["as measured"] if weighted else None

    assert made(name, rows, importance).tobytes() == b"".join(
        made(name, rows[k : k + 1], importance).tobytes() for k in range(23)
    )


@every_type
def test_sixteen_bits_are_widened(name: str) -> None:
    """Weights in BF16 and F16 get the bytes of the same numbers in F32."""
    rows = np.random.default_rng(0).standard_normal((5, 512), np.float32)
    halves = rows.astype(np.float16)
    patterns = to_bf16(rows)
    widened = (patterns.astype(np.uint32) << 16).view(np.float32)

    assert made(name, halves.astype(np.float32)).tobytes() == made(name, halves).tobytes()
    assert made(name, widened).tobytes() == made(name, patterns).tobytes()


@every_type
def test_no_rows_are_no_bytes(name: str) -> None:
    """Weights without rows, or without columns, are empty, with importance and without."""
    for importance in (None, np.ones(256, np.float32)):
        assert 0 == made(name, np.empty((0, 256), np.float32), importance).size
    for importance in (None, np.ones(0, np.float32)):
        assert (4, 0) == made(name, np.empty((4, 0), np.float32), importance).shape


@every_weighted_type
def test_importance_counts(name: str) -> None:
    """A type with a kernel for importance makes other bytes of it."""
    rows = np.random.default_rng(0).standard_normal((4, 512), np.float32)
    importance = importances(512)["as measured"]

    assert made(name, rows).tobytes() != made(name, rows, importance).tobytes()
