"""Format `nvfp4`: 4-bit floats in blocks of 16, as NVIDIA ModelOpt exports them.

A linear weight becomes packed E2M1 codes, an E4M3 scale a block and one float32 scale a tensor.
Linears that read the same input share the latter, and the scale of that input, which comes from
a calibration: serving engines run them as one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from carnice_build.calibration.chain import Activations
from carnice_build.calibration.passes import Calibration
from carnice_build.errors import PlanError
from carnice_build.formats.base import (
    Conversion,
    Format,
    OutputTensor,
    check_fusions,
    in_stated_dtype,
)
from carnice_build.formats.blame import about_module
from carnice_build.formats.card import Card, own_template
from carnice_build.formats.exclusions import unquantized_modules
from carnice_build.formats.keep import kept
from carnice_build.formats.nvfp4.files import modelopt_files
from carnice_build.formats.nvfp4.ops import BLOCK, BlockQuantize, InputScales
from carnice_build.formats.scheme import Scheme
from carnice_build.formats.variant import Variant
from carnice_build.graph import TensorRef, View
from carnice_build.models.base import LINEARS, Role, TensorFact
from carnice_build.models.kept import KEEP_LISTS
from carnice_build.recipe.patterns import Patterns
from carnice_build.recipe.schema import AnyPatterns
from carnice_build.serving.profile import Serving, ServingProfiles
from carnice_build.steps.base import PlanContext

if TYPE_CHECKING:
    from carnice_build.formats.nvfp4.checks import Nvfp4Checks, Nvfp4Reader

SCHEME = Scheme(4, BLOCK, "float")

_PLAIN_ROLES = (*LINEARS, Role.EMBEDDING, Role.CONV)


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

    def files(self, variant: Variant) -> Mapping[str, bytes]:
        """As modelopt exports them and vLLM loads them."""
        return modelopt_files(variant)

    def card(self) -> Card:
        """See `Format.card`."""
        return Card(own_template(__package__), "transformers", ("modelopt", "nvfp4", "vllm"))

    def checks(self) -> Nvfp4Checks:
        """See `Format.checks`."""
        from carnice_build.formats.nvfp4.checks import Nvfp4Checks

        return Nvfp4Checks()

    @classmethod
    def reader(cls) -> type[Nvfp4Reader]:
        """See `Format.reader`."""
        from carnice_build.formats.nvfp4.checks import Nvfp4Reader

        return Nvfp4Reader

    @classmethod
    def serving(cls) -> Serving:
        """As vLLM's `--quantization` has it."""
        return Serving("modelopt", ServingProfiles(__package__))

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
        activations = Activations(Calibration(view, context.calibrated()))
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
            for tensor in (
                made[fact.module]
                if chosen.get(fact.module) is fact
                else [OutputTensor(fact.name, view[fact.name], fact)]
            )
        ]
        check_fusions(chosen, view, context.architecture)
        return Conversion(
            tensors=tensors,
            parameters=sum(view[fact.name].spec.size for fact in facts),
            quantized=dict.fromkeys(chosen, SCHEME),
            ignored=unquantized_modules(context.architecture, chosen, _PLAIN_ROLES),
        )

    def _quantized(self, facts: Sequence[TensorFact]) -> Iterator[TensorFact]:
        names = [fact.name for fact in facts]
        left = set(Patterns(list(KEEP_LISTS[self.defaults])).select(names))
        left |= kept(self.keep, names)
        for fact in facts:
            if fact.role is Role.LINEAR and fact.name not in left:
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
    indices = [
        [index for fact in group for index, linear in enumerate(linears) if linear == fact.module]
        for group in groups
    ]
    scales = context.graph.add(InputScales(), {"groups": indices}, amax)
    return {
        fact.module: tensors
        for group, scale in zip(groups, scales, strict=True)
        for fact, tensors in _group(group, scale, view, context)
    }


def _group(
    group: Sequence[TensorFact], input_scale: TensorRef, view: View, context: PlanContext
) -> Iterator[tuple[TensorFact, list[OutputTensor]]]:
    with about_module(", ".join(fact.module for fact in group)):
        made = context.graph.add_each(BlockQuantize(), {}, *(view[fact.name] for fact in group))
    for number, fact in enumerate(group):
        parts = {
            "input_scale": input_scale,
            "weight": made[2 * number],
            "weight_scale": made[2 * number + 1],
            "weight_scale_2": made[-1],
        }
        yield (
            fact,
            [OutputTensor(f"{fact.module}.{suffix}", ref, fact) for suffix, ref in parts.items()],
        )
