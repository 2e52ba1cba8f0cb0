"""Ops of NVFP4: weights in blocks of 16, and the scales of activations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from carnice_build.dtypes import WIDE_FLOATS, TensorSpec
from carnice_build.errors import PlanError
from carnice_build.graph import ArrayOp, BadInput, NonFiniteValue, TensorData, require_finite

BLOCK = 16


def published(path: str, part: str, alone: bool) -> str:
    """The name of a `part` of what is quantized at `path`.

    `alone` is for the weights of all experts as one tensor, which have the path for a name.
    """
    return f"{path}.{part}" if not alone else f"{path}_{part}" if part != "weight" else path


class BlockQuantize(ArrayOp):
    """NVFP4 weights of linears that share their second-level scale, bit for bit modelopt's.

    Inputs: weights [rows, columns] of one width.
    Outputs: for each, packed U8 [rows, columns / 2] and scales F8_E4M3 [rows, columns / 16];
    then the scale they share, F32 [], the largest magnitude among them / (6 * 448).
    """

    name = "nvfp4.quantize"
    version = 1
    libraries = ("numba",)

    def infer(
        self, params: Mapping[str, Any], inputs: Sequence[TensorSpec]
    ) -> tuple[TensorSpec, ...]:
        """Packed weight and scales of each input, and the scale of all."""
        specs: list[TensorSpec] = []
        for spec in inputs:
            if spec.dtype not in WIDE_FLOATS:
                raise PlanError(
                    f"cannot quantize {spec.dtype} weights", expected=" or ".join(WIDE_FLOATS)
                )
            rows, columns = spec.shape
            if columns % BLOCK:
                raise PlanError(f"blocks of {BLOCK} do not divide the {columns} inputs")
            specs.append(TensorSpec("U8", (rows, columns // 2)))
            specs.append(TensorSpec("F8_E4M3", (rows, columns // BLOCK)))
        return (*specs, TensorSpec("F32", ()))

    def apply(
        self, params: Mapping[str, Any], inputs: Sequence[TensorData], outputs: Sequence[TensorData]
    ) -> None:
        """Quantize all rows; raises NonFiniteValue, with the number of the weight."""
        from carnice_build.kernels import nvfp4

        peak = 0.0
        for operand, weight in enumerate(inputs):
            amax, bad_index = nvfp4.amax(weight.array, weight.dtype)
            if bad_index >= 0:
                raise NonFiniteValue(bad_index, operand)
            peak = max(peak, float(amax))
        scale_2 = nvfp4.weight_scale_2(peak)
        outputs[-1].array[...] = scale_2
        for number, weight in enumerate(inputs):
            packed, scales = (output.array for output in outputs[2 * number : 2 * number + 2])
            nvfp4.quantize_rows(weight.array, weight.dtype, float(scale_2), packed, scales)


class ExpertsQuantize(ArrayOp):
    """NVFP4 weights of all experts as one tensor, bit for bit modelopt's: blocks lie along inputs.

    Input: weights [experts, in, out].
    Outputs: packed U8 [experts, in / 2, out]; scales F8_E4M3 [experts, in / 16, out]; the scale
    that all experts share, F32 [].
    """

    name = "nvfp4.quantize_experts"
    version = 1
    libraries = ("numba", "numpy")

    def infer(
        self, params: Mapping[str, Any], inputs: Sequence[TensorSpec]
    ) -> tuple[TensorSpec, ...]:
        """Packed weights, scales, and the scale of all."""
        experts, _, outs = inputs[0].shape
        turned = TensorSpec(inputs[0].dtype, (outs, inputs[0].shape[1]))
        packed, scales, scale_2 = BlockQuantize().infer(params, [turned])
        return (
            TensorSpec(packed.dtype, (experts, packed.shape[1], outs)),
            TensorSpec(scales.dtype, (experts, scales.shape[1], outs)),
            scale_2,
        )

    def apply(
        self, params: Mapping[str, Any], inputs: Sequence[TensorData], outputs: Sequence[TensorData]
    ) -> None:
        """Quantize one expert after another; raises NonFiniteValue."""
        import numpy as np

        from carnice_build.kernels import nvfp4

        weights = inputs[0]
        peak, bad_index = nvfp4.amax(weights.array, weights.dtype)
        require_finite(bad_index)
        scale_2 = nvfp4.weight_scale_2(peak)
        outputs[2].array[...] = scale_2
        for index, expert in enumerate(weights.array):
            rows = np.ascontiguousarray(expert.T)
            packed = np.empty((len(rows), rows.shape[1] // 2), np.uint8)
            scales = np.empty((len(rows), rows.shape[1] // BLOCK), np.uint8)
            nvfp4.quantize_rows(rows, weights.dtype, float(scale_2), packed, scales)
            outputs[0].array[index] = packed.T
            outputs[1].array[index] = scales.T


class InputScales(ArrayOp):
    """The static scales of activations: amax / (6 * 448), one for each group of linears.

    Input: amax F32 [linears], 0 for an expert that no token was sent to.
    Outputs: for each entry of `groups`, a list of the indices into amax that share a scale, that
    scale in F32 of the shape that `shapes` has there: [], or [experts] to be published for each.
    """

    name = "nvfp4.input_scales"
    version = 2
    libraries = ("numpy",)

    def infer(
        self, params: Mapping[str, Any], inputs: Sequence[TensorSpec]
    ) -> tuple[TensorSpec, ...]:
        """One scalar a group, or as many copies as there are experts."""
        return tuple(TensorSpec("F32", tuple(shape)) for shape in params["shapes"])

    def apply(
        self, params: Mapping[str, Any], inputs: Sequence[TensorData], outputs: Sequence[TensorData]
    ) -> None:
        """Fill the outputs; raises NonFiniteValue, and BadInput for what is no magnitude."""
        from carnice_build.kernels.elementwise import non_finite_index
        from carnice_build.kernels.nvfp4 import input_scale

        amax = inputs[0].array
        require_finite(non_finite_index(amax, inputs[0].dtype))
        if (amax < 0).any():
            raise BadInput(0, "was given a negative magnitude")
        for group, output in zip(params["groups"], outputs, strict=True):
            output.array[...] = input_scale(float(amax[group].max()))
