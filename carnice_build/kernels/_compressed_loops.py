"""What the compiled loops of compressed-tensors' storages have in common.

torch computes in the weight's dtype, one operation at a time: each takes float32 values and its
result is rounded to that dtype. So does ``_round_to`` here, after every single operation.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ._affine_loops import BF16, F16, F32, _inlined, _narrow, _widen

ZeroPoints = NDArray[np.int8]

EPS_BF16, EPS_F16, EPS_F32 = np.float32(2.0**-7), np.float32(2.0**-10), np.float32(2.0**-23)
"""The distance from 1 to the next value, which torch puts in place of a scale of 0."""

F16_OVERFLOW = np.float32(65520)
"""From here on, values round to Inf in F16."""


@_inlined
def _round_to(value: np.float32, kind: int) -> np.float32:
    """The nearest value of the format. ``_widen`` has no Inf and no NaN of F16, so what rounds
    to Inf, or is NaN, does not go through it."""
    if kind == F32:
        return value
    rounded = _widen(_narrow(value, kind), kind)
    if kind == F16:
        return rounded if abs(value) < F16_OVERFLOW else value * np.float32(np.inf)
    return rounded


@_inlined
def _eps(kind: int) -> np.float32:
    if kind == BF16:
        return EPS_BF16
    return EPS_F16 if kind == F16 else EPS_F32
