"""The op of FP8: a weight in E4M3 with a scale for each row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from carnice_build.dtypes import TensorSpec
from carnice_build.formats.blame import require_floats
from carnice_build.graph import ArrayOp, TensorData, require_finite

SUFFIXES = ("weight", "weight_scale")
"""The tensors that a weight becomes, by the end of their names, in the order of outputs."""


class RowQuantize(ArrayOp):
    """A weight in FP8, bit for bit llm-compressor's.

    Input: a weight [rows, columns].
    Outputs: F8_E4M3 [rows, columns]; scales [rows, 1] of the weight's type.
    """

    name = "fp8.quantize"
    version = 1
    libraries = ("numba",)
    rowwise = True

    def infer(
        self, params: Mapping[str, Any], inputs: Sequence[TensorSpec]
    ) -> tuple[TensorSpec, ...]:
        """Specs of codes and scales."""
        (spec,) = inputs
        require_floats(spec)
        rows, columns = spec.shape
        return TensorSpec("F8_E4M3", (rows, columns)), TensorSpec(spec.dtype, (rows, 1))

    def apply(
        self, params: Mapping[str, Any], inputs: Sequence[TensorData], outputs: Sequence[TensorData]
    ) -> None:
        """Quantize rows; raises NonFiniteValue."""
        from carnice_build.kernels.fp8 import quantize_rows

        weight, (codes, scales) = inputs[0], (output.array for output in outputs)
        require_finite(quantize_rows(weight.array, weight.dtype, codes, scales))
