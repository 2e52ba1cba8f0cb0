"""Ops of storage `nvfp4-pack-quantized`: E2M1 in blocks of 16 under a global scale."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from carnice_build.dtypes import TensorSpec
from carnice_build.errors import PlanError
from carnice_build.formats.nvfp4.ops import BlockQuantize, peak
from carnice_build.graph import ArrayOp, BadInput, NonFiniteValue, TensorData

SUFFIXES = ("weight_packed", "weight_scale", "weight_global_scale")
"""The tensors that a weight becomes, by the end of their names."""


class GlobalQuantize(ArrayOp):
    """NVFP4 weights of linears that share their global scale, bit for bit llm-compressor's.

    Inputs: weights [rows, columns] of one type.
    Outputs: for each, packed U8 [rows, columns / 2] and scales F8_E4M3 [rows, columns / 16];
    then the global scale that they share, F32 [1].
    """

    name = "nvfp4.global"
    version = 1
    libraries = ("numba", "numpy")

    def infer(
        self, params: Mapping[str, Any], inputs: Sequence[TensorSpec]
    ) -> tuple[TensorSpec, ...]:
        """Packed weight and scales of each input, and the scale of all."""
        *specs, _ = BlockQuantize().infer(params, inputs)
        for spec in inputs:
            if spec.dtype != inputs[0].dtype:
                raise PlanError(
                    f"{inputs[0].dtype} and {spec.dtype} weights cannot share a scale",
                    expected="one type",
                )
        return (*specs, TensorSpec("F32", (1,)))

    def apply(
        self, params: Mapping[str, Any], inputs: Sequence[TensorData], outputs: Sequence[TensorData]
    ) -> None:
        """Quantize all rows; raises NonFiniteValue, with the number of the weight.

        Raises BadInput for weights whose global scale overflows F16: the library takes 1 then, and
        makes zeros of most of them.
        """
        from carnice_build.kernels import global_nvfp4

        peaks = [peak(item.array, item.dtype, operand) for operand, item in enumerate(inputs)]
        largest = max(peaks)
        dtype = inputs[0].dtype
        scale = global_nvfp4.global_scale(largest, dtype)
        if dtype == "F16" and scale == 1 and 0 < largest < 1:
            raise BadInput(
                peaks.index(largest),
                f"has no weight beyond {largest:.2g}, and F16 has no global scale for that",
                expected="weights in BF16",
            )
        outputs[-1].array[...] = scale
        for number, weight in enumerate(inputs):
            packed, scales = (output.array for output in outputs[2 * number : 2 * number + 2])
            global_nvfp4.quantize_rows(weight.array, dtype, float(scale), packed, scales)


class InverseScale(ArrayOp):
    """A global scale of compressed-tensors that means what a second scale of modelopt does.

    With it, what modelopt's format makes of a weight is a module of this storage too; not the one
    that llm-compressor would make of the same weight.
    Input: `weight_scale_2` F32 [].  Output: `weight_global_scale` F32 [1], its inverse.
    """

    name = "nvfp4.inverse"
    version = 1
    libraries = ("numpy",)

    def infer(
        self, params: Mapping[str, Any], inputs: Sequence[TensorSpec]
    ) -> tuple[TensorSpec, ...]:
        """One number."""
        return (TensorSpec("F32", (1,)),)

    def apply(
        self, params: Mapping[str, Any], inputs: Sequence[TensorData], outputs: Sequence[TensorData]
    ) -> None:
        """Raises NonFiniteValue, and BadInput for a scale without an inverse."""
        import numpy as np

        scale = np.float32(inputs[0].array.reshape(-1)[0])
        if not np.isfinite(scale):
            raise NonFiniteValue(0)
        with np.errstate(over="ignore", divide="ignore"):
            inverse = np.float32(1) / scale
        if not 0 < inverse < np.inf:
            raise BadInput(0, f"is {scale}", expected="a positive scale that has an inverse")
        outputs[0].array[...] = inverse
