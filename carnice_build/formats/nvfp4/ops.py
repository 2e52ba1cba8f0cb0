"""Ops of NVFP4: weights in blocks of 16, and the scales of activations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from carnice_build.dtypes import TensorSpec
from carnice_build.errors import PlanError
from carnice_build.formats.blame import blocks_unfit, require_floats
from carnice_build.graph import (
    ArrayOp,
    BadInput,
    NonFiniteValue,
    ProcessOp,
    TensorData,
    require_finite,
)
from carnice_build.tensor_file import TensorFile

BLOCK = 16


def unfit(spec: TensorSpec) -> str:
    """What of the shape of a weight does not fit the format, if anything."""
    return blocks_unfit(spec.shape[-1], BLOCK)


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
            require_floats(spec)
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

    peaks = (peak(weight.array, weight.dtype, operand) for operand, weight in enumerate(weights))
    return nvfp4.weight_scale_2(max(peaks))


def peak(array: Any, dtype: str, operand: int, first: int = 0) -> float:
    """The largest magnitude of what begins at flat index `first` of input `operand`."""
    from carnice_build.kernels import nvfp4

    amax, bad_index = nvfp4.amax(array, dtype)
    if bad_index >= 0:
        raise NonFiniteValue(first + bad_index, operand)
    return float(amax)


class TurnsQuantize(ProcessOp):
    """NVFP4 weights of all experts as one tensor with columns for rows, bit for bit modelopt's.

    Every code depends on the scale that all experts share, so the experts are read twice, one at a
    time: for their largest magnitude, and to be quantized.  That takes files, which is why the op
    runs in a process; all stacks of a layer in memory would grow with the number of experts.

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

    def steps(self, params: Mapping[str, Any], inputs: Sequence[TensorSpec]) -> int:
        """One for each expert."""
        return inputs[0].shape[0]

    def memory(self, params: Mapping[str, Any], inputs: Sequence[TensorSpec]) -> int:
        """One expert: its weights and what is made of them, each also in the other order."""
        made = self.infer(params, inputs)[:2]
        return 2 * sum(spec.row_bytes for spec in (*inputs, *made))

    def run(
        self,
        params: Mapping[str, Any],
        inputs: Sequence[TensorFile],
        outputs: Sequence[TensorFile],
        progress: Callable[[], None],
    ) -> None:
        """Quantize one expert after another; raises NonFiniteValue, with the stack's number."""
        import numpy as np

        from carnice_build.kernels import nvfp4

        experts, _, columns = inputs[0].spec.shape
        size = inputs[0].spec.size // experts
        peaks = (
            peak(stack.read_row(index), stack.spec.dtype, number, index * size)
            for number, stack in enumerate(inputs)
            for index in range(experts)
        )
        scale_2 = nvfp4.weight_scale_2(max(peaks))
        outputs[2].write(np.array(scale_2, np.float32))
        for index in range(experts):
            rows = np.stack([stack.read_row(index) for stack in inputs], axis=1)
            rows = rows.reshape(-1, columns)
            packed = np.empty((len(rows), columns // 2), np.uint8)
            scales = np.empty((len(rows), columns // BLOCK), np.uint8)
            nvfp4.quantize_rows(rows, inputs[0].spec.dtype, float(scale_2), packed, scales)
            outputs[0].write_row(index, packed.T)
            outputs[1].write_row(index, scales.T)
            progress()


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

        amax = inputs[0].array
        require_finite(non_finite_index(amax, inputs[0].dtype))
        if (amax < 0).any():
            raise BadInput(0, "was given a negative magnitude")
        for group, output in zip(params["groups"], outputs, strict=True):
            output.array[...] = self.scale(float(amax[group].max()))

    def scale(self, amax: float) -> Any:
        """The scale of inputs whose largest magnitude is `amax`, float32."""
        from carnice_build.kernels.nvfp4 import input_scale

        return input_scale(amax)
