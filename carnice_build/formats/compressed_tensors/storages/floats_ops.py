"""The op of storage `float-quantized` with a scale for a whole weight, or for each of its blocks.

A scale for each row has an op of its own, which works row by row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from carnice_build.dtypes import TensorSpec
from carnice_build.formats.blame import require_floats
from carnice_build.graph import ArrayOp, TensorData, require_finite

SUFFIXES = ("weight", "weight_scale")
"""The tensors that a weight becomes, by the end of their names, in the order of outputs."""


class FloatQuantize(ArrayOp):
    """A weight in E4M3, bit for bit llm-compressor's.

    Input: a weight [rows, columns].
    Outputs: F8_E4M3 [rows, columns]; scales of the weight's type, [1], or [blocks of rows, blocks
    of columns], of which the last ones may be smaller.
    Parameter: `block`, its rows and columns; None for the whole weight.
    """

    name = "fp8.blocks"
    version = 1
    libraries = ("numba",)

    def infer(
        self, params: Mapping[str, Any], inputs: Sequence[TensorSpec]
    ) -> tuple[TensorSpec, ...]:
        """Specs of codes and scales."""
        (spec,) = inputs
        require_floats(spec)
        rows, columns = spec.shape
        grid: tuple[int, ...] = (1,)
        if params["block"]:
            height, width = params["block"]
            grid = (-(-rows // height), -(-columns // width))
        return TensorSpec("F8_E4M3", (rows, columns)), TensorSpec(spec.dtype, grid)

    def apply(
        self, params: Mapping[str, Any], inputs: Sequence[TensorData], outputs: Sequence[TensorData]
    ) -> None:
        """Quantize; raises NonFiniteValue."""
        from carnice_build.kernels.fp8 import block_grid, quantize_blocks

        (weight,), (codes, scales) = inputs, (output.array for output in outputs)
        height, width = params["block"] or weight.array.shape
        grid = scales.reshape(block_grid(weight.array.shape, height, width))
        require_finite(quantize_blocks(weight.array, weight.dtype, height, width, codes, grid))
