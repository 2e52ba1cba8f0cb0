"""Float32 to the floats that a file may hold: numba, one thread, no GIL, cached on disk."""

from __future__ import annotations

import numpy as np

from .._affine_loops import BF16, Floats, _kernel, _narrow
from .._nvfp4_loops import Bytes
from ._scale_loops import f16_bits


@_kernel
def f32(rows: Floats, out: Bytes) -> None:
    """The same values; finite rows [rows, cols] to [rows, cols * 4]."""
    values = rows.reshape(-1)
    made = out.reshape(-1).view(np.float32)
    for i in range(values.size):
        made[i] = values[i]


@_kernel
def f16(rows: Floats, out: Bytes) -> None:
    """The nearest values, ties to even, Inf for those too large; to [rows, cols * 2]."""
    values = rows.reshape(-1)
    made = out.reshape(-1).view(np.uint16)
    for i in range(values.size):
        made[i] = f16_bits(values[i])


@_kernel
def bf16(rows: Floats, out: Bytes) -> None:
    """As ``f16``, to BF16."""
    values = rows.reshape(-1)
    made = out.reshape(-1).view(np.uint16)
    for i in range(values.size):
        made[i] = np.uint16(_narrow(values[i], BF16))
