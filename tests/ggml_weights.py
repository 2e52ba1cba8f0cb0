"""Weights and importances on which quantizers of ggml's types could differ, by what they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from carnice_build.backends.ggml import quantize_with_ggml
from carnice_build.kernels.ggml import quantize

Array = np.ndarray[Any, Any]

SHAPE = (8, 1024)
"""Of every family."""

LARGEST = np.finfo(np.float32).max
DENORMAL = 2.0**-149


def to_bf16(values: Array) -> Array:
    """The patterns of BF16 below the values."""
    found: Array = (np.asarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return found


def finite_bf16() -> Array:
    """Every finite pattern of BF16, in rows of 256."""
    patterns = np.arange(1 << 16, dtype=np.uint32)
    finite = patterns[(patterns & 0x7F80) != 0x7F80].astype(np.uint16)
    return finite.reshape(-1, 256)


def _finite(patterns: Array) -> Array:
    """Patterns of float32 as floats, NaN and Inf made finite by a bit of the exponent."""
    special = (patterns & 0x7F800000) == 0x7F800000
    floats: Array = (patterns ^ np.where(special, 0x00800000, 0).astype(np.uint32)).view(np.float32)
    return floats


def families(seed: int = 0, shape: tuple[int, int] = SHAPE) -> Mapping[str, Array]:
    """Float32 weights [rows, columns] of each kind."""
    draw = np.random.default_rng(seed)
    normal = draw.standard_normal(shape)
    signs = draw.choice([-1.0, 1.0], shape)
    column = np.arange(shape[1])
    rare = draw.random(shape) < 1 / 64
    by_block = draw.uniform(-40, 38, (shape[0], shape[1] // 256)).repeat(256, axis=1)
    by_part = draw.uniform(-12, 6, (shape[0], shape[1] // 16)).repeat(16, axis=1)
    made = {
        "ordinary": 0.02 * normal,
        "heavy tails": 0.02 * draw.standard_t(2, shape),
        "uniform": draw.uniform(-1, 1, shape),
        "of one sign": np.abs(normal),
        "of the other sign": -np.abs(normal),
        "far from zero": 100 + normal,
        "zeros": np.zeros(shape),
        "signed zeros": 0.0 * signs,
        "a constant": np.full(shape, 0.7),
        "a negative constant": np.full(shape, -0.7),
        "constants of blocks": by_part,
        "one number and its next": np.float32(-1) - np.spacing(np.float32(1)) * (normal > 0),
        "denormals": DENORMAL * draw.integers(-200, 200, shape),
        "around the least normal": 2.0**-126 * normal,
        "zeros but few": normal * rare,
        "one huge": 0.02 * normal + 1e10 * rare,
        "one huge and negative": 0.02 * normal - 1e10 * rare,
        "the largest floats": LARGEST * signs,
        "sums that overflow": 1e19 * normal,
        "powers of two": signs * 2.0 ** draw.integers(-20, 4, shape),
        "powers of two of all sizes": signs * 2.0 ** draw.integers(-149, 128, shape),
        "ties": (draw.integers(-31, 32, shape) + 0.5) / 16,
        "few values": draw.integers(-2, 3, shape) / 4,
        "two values": signs,
        "a ramp": np.broadcast_to(column / 100.0 - 3, shape),
        "a ramp down": np.broadcast_to(3 - column / 100.0, shape),
        "tiny": 1e-12 * normal,
        "below what an F16 holds": 1e-7 * normal,
        "beyond what an F16 holds": 1e7 * normal,
        "blocks of all sizes": normal * 10.0**by_block,
        "parts of all sizes": normal * 10.0**by_part,
        "values of all sizes": normal * 10.0 ** draw.uniform(-30, 8, shape),
        "any patterns": _finite(draw.integers(0, 1 << 32, shape, np.uint32)),
    }
    limit = float(LARGEST)
    return {name: np.clip(w, -limit, limit).astype(np.float32) for name, w in made.items()}


def importances(columns: int, seed: int = 0) -> Mapping[str, Array]:
    """Float32 importances [columns] of each kind."""
    draw = np.random.default_rng(seed)
    chi = draw.chisquare(1, columns)
    one = np.zeros(columns)
    one[3] = 1
    made = {
        "as measured": chi,
        "of heavy tails": chi * 10.0 ** draw.uniform(-3, 3, columns),
        "equal": np.ones(columns),
        "zeros": np.zeros(columns),
        "one column alone": one,
        "few columns": chi * (draw.random(columns) < 0.1),
        "few columns and all the same": (draw.random(columns) < 0.1) * 1.0,
        "small": 10.0 ** draw.uniform(-38, -30, columns),
        "denormal": DENORMAL * draw.integers(0, 100, columns),
        "large": 10.0 ** draw.uniform(30, 38, columns),
        "wide": 10.0 ** draw.uniform(-20, 10, columns),
        "of all sizes": 10.0 ** draw.uniform(-38, 38, columns),
    }
    return {name: item.astype(np.float32) for name, item in made.items()}


all_finite = -1
"""What a kernel returns that met no NaN and no Inf."""


def made(name: str, rows: Array, importance: Array | None = None) -> Array:
    """The bytes of our kernel."""
    found, bad = quantize(name, rows, importance)
    assert all_finite == bad
    return found


def reference(name: str, rows: Array, importance: Array | None = None) -> Array:
    """Those of ggml."""
    found, bad = quantize_with_ggml(name, rows, importance)
    assert all_finite == bad
    return found


def differing(name: str, weights: Mapping[str, Array], ways: Mapping[str, Any]) -> list[str]:
    """The kinds of weights and importances of which a byte is not ggml's."""
    return [
        f"{kind}, importance {way}"
        for kind, rows in weights.items()
        for way, importance in ways.items()
        if made(name, rows, importance).tobytes() != reference(name, rows, importance).tobytes()
    ]


def every_bf16() -> Mapping[str, Array]:
    """All finite values of BF16, in order and shuffled."""
    ordered = finite_bf16()
    shuffled = np.random.default_rng(0).permutation(ordered.reshape(-1)).reshape(ordered.shape)
    return {"in order": ordered, "shuffled": shuffled}


def drawn(data: st.DataObject) -> tuple[Array, Array | None]:
    """Two rows of any finite weights, and any importance of their columns, or none."""
    finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
    weight = st.one_of(finite, st.floats(-1, 1, width=32), st.sampled_from([0.0, -0.0, 0.5, -0.5]))
    rows = data.draw(arrays(np.float32, (2, 256), elements=weight, fill=weight))
    positive = st.floats(0, width=32, allow_nan=False, allow_infinity=False)
    importance = data.draw(st.none() | arrays(np.float32, 256, elements=positive, fill=positive))
    return rows, importance
