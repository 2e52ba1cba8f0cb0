"""Casts and sums against torch and mlx, on every 16-bit float and many 32-bit ones."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from carnice_build.kernels.elementwise import add_scalar, cast

Array = np.ndarray[Any, Any]

STORAGE = {"BF16": np.uint16, "F16": np.float16, "F32": np.float32}
PATTERN = {"BF16": np.uint16, "F16": np.uint16, "F32": np.uint32}
EXPONENT = {"BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F800000}
all_finite = -1
"""What a kernel returns that met no NaN and no Inf."""

MLX = {"BF16": mx.bfloat16, "F16": mx.float16, "F32": mx.float32}
TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
BITS_TORCH = {"BF16": torch.uint16, "F16": torch.uint16, "F32": torch.uint32}
BITS_MLX = {"BF16": mx.uint16, "F16": mx.uint16, "F32": mx.uint32}

every_dtype = pytest.mark.parametrize("dtype", STORAGE)
every_pair = pytest.mark.parametrize(
    ("source_dtype", "target_dtype"), [(a, b) for a in STORAGE for b in STORAGE]
)


@pytest.fixture(autouse=True)
def _mlx_on_the_cpu() -> None:
    mx.set_default_device(mx.cpu)


def to_torch(array: Array, dtype: str) -> torch.Tensor:
    return torch.from_numpy(array.view(PATTERN[dtype])).view(TORCH[dtype])


def torch_bytes(tensor: torch.Tensor, dtype: str) -> bytes:
    return tensor.view(BITS_TORCH[dtype]).numpy().tobytes()


def to_mlx(array: Array, dtype: str) -> mx.array:
    return mx.array(array.view(PATTERN[dtype])).view(MLX[dtype])


def mlx_bytes(array: mx.array, dtype: str) -> bytes:
    return np.array(array.view(BITS_MLX[dtype])).tobytes()


def every_finite(dtype: str) -> Array:
    """All finite floats of a 16-bit format; of F32, 200,000 patterns and all that lie on or
    beside the middle of two neighbours in BF16 or F16."""
    if dtype == "F32":
        drawn = np.random.default_rng(0).integers(0, 2**32, 200_000, np.uint32)
        upper = np.arange(2**16, dtype=np.uint32) << np.uint32(16)
        bf16_ties = [upper | np.uint32(low) for low in (0x7FFF, 0x8000, 0x8001, 0xFFFF)]
        halves = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
        f16_ties = ((halves[1:] + halves[:-1]) / 2).view(np.uint32)
        beside = [f16_ties + np.uint32(step) for step in (0, 1, 0xFFFFFFFF)]
        patterns = np.concatenate([drawn, *bf16_ties, *beside, *[b | 0x80000000 for b in beside]])
    else:
        patterns = np.arange(2**16, dtype=np.uint16)
    mask = EXPONENT[dtype]
    return patterns[(patterns & mask) != mask].view(STORAGE[dtype])


@every_pair
def test_casting_equals_torch_and_mlx(source_dtype: str, target_dtype: str) -> None:
    """Every finite value is cast to the bits that torch and mlx cast it to."""
    source = every_finite(source_dtype)
    out = np.empty(source.shape, STORAGE[target_dtype])

    assert all_finite == cast(source, source_dtype, target_dtype, out)

    by_torch = to_torch(source, source_dtype).to(TORCH[target_dtype])
    assert torch_bytes(by_torch, target_dtype) == out.tobytes()
    by_mlx = to_mlx(source, source_dtype).astype(MLX[target_dtype])
    assert mlx_bytes(by_mlx, target_dtype) == out.tobytes()


@every_dtype
@pytest.mark.parametrize("value", [1.0, -1.0, 0.0, 0.5, 2.0**-14])
def test_adding_an_exact_value_equals_torch_and_mlx(dtype: str, value: float) -> None:
    """Every finite x gives the bits that torch and mlx give for x + value."""
    source = every_finite(dtype)
    out = np.empty_like(source)

    assert all_finite == add_scalar(source, dtype, value, out)

    assert torch_bytes(to_torch(source, dtype) + value, dtype) == out.tobytes()
    assert mlx_bytes(to_mlx(source, dtype) + value, dtype) == out.tobytes()


@settings(max_examples=50, deadline=None)
@given(dtype=st.sampled_from(list(STORAGE)), value=st.floats(-1000, 1000, width=32))
def test_adding_any_value_equals_torch_and_mlx(dtype: str, value: float) -> None:
    """A value that is not exact in the dtype is rounded to it first, as torch and mlx do."""
    source = every_finite(dtype)[::37].copy()
    out = np.empty_like(source)

    assert all_finite == add_scalar(source, dtype, value, out)

    assert torch_bytes(to_torch(source, dtype) + value, dtype) == out.tobytes()
    assert mlx_bytes(to_mlx(source, dtype) + value, dtype) == out.tobytes()


@every_dtype
@pytest.mark.parametrize("special", ["nan", "inf", "-inf"])
def test_the_first_non_finite_element_is_found(dtype: str, special: str) -> None:
    """Both functions return the flat index of the first NaN or Inf."""
    source = np.zeros((4, 5), STORAGE[dtype])
    tensor = torch.full((2,), float(special)).to(TORCH[dtype])
    first = 7
    source.reshape(-1)[[first, 11]] = tensor.view(BITS_TORCH[dtype]).numpy().view(STORAGE[dtype])

    assert first == cast(source, dtype, "F32", np.empty((4, 5), np.float32))
    assert first == add_scalar(source, dtype, 1.0, np.empty_like(source))


def test_a_finite_value_beyond_the_range_becomes_infinite_quietly() -> None:
    """An overflow is not an error: the result is Inf, as torch has it."""
    out = np.empty(2, np.float16)

    assert all_finite == cast(np.array([65519, 65520], np.float32), "F32", "F16", out)
    assert [65504, np.inf] == out.tolist()


def test_arguments_that_do_not_fit_are_named() -> None:
    """Each misfit raises ValueError with what was given and what was expected."""
    source = np.zeros((2, 3), np.float32)

    with pytest.raises(ValueError, match=r"out is float32\[2, 3\], expected uint16\[2, 3\]"):
        cast(source, "F32", "BF16", np.empty_like(source))
    with pytest.raises(ValueError, match=r"source is float32\[2, 3\], expected float16\[2, 3\]"):
        add_scalar(source, "F16", 1.0, np.empty((2, 3), np.float16))
    with pytest.raises(ValueError, match="dtype is 'I32', expected one of BF16, F16, F32"):
        cast(source, "F32", "I32", np.empty_like(source))


def test_numba_is_not_needed() -> None:
    """Importing and using the elementwise kernels does not import numba."""
    script = (
        "import sys, numpy as np\n"
        "from carnice_build.kernels.elementwise import add_scalar\n"
        "x = np.zeros(4, np.uint16)\n"
        "add_scalar(x, 'BF16', 1.0, x)\n"
        "print('numba' in sys.modules, hex(x[0]))\n"
    )

    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)

    imported_and_sum = "False 0x3f80\n"
    assert imported_and_sum == done.stdout, done.stderr
