"""Stored scales of the inputs of linears, from the largest magnitudes of a calibration."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from carnice_build.calibration.chain import Activations as Maxima
from carnice_build.dtypes import TensorSpec
from carnice_build.formats.blame import UNCALIBRATED, refuse_unfit
from carnice_build.formats.compressed_tensors.grouping import Grouping
from carnice_build.formats.compressed_tensors.schemes import Activations
from carnice_build.formats.compressed_tensors.storages import INPUT_SUFFIXES
from carnice_build.graph import ArrayOp, BadInput, TensorData, TensorRef, View, require_finite
from carnice_build.steps.base import PlanContext
from carnice_build.tensors import STACK

_EXPERTS = (
    "inputs of experts are calibrated on the tokens that they are sent, and llm-compressor does "
    "it on all tokens"
)


class InputScales(ArrayOp):
    """The scales of static inputs, bit for bit llm-compressor's under its observer static_minmax.

    Input: the largest magnitudes F32 [linears].
    Outputs: for each of `indices` into them, one number: for 8 `bits` amax / 448, of type `dtype`;
    for 4 a global scale, F32, which is 2688 / amax as `kernels.global_nvfp4` computes it.
    Parameters: `indices`, `bits`, and `dtype`, that in which the library computes: the weights'.
    """

    name = "compressed.input_scales"
    version = 1
    libraries = ("numpy",)

    def infer(
        self, params: Mapping[str, Any], inputs: Sequence[TensorSpec]
    ) -> tuple[TensorSpec, ...]:
        """One number each."""
        dtype = params["dtype"] if params["bits"] == 8 else "F32"
        return tuple(TensorSpec(dtype, (1,)) for _ in params["indices"])

    def apply(
        self, params: Mapping[str, Any], inputs: Sequence[TensorData], outputs: Sequence[TensorData]
    ) -> None:
        """Fill the outputs; raises NonFiniteValue, and BadInput for what is no magnitude."""
        import numpy as np

        from carnice_build.kernels.elementwise import non_finite_index
        from carnice_build.kernels.fp8_scale import tensor_scale
        from carnice_build.kernels.global_nvfp4 import global_scale

        amax = inputs[0].array
        require_finite(non_finite_index(amax, inputs[0].dtype))
        if (amax < 0).any():
            raise BadInput(0, "was given a negative magnitude")
        for index, output in zip(params["indices"], outputs, strict=True):
            largest = np.float32(amax[index])
            scale = global_scale if params["bits"] == 4 else tensor_scale
            output.array[...] = scale(largest, params["dtype"])


def is_stored(inputs: Activations | None) -> bool:
    """Whether a scale of a group's inputs is stored."""
    return inputs is not None and inputs.dynamic is not True


def input_scales(
    grouping: Grouping, view: View, context: PlanContext, passes: Callable[[], Maxima]
) -> dict[str, tuple[str, TensorRef]]:
    """By module, the end of the name of its input's scale, and that scale.

    `passes` are those of the calibration, which are asked for where there are such scales.
    PlanError for modules whose inputs no calibration tells.
    """
    wanted = {
        module: inputs.num_bits
        for module in grouping.facts
        if (inputs := grouping.group(module).input_activations) and is_stored(inputs)
    }
    if not wanted:
        return {}
    refuse_unfit(
        {module: _EXPERTS if STACK in module else "" for module in wanted},
        "a scheme with dynamic inputs, or a pattern for it under `ignore`",
    )
    maxima = passes()
    found: dict[str, tuple[str, TensorRef]] = {}
    for layer in range(context.architecture.num_layers):
        modules = [module for module in wanted if _layer(grouping, module) == layer]
        if modules:
            found |= _of_layer(modules, wanted, *maxima.amax(layer), grouping, view, context)
    refuse_unfit(
        {module: "" if module in found else UNCALIBRATED for module in wanted},
        "a pattern for it under `ignore`",
    )
    return found


def _layer(grouping: Grouping, module: str) -> int | None:
    return grouping.facts[module].layer


def _of_layer(
    modules: Sequence[str],
    wanted: Mapping[str, int],
    amax: TensorRef,
    linears: Sequence[str],
    grouping: Grouping,
    view: View,
    context: PlanContext,
) -> Iterator[tuple[str, tuple[str, TensorRef]]]:
    kinds: dict[tuple[int, str], list[str]] = {}
    for module in modules:
        dtype = view[grouping.facts[module].name].spec.dtype
        kinds.setdefault((wanted[module], dtype), []).append(module)
    for (bits, dtype), alike in kinds.items():
        indices = [linears.index(module) for module in alike]
        params = {"indices": indices, "bits": bits, "dtype": dtype}
        scales = context.graph.add(InputScales(), params, amax)
        for module, scale in zip(alike, scales, strict=True):
            yield module, (INPUT_SUFFIXES[bits], scale)
