"""The stored scale of numbers in FP8, bit for bit compressed-tensors'; needs numpy alone."""

from __future__ import annotations

import numpy as np

from ._floats import Array
from .elementwise import narrow

_LARGEST = np.float32(448)
"""Of E4M3."""

_EPSILON = {"BF16": 2.0**-7, "F16": 2.0**-10, "F32": 2.0**-23}
"""torch's, by type, which the library takes for a scale of 0."""


def tensor_scale(amax: np.float32, dtype: str) -> Array:
    """The scale, [1] of ``dtype``, of numbers of that largest magnitude: amax / 448.

    Of zeros alone it is the library's smallest step.
    """
    scale = amax / _LARGEST if amax else np.float32(_EPSILON[dtype])
    return narrow(np.array([scale], np.float32), dtype)
