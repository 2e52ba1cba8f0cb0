"""The compiled loops of ``global_nvfp4``: numba, one thread, no GIL, cached on disk.

As in ``_nvfp4_loops``, whose blocks and chunks these are.
"""

from __future__ import annotations

import numpy as np

from ._affine_loops import BF16, F16, F32, Floats, Keys, Patterns, _inlined, _kernel, _widen
from ._compressed_loops import _round_to
from ._nvfp4_loops import (
    E2M1_MAX,
    E4M3_MAX,
    Bytes,
    _from_e4m3,
    _numbers_of_e2m1,
    _quantize,
    _restore,
    _to_e4m3,
)

E4M3_EPS = np.float32(0.125)
"""What compressed-tensors puts in place of a scale that rounds to zero."""


@_inlined
def _scales(
    count: int, kind: int, global_scale: np.float32, peaks: Keys, scales: Bytes, steps: Floats
) -> None:
    """The E4M3 scale of each block, and the step that one unit of E2M1 stands for.

    The quotient by 6 is rounded to the weight's type, what follows to float32.
    """
    for b in range(count):
        scale = global_scale * _round_to(_widen(peaks[b], kind) / E2M1_MAX, kind)
        code = _to_e4m3(scale if scale < E4M3_MAX else E4M3_MAX)
        code = code if code != np.uint32(0) else _to_e4m3(E4M3_EPS)
        scales[b] = np.uint8(code)
        steps[b] = _from_e4m3(code) / global_scale


@_kernel
def quantize_bf16(blocks: Patterns, global_scale: np.float32, packed: Bytes, scales: Bytes) -> int:
    """Quantize blocks [n, 16] into flat outputs; -1, or the first block of the chunk that holds
    a NaN or an Inf."""
    return _quantize(blocks, global_scale, _scales, BF16, 0x7F80, packed, scales)


@_kernel
def quantize_f16(blocks: Patterns, global_scale: np.float32, packed: Bytes, scales: Bytes) -> int:
    """As ``quantize_bf16``, for F16."""
    return _quantize(blocks, global_scale, _scales, F16, 0x7C00, packed, scales)


@_kernel
def quantize_f32(blocks: Patterns, global_scale: np.float32, packed: Bytes, scales: Bytes) -> int:
    """As ``quantize_bf16``, for F32."""
    return _quantize(blocks, global_scale, _scales, F32, 0x7F800000, packed, scales)


@_kernel
def dequantize(packed: Bytes, scales: Bytes, global_scale: np.float32, out: Floats) -> None:
    """Each code of ``packed`` [n, 8] times its block's scale over the global one, to blocks
    [n, 16]."""
    values = _numbers_of_e2m1()
    for b in range(out.shape[0]):
        step = _from_e4m3(np.uint32(scales[b])) / global_scale
        _restore(packed[b], values, step, out[b])
