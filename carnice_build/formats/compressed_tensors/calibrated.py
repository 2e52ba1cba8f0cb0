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


class InputScales(ArrayOp):
    """The scales of static inputs, bit for bit llm-compressor's under its observer static_minmax.

    Input: the largest magnitudes F32 [linears].
    Outputs: for each of `indices` into them one number [1], or [E, 1] for a list of them, those of
    a stack of experts: for 8 `bits` amax / 448, of type `dtype`; for 4 a global scale, F32, which
    is 2688 / amax as `kernels.global_nvfp4` computes it.
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
        return tuple(
            TensorSpec(dtype, (len(index), 1) if isinstance(index, list) else (1,))
            for index in params["indices"]
        )

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
        scale = global_scale if params["bits"] == 4 else tensor_scale
        for index, output in zip(params["indices"], outputs, strict=True):
            scales = output.array.reshape(-1)
            for place, largest in enumerate(np.atleast_1d(amax[index])):
                scales[place : place + 1] = scale(largest, params["dtype"])


def is_stored(inputs: Activations | None) -> bool:
    """Whether a scale of a group's inputs is stored."""
    return inputs is not None and inputs.dynamic is not True


def input_scales(
    grouping: Grouping, view: View, context: PlanContext, passes: Callable[[], Maxima]
) -> dict[str, tuple[str, TensorRef]]:
    """By module, the end of the name of its input's scale, and that scale.

    `passes` are those of the calibration, which are asked for where there are such scales.
    Every expert is calibrated on every token, as the library does it.
    PlanError for modules whose inputs no calibration tells.
    """
    wanted = {
        module: inputs.num_bits
        for module in grouping.facts
        if (inputs := grouping.group(module).input_activations) and is_stored(inputs)
    }
    if not wanted:
        return {}
    maxima = passes()
    found: dict[str, tuple[str, TensorRef]] = {}
    for layer in range(context.architecture.num_layers):
        modules = [module for module in wanted if _layer(grouping, module) == layer]
        for stacked, seen in ((False, maxima.amax), (True, maxima.everyone)):
            alike = [module for module in modules if (STACK in module) == stacked]
            if alike:
                found |= _of_layer(alike, wanted, *seen(layer), grouping, view, context)
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
        indices = [_places(module, linears) for module in alike]
        params = {"indices": indices, "bits": bits, "dtype": dtype}
        scales = context.graph.add(InputScales(), params, amax)
        for module, scale in zip(alike, scales, strict=True):
            yield module, (INPUT_SUFFIXES[bits], scale)


def _places(module: str, linears: Sequence[str]) -> int | list[int]:
    """Where a module is among `linears`, or where each expert of a stack is."""
    if STACK not in module:
        return linears.index(module)
    return [place for place, linear in enumerate(linears) if linear == module]
