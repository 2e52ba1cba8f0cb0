"""The op of storages `mxfp4-pack-quantized` and `mxfp8-quantized`: blocks of 32, powers of two."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from carnice_build.dtypes import TensorSpec
from carnice_build.errors import PlanError
from carnice_build.formats.blame import blocks_unfit, require_floats
from carnice_build.graph import ArrayOp, BadInput, TensorData, require_finite

BLOCK = 32

SUFFIXES = {4: ("weight_packed", "weight_scale"), 8: ("weight", "weight_scale")}
"""By bits, the tensors that a weight becomes, in the order of outputs."""


def unfit(spec: TensorSpec) -> str:
    """What of the shape of a weight does not fit the format, if anything."""
    return blocks_unfit(spec.shape[-1], BLOCK)


class MxQuantize(ArrayOp):
    """A weight in MXFP4 or MXFP8, bit for bit llm-compressor's.

    Input: a weight [rows, columns].
    Outputs: packed U8 [rows, columns / 2] for 4 `bits`, F8_E4M3 [rows, columns] for 8; the
    exponents of scales U8 [rows, columns / 32].
    """

    name = "mx.quantize"
    version = 1
    libraries = ("numba",)
    rowwise = True

    def infer(
        self, params: Mapping[str, Any], inputs: Sequence[TensorSpec]
    ) -> tuple[TensorSpec, ...]:
        """Specs of codes and scales."""
        (spec,) = inputs
        require_floats(spec)
        if why := unfit(spec):
            raise PlanError(why)
        rows, columns = spec.shape
        packed = TensorSpec("U8", (rows, columns // 2))
        codes = packed if params["bits"] == 4 else TensorSpec("F8_E4M3", (rows, columns))
        return codes, TensorSpec("U8", (rows, columns // BLOCK))

    def apply(
        self, params: Mapping[str, Any], inputs: Sequence[TensorData], outputs: Sequence[TensorData]
    ) -> None:
        """Quantize rows; raises NonFiniteValue, and BadInput for what no scale is enough for."""
        from carnice_build.kernels.mx import quantize_rows

        weight, (codes, scales) = inputs[0], (output.array for output in outputs)
        try:
            bad = quantize_rows(weight.array, weight.dtype, params["bits"], codes, scales)
        except ValueError as error:
            raise BadInput(0, f"cannot be quantized: {error}") from None
        require_finite(bad)
