"""Floats of 16 bits to float32: numba, one thread, no GIL, cached on disk."""

from __future__ import annotations

from .._affine_loops import BF16, F16, Floats, Patterns, _kernel, _widen


@_kernel
def widen_bf16(patterns: Patterns, out: Floats) -> None:
    """The same values, flat."""
    for i in range(patterns.size):
        out[i] = _widen(patterns[i], BF16)


@_kernel
def widen_f16(patterns: Patterns, out: Floats) -> None:
    """As ``widen_bf16``, for F16."""
    for i in range(patterns.size):
        out[i] = _widen(patterns[i], F16)
