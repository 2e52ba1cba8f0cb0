"""Format `nvfp4`: 4-bit floats in blocks of 16, as NVIDIA ModelOpt exports them.

A linear weight becomes packed E2M1 codes, an E4M3 scale a block and one float32 scale a tensor.
Linears that read the same input share the latter, and the scale of that input, which comes from
a calibration: serving engines run them as one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from pydantic import Field

from carnice_build.calibration.passes import Activations, Calibration
from carnice_build.dtypes import WIDE_FLOATS, TensorSpec
from carnice_build.errors import PlanError
from carnice_build.graph import ArrayOp, NonFiniteValue, OutputTensor, TensorData, TensorRef, View
from carnice_build.models.base import Role, TensorFact
from carnice_build.models.kept import KEEP_LISTS
from carnice_build.package.base import Packager
from carnice_build.package.modelopt import ModelOptPackager
from carnice_build.recipe.patterns import Patterns
from carnice_build.recipe.schema import AnyPatterns
from carnice_build.steps.base import PlanContext, require_match
from carnice_build.transforms.base import Conversion, Format, check_fusions, in_stated_dtype
from carnice_build.transforms.ignore import unquantized_modules

BLOCK = 16
SETTINGS = {"bits": 4, "group_size": BLOCK}

_PLAIN_ROLES = (Role.LINEAR, Role.EMBEDDING, Role.CONV)


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


class InputScales(ArrayOp):
    """The static scales of activations: amax / (6 * 448), one for each group of linears.

    Input: amax F32 [linears].  Outputs: F32 [] for each entry of `groups`, a list of the indices
    into amax that share a scale.
    """

    name = "nvfp4.input_scales"
    version = 1
    libraries = ("numpy",)

    def infer(
        self, params: Mapping[str, Any], inputs: Sequence[TensorSpec]
    ) -> tuple[TensorSpec, ...]:
        """One scalar a group."""
        return tuple(TensorSpec("F32", ()) for _ in params["groups"])

    def apply(
        self, params: Mapping[str, Any], inputs: Sequence[TensorData], outputs: Sequence[TensorData]
    ) -> None:
        """Fill the scalars."""
        from carnice_build.kernels.nvfp4 import input_scale

        amax = inputs[0].array
        for group, output in zip(params["groups"], outputs, strict=True):
            output.array[...] = input_scale(float(amax[group].max()))


class Nvfp4Format(Format):
    """NVFP4 weights and activations, as modelopt's `export_hf_checkpoint` writes them."""

    format: Literal["nvfp4"]
    defaults: Literal["modelopt-0.47", "modelopt-0.43"] = Field(
        "modelopt-0.47",
        description="Whose NVFP4_DEFAULT_CFG says what stays in BF16; 0.43, unlike 0.47, "
        "quantizes the narrow projections of linear attention.",
    )
    keep: AnyPatterns = Field(
        default_factory=list, description="Further weights to keep in BF16, by name."
    )

    def packager(self) -> Packager:
        """Folders as modelopt exports them and vLLM loads them."""
        return ModelOptPackager()

    def engine_name(self) -> str:
        """As vLLM's `--quantization` has it."""
        return "modelopt"

    def extras(self) -> tuple[str, ...]:
        """The calibration runs in torch."""
        return ("torch",)

    def prepare(self, view: View, context: PlanContext) -> View:
        """In the type that the library loads the model in."""
        return in_stated_dtype(view, context)

    def convert(self, view: View, context: PlanContext) -> Conversion:
        """Every tensor of the view under its own name, the linears quantized."""
        facts = [fact for name, fact in context.architecture.tensors.items() if name in view]
        chosen = {fact.module: fact for fact in self._quantized(facts)}
        activations = Activations(Calibration(view, context))
        made: dict[str, list[OutputTensor]] = {}
        for layer in range(context.architecture.num_layers):
            made |= _layer(layer, chosen, view, activations, context)
        if left := [module for module in chosen if module not in made]:
            raise PlanError(
                f"{left[0]} is in no decoder layer, so it has no calibrated input",
                expected="it among `keep`",
            )
        tensors = [
            tensor
            for fact in facts
            for tensor in made.get(fact.module, [OutputTensor(fact.name, view[fact.name], fact)])
        ]
        check_fusions(chosen, view, context.architecture)
        return Conversion(
            tensors=tensors,
            parameters=sum(view[fact.name].spec.size for fact in facts),
            defaults=SETTINGS,
            quantized=dict.fromkeys(chosen, SETTINGS),
            causes={},
            ignored=unquantized_modules(context.architecture, chosen, _PLAIN_ROLES),
        )

    def _quantized(self, facts: Sequence[TensorFact]) -> Iterator[TensorFact]:
        names = [fact.name for fact in facts]
        kept = set(Patterns(list(KEEP_LISTS[self.defaults])).select(names))
        if self.keep:
            try:
                kept |= set(require_match(Patterns(self.keep), names, "tensor"))
            except PlanError as error:
                raise PlanError(error.what, nearest=error.nearest, at=("keep",)) from None
        for fact in facts:
            if fact.role is Role.LINEAR and fact.name not in kept:
                yield fact


def _layer(
    layer: int,
    chosen: Mapping[str, TensorFact],
    view: View,
    activations: Activations,
    context: PlanContext,
) -> dict[str, list[OutputTensor]]:
    """The tensors of each quantized module of a decoder layer."""
    groups = [
        [chosen[module] for module in group if module in chosen]
        for group in context.architecture.shared_inputs(layer)
    ]
    groups = [group for group in groups if group]
    if not groups:
        return {}
    amax, linears = activations.amax(layer)
    indices = [[linears.index(fact.module) for fact in group] for group in groups]
    scales = context.graph.add(InputScales(), {"groups": indices}, amax)
    return {
        fact.module: tensors
        for group, scale in zip(groups, scales, strict=True)
        for fact, tensors in _group(group, scale, view, context)
    }


def _group(
    group: Sequence[TensorFact], input_scale: TensorRef, view: View, context: PlanContext
) -> Iterator[tuple[TensorFact, list[OutputTensor]]]:
    try:
        made = context.graph.add(BlockQuantize(), {}, *(view[fact.name] for fact in group))
    except PlanError as error:
        modules = ", ".join(fact.module for fact in group)
        raise PlanError(f"module {modules}: {error.what}", expected=error.expected) from None
    for number, fact in enumerate(group):
        parts = {
            "input_scale": input_scale,
            "weight": made[2 * number],
            "weight_scale": made[2 * number + 1],
            "weight_scale_2": made[-1],
        }
        yield (
            fact,
            [OutputTensor(f"{fact.module}.{part}", ref, fact) for part, ref in parts.items()],
        )
