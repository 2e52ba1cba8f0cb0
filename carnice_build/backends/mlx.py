"""mlx's own affine quantization, behind the signature of our fused kernel."""

from __future__ import annotations

from typing import Any

from carnice_build.errors import BackendError
from carnice_build.extras import pip_install


def quantize_rows(
    weight: Any, dtype: str, bits: int, group_size: int, packed: Any, scales: Any, biases: Any
) -> None:
    """Quantize `weight` [rows, columns] with `mlx.core.quantize`; BF16 arrays are uint16."""
    try:
        import mlx.core as mx
    except ImportError:
        raise BackendError("mlx is not installed", expected=pip_install("mlx")) from None
    import numpy as np

    array = mx.array(weight)
    if dtype == "BF16":
        array = array.view(mx.bfloat16)
    results = mx.quantize(array, group_size, bits, mode="affine")
    for result, output in zip(results, (packed, scales, biases), strict=True):
        output[...] = np.asarray(result.view(mx.uint16) if result.dtype == mx.bfloat16 else result)
