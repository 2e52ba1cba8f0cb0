"""Weights to quantize to four bits, and their way to torch and back."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

Array = np.ndarray[Any, Any]

STORAGE = {"BF16": np.uint16, "F16": np.float16, "F32": np.float32}
PATTERN = {"BF16": np.uint16, "F16": np.uint16, "F32": np.uint32}
EXPONENT = {"BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F800000}
TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
GROUP_SIZES = (32, 64, 128)

all_fine = -1
"""What a kernel returns that met nothing it refuses."""


def to_torch(array: Array, dtype: str) -> torch.Tensor:
    """The same bits as a tensor."""
    signed = np.int16 if array.itemsize == 2 else np.int32
    return torch.from_numpy(array.copy().view(signed)).view(TORCH[dtype])


def from_torch(tensor: torch.Tensor) -> Array:
    """The same bits in the storage that kernels take."""
    tensor = tensor.contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(np.uint16)
    return tensor.numpy()


def from_float(values: Array, dtype: str) -> Array:
    """Rounded to ``dtype`` by torch."""
    return from_torch(torch.from_numpy(np.asarray(values, np.float32)).to(TORCH[dtype]))


def to_float(array: Array, dtype: str) -> Array:
    """Widened to float32 by torch."""
    return to_torch(array, dtype).float().numpy()


def ordinary(dtype: str, shape: tuple[int, int], seed: int = 0) -> Array:
    """Values as weights have them."""
    return from_float(np.random.default_rng(seed).standard_normal(shape) * 0.02, dtype)


def corners(dtype: str) -> Array:
    """Rows of 128 values at the corners of both rules, none above 65504."""
    ramp = np.arange(128, dtype=np.float64)
    smallest = {"BF16": 1e-40, "F16": 6e-8, "F32": 1e-45}[dtype]
    rows = [
        ramp * 0,
        ramp * -0.0,
        np.where(ramp % 2, -0.0, 0.0),
        np.where(ramp % 32, 0, 1),
        np.where(ramp % 32, 0, -1),
        np.where(ramp % 32, 1e-3, 60000),
        np.where(ramp % 32, -1e-3, -65504),
        ramp * 0 + 1,
        ramp * 0 - 1,
        np.where(ramp % 2, 1, -1),
        np.where(ramp % 2, 1 + 2**-7, -1),
        np.where(ramp % 2, 1, -1 - 2**-7),
        ramp * 0 + smallest,
        ramp * smallest,
        ramp * -smallest,
        np.where(ramp % 2, smallest, -smallest),
        np.where(ramp % 3, 0, -16 * smallest),
        np.where(ramp % 2, 4e-5, 8e-5),
        np.where(ramp % 2, 8e-5, -4e-5),
        np.where(ramp % 2, 1e-6, -2e-6),
        (ramp % 32 - 16) / 2,
        (16 - ramp % 32) / 2,
        (ramp % 32 - 16) / 32,
        (ramp % 32) / 2,
        -(ramp % 32) / 2,
        (ramp % 31) / 4 - 4,
        ramp + 1,
        -ramp - 1,
        (ramp - 63.5) / 8,
    ]
    return from_float(np.stack(rows), dtype)


def finite(patterns: Array, dtype: str, bound: int | None = None) -> Array:
    """The patterns as floats, an exponent from ``bound`` on (Inf's, unless given) lowered to the
    one before it."""
    mask = EXPONENT[dtype]
    largest = (mask if bound is None else bound) - (mask & -mask)
    exponents = patterns & mask
    return (patterns ^ exponents | np.minimum(exponents, largest)).view(STORAGE[dtype])


def random_patterns(
    dtype: str, shape: tuple[int, int], seed: int = 0, bound: int | None = None
) -> Array:
    """Values of every magnitude below ``bound``, denormals and both zeros among them."""
    top = np.iinfo(PATTERN[dtype]).max
    draws = np.random.default_rng(seed).integers(0, top, shape, PATTERN[dtype], endpoint=True)
    return finite(draws, dtype, bound)


@st.composite
def any_finite(
    draw: st.DrawFn, dtype: str, group_size: int, rows: int, bound: int | None = None
) -> Array:
    """Weights of any finite bit patterns, one or two groups wide."""
    top = int(np.iinfo(PATTERN[dtype]).max)
    shape = (rows, group_size * draw(st.integers(1, 2)))
    patterns = draw(arrays(PATTERN[dtype], shape, elements=st.integers(0, top)))
    return finite(patterns, dtype, bound)
