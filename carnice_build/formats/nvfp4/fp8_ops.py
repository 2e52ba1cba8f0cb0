"""Ops of FP8 and MXFP8 as modelopt exports them: weights, and the scales of activations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from carnice_build.dtypes import TensorSpec
from carnice_build.errors import PlanError
from carnice_build.formats.blame import require_floats, uneven
from carnice_build.formats.nvfp4.ops import InputScales, peak
from carnice_build.graph import ArrayOp, TensorData, require_finite

MX_BLOCK = 32


class TensorQuantize(ArrayOp):
    """FP8 weights under one scale, bit for bit modelopt's.

    Inputs: weights [rows, columns].
    Outputs: F8_E4M3 [rows, columns] for each; then the scale they share, F32 [], the largest
    magnitude among them / 448.
    """

    name = "modelopt.fp8"
    version = 1
    libraries = ("numba",)

    def infer(
        self, params: Mapping[str, Any], inputs: Sequence[TensorSpec]
    ) -> tuple[TensorSpec, ...]:
        """Specs of codes and scale."""
        for spec in inputs:
            require_floats(spec)
        return (*(TensorSpec("F8_E4M3", spec.shape) for spec in inputs), TensorSpec("F32", ()))

    def apply(
        self, params: Mapping[str, Any], inputs: Sequence[TensorData], outputs: Sequence[TensorData]
    ) -> None:
        """Quantize all rows; raises NonFiniteValue, with the number of the weight."""
        from carnice_build.kernels.modelopt_fp8 import quantize_tensor, weight_scale

        scale = weight_scale(
            max(peak(item.array, item.dtype, number) for number, item in enumerate(inputs))
        )
        outputs[-1].array[...] = scale
        for weight, codes in zip(inputs, outputs, strict=False):
            quantize_tensor(weight.array, weight.dtype, float(scale), codes.array)


class MxQuantize(ArrayOp):
    """A weight in MXFP8, bit for bit modelopt's.

    Input: a weight [rows, columns].
    Outputs: F8_E4M3 [rows, columns]; U8 [rows, columns / 32], the exponent of each block's scale.
    """

    name = "modelopt.mxfp8"
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
        if why := uneven(columns, MX_BLOCK):
            raise PlanError(why)
        return TensorSpec("F8_E4M3", spec.shape), TensorSpec("U8", (rows, columns // MX_BLOCK))

    def apply(
        self, params: Mapping[str, Any], inputs: Sequence[TensorData], outputs: Sequence[TensorData]
    ) -> None:
        """Quantize rows; raises NonFiniteValue."""
        from carnice_build.kernels.modelopt_fp8 import quantize_rows

        weight, (codes, scales) = inputs[0], (output.array for output in outputs)
        require_finite(quantize_rows(weight.array, weight.dtype, codes, scales))


class Fp8InputScales(InputScales):
    """The static scales of activations in FP8: as `InputScales`, but amax / 448."""

    name = "modelopt.fp8_input_scales"
    version = 1

    def scale(self, amax: float) -> Any:
        """See `InputScales.scale`."""
        from carnice_build.kernels.modelopt_fp8 import input_scale

        return input_scale(amax)
