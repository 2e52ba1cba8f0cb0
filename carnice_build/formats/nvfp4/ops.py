"""Ops of NVFP4: weights in blocks of 16, and the scales of activations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from carnice_build.dtypes import WIDE_FLOATS, TensorSpec
from carnice_build.errors import PlanError
from carnice_build.graph import ArrayOp, BadInput, NonFiniteValue, TensorData, require_finite

BLOCK = 16


def unfit(spec: TensorSpec) -> str:
    """What of the shape of a weight does not fit the format, if anything."""
    columns = spec.shape[-1]
    return f"blocks of {BLOCK} do not divide the {columns} inputs" if columns % BLOCK else ""


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
            if why := unfit(spec):
                raise PlanError(why)
            rows, columns = spec.shape
            specs.append(TensorSpec("U8", (rows, columns // 2)))
            specs.append(TensorSpec("F8_E4M3", (rows, columns // BLOCK)))
        return (*specs, TensorSpec("F32", ()))

    def apply(
        self, params: Mapping[str, Any], inputs: Sequence[TensorData], outputs: Sequence[TensorData]
    ) -> None:
        """Quantize all rows; raises NonFiniteValue, with the number of the weight."""
        from carnice_build.kernels import nvfp4

        scale_2 = _shared_scale(inputs)
        outputs[-1].array[...] = scale_2
        for number, weight in enumerate(inputs):
            packed, scales = (output.array for output in outputs[2 * number : 2 * number + 2])
            nvfp4.quantize_rows(weight.array, weight.dtype, float(scale_2), packed, scales)


def _shared_scale(weights: Sequence[TensorData]) -> Any:
    """The second-level scale of all `weights`, float32; NonFiniteValue with the weight's number."""
    from carnice_build.kernels import nvfp4

    peak = 0.0
    for operand, weight in enumerate(weights):
        amax, bad_index = nvfp4.amax(weight.array, weight.dtype)
        if bad_index >= 0:
            raise NonFiniteValue(bad_index, operand)
        peak = max(peak, float(amax))
    return nvfp4.weight_scale_2(peak)


class TurnsQuantize(ArrayOp):
    """NVFP4 weights of all experts as one tensor with columns for rows, bit for bit modelopt's.

    Inputs: stacks [experts, rows, columns], whose rows take turns.
    Outputs, for n inputs: packed U8 [experts, columns / 2, n * rows]; scales F8_E4M3 [experts,
    columns / 16, n * rows]; the scale that all experts share, F32 [].
    """

    name = "nvfp4.quantize_turns"
    version = 1
    libraries = ("numba", "numpy")

    def infer(
        self, params: Mapping[str, Any], inputs: Sequence[TensorSpec]
    ) -> tuple[TensorSpec, ...]:
        """Packed weights, scales, and the scale of all."""
        experts, rows, columns = inputs[0].shape
        if any(spec != inputs[0] for spec in inputs):
            raise PlanError("rows that take turns are as many in each stack")
        whole = TensorSpec(inputs[0].dtype, (len(inputs) * rows, columns))
        packed, scales, scale_2 = BlockQuantize().infer(params, [whole])
        turned = (TensorSpec(spec.dtype, (experts, *spec.shape[::-1])) for spec in (packed, scales))
        return (*turned, scale_2)

    def apply(
        self, params: Mapping[str, Any], inputs: Sequence[TensorData], outputs: Sequence[TensorData]
    ) -> None:
        """Quantize one expert after another; raises NonFiniteValue, with the stack's number."""
        import numpy as np

        from carnice_build.kernels import nvfp4

        scale_2 = _shared_scale(inputs)
        outputs[2].array[...] = scale_2
        columns = inputs[0].array.shape[2]
        for index in range(len(inputs[0].array)):
            rows = np.stack([stack.array[index] for stack in inputs], axis=1).reshape(-1, columns)
            packed = np.empty((len(rows), columns // 2), np.uint8)
            scales = np.empty((len(rows), columns // BLOCK), np.uint8)
            nvfp4.quantize_rows(rows, inputs[0].dtype, float(scale_2), packed, scales)
            outputs[0].array[index] = packed.T
            outputs[1].array[index] = scales.T


class TakeTurns(ArrayOp):
    """Vectors of experts as one, in which their numbers take turns.

    Inputs: n stacks [experts, size] of one type.  Output: [experts, n * size].
    """

    name = "nvfp4.take_turns"
    version = 1
    libraries = ("numpy",)
    rowwise = True

    def infer(
        self, params: Mapping[str, Any], inputs: Sequence[TensorSpec]
    ) -> tuple[TensorSpec, ...]:
        """As wide as all together."""
        experts, size = inputs[0].shape
        return (TensorSpec(inputs[0].dtype, (experts, len(inputs) * size)),)

    def apply(
        self, params: Mapping[str, Any], inputs: Sequence[TensorData], outputs: Sequence[TensorData]
    ) -> None:
        """Copy; raises NonFiniteValue, with the number of the stack."""
        from carnice_build.kernels.elementwise import non_finite_index

        for number, stack in enumerate(inputs):
            bad_index = non_finite_index(stack.array, stack.dtype)
            if bad_index >= 0:
                raise NonFiniteValue(bad_index, number)
            outputs[0].array[:, number :: len(inputs)] = stack.array


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
