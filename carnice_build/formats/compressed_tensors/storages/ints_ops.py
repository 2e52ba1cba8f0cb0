"""The op of storage `int-quantized`: integers, one a byte.

llm-compressor stores so what has quantized activations beside integer weights, of whatever bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from carnice_build.dtypes import TensorSpec
from carnice_build.errors import PlanError
from carnice_build.formats.blame import require_floats, uneven
from carnice_build.graph import ArrayOp, BadInput, TensorData, require_finite

SUFFIXES = ("weight", "weight_scale", "weight_zero_point")
"""The tensors that a weight becomes, in the order of outputs; symmetric ones have no zero point."""


class IntQuantize(ArrayOp):
    """A weight in bytes that hold integers, bit for bit llm-compressor's.

    Input: a weight [rows, columns].
    Outputs: I8 [rows, columns]; scales [rows, groups] of the weight's type; zero points I8
    [rows, groups], unless `symmetric`.
    Parameters: `bits`, 2 to 8; `group_size`, None for one group a row; `symmetric`.
    """

    name = "compressed.integers"
    version = 1
    libraries = ("numba",)
    rowwise = True

    def infer(
        self, params: Mapping[str, Any], inputs: Sequence[TensorSpec]
    ) -> tuple[TensorSpec, ...]:
        """Specs of codes, scales and zero points."""
        (spec,) = inputs
        require_floats(spec)
        rows, columns = spec.shape
        group = params["group_size"] or columns
        if why := uneven(columns, group):
            raise PlanError(why)
        grid = (rows, columns // group)
        zeros = () if params["symmetric"] else (TensorSpec("I8", grid),)
        return TensorSpec("I8", spec.shape), TensorSpec(spec.dtype, grid), *zeros

    def apply(
        self, params: Mapping[str, Any], inputs: Sequence[TensorData], outputs: Sequence[TensorData]
    ) -> None:
        """Quantize rows; raises NonFiniteValue, and BadInput for a range that has no scale."""
        from carnice_build.kernels.integers import quantize_rows

        (weight,) = inputs
        group = params["group_size"] or weight.array.shape[1]
        arrays = [output.array for output in outputs]
        try:
            bad = quantize_rows(weight.array, weight.dtype, params["bits"], group, *arrays)
        except ValueError as error:
            raise BadInput(0, f"cannot be quantized: {error}") from None
        require_finite(bad)
