"""mlx's own quantization, behind the signatures of our fused kernels."""

from __future__ import annotations

from typing import Any

from carnice_build.errors import BackendError
from carnice_build.extras import pip_install


def quantize_rows(
    weight: Any, dtype: str, bits: int, group_size: int, packed: Any, scales: Any, biases: Any
) -> None:
    """Quantize `weight` [rows, columns] with `mlx.core.quantize`; BF16 arrays are uint16."""
    import numpy as np

    mx = _mlx()
    results = mx.quantize(_array(weight, dtype), group_size, bits, mode="affine")
    for result, output in zip(results, (packed, scales, biases), strict=True):
        output[...] = np.asarray(result.view(mx.uint16) if result.dtype == mx.bfloat16 else result)


def quantize_float_rows(weight: Any, dtype: str, mode: str, packed: Any, scales: Any) -> None:
    """As `quantize_rows`, to the floats of `mode`, with no biases.

    On the CPU wherever mlx runs: its GPUs round ties otherwise.
    """
    import numpy as np

    mx = _mlx()
    results = mx.quantize(_array(weight, dtype), mode=mode, stream=mx.cpu)
    for result, output in zip(results, (packed, scales), strict=True):
        output[...] = np.asarray(result)


def _mlx() -> Any:
    try:
        import mlx.core as mx
    except ImportError:
        raise BackendError("mlx is not installed", expected=pip_install("mlx")) from None
    return mx


def _array(weight: Any, dtype: str) -> Any:
    mx = _mlx()
    array = mx.array(weight)
    return array.view(mx.bfloat16) if dtype == "BF16" else array
