"""Format `nvfp4`: 4-bit floats in blocks of 16, as NVIDIA ModelOpt exports them.

A linear weight becomes packed E2M1 codes, an E4M3 scale a block and one float32 scale a tensor.
Linears that read the same input share the latter, and the scale of that input, which comes from
a calibration: serving engines run them as one.
Each expert of a layer has scales of its own for its weights; that of the input is one for all
experts, whichever of them a token was sent to.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from carnice_build.calibration.chain import Activations
from carnice_build.calibration.plan import Calibration
from carnice_build.formats.base import (
    Conversion,
    Format,
    OutputTensor,
    check_fusions,
    in_stated_dtype,
)
from carnice_build.formats.blame import about_module, refuse_unfit
from carnice_build.formats.card import Card, own_template
from carnice_build.formats.exclusions import unquantized_modules
from carnice_build.formats.keep import kept, weights_of
from carnice_build.formats.nvfp4.files import modelopt_files
from carnice_build.formats.nvfp4.ops import (
    BLOCK,
    BlockQuantize,
    InputScales,
    TakeTurns,
    TurnsQuantize,
    unfit,
)
from carnice_build.formats.scheme import Scheme
from carnice_build.formats.variant import Variant
from carnice_build.graph import TensorRef, View
from carnice_build.models.base import LINEARS, Architecture, Part, Role, TensorFact
from carnice_build.models.kept import KEEP_LISTS, MTP_HEADS
from carnice_build.recipe.patterns import Patterns
from carnice_build.recipe.schema import AnyPatterns
from carnice_build.serving.profile import Serving, ServingProfiles
from carnice_build.steps.base import PlanContext

if TYPE_CHECKING:
    from carnice_build.formats.nvfp4.checks import Nvfp4Checks, Nvfp4Reader

SCHEME = Scheme(4, BLOCK, "float")

_PLAIN_ROLES = (*LINEARS, Role.EMBEDDING, Role.CONV)

_UNCALIBRATED = "no decoder layer has it, so its input is not calibrated"


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
        return Card(own_template(__package__), "vllm", ("modelopt", "nvfp4", "vllm"))

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

    def leaving(self, modules: Sequence[str], architecture: Architecture) -> Mapping[str, Any]:
        """See `Format.leaving`."""
        return {"keep+": weights_of(modules)}

    def prepare(self, view: View, context: PlanContext) -> View:
        """In the type that the library loads the model in."""
        return in_stated_dtype(view, context)

    def convert(self, view: View, context: PlanContext) -> Conversion:
        """Every tensor of the view under its own name, the linears quantized."""
        facts = [fact for name, fact in context.architecture.tensors.items() if name in view]
        chosen = {fact.module: fact for fact in self._chosen(facts)}
        found = {module: unfit(view[fact.name].spec) for module, fact in chosen.items()}
        refuse_unfit(found, "it among `keep`")
        activations = Activations(Calibration(view, context.calibrated()))
        made: dict[str, list[OutputTensor]] = {}
        for layer in range(context.architecture.num_layers):
            groups = _chosen(context.architecture.shared_inputs(layer), chosen)
            if groups:
                made |= _quantized(groups, *activations.amax(layer), view, context)
        if left := [module for module in chosen if module not in made]:
            made |= _outside(left, chosen, view, activations, context)
        biases = _turned_biases(facts, chosen, view, context)
        tensors: list[OutputTensor] = []
        for fact in facts:
            if chosen.get(fact.module) is fact:
                tensors += made[fact.module]
            elif fact.name in biases:
                tensors += biases[fact.name]
            else:
                tensors.append(OutputTensor(fact.name, view[fact.name], fact))
        check_fusions(chosen, view, context.architecture)
        figures = {
            f"tokens sent to each expert of layer {layer}": counts
            for layer, counts in activations.experts.items()
        }
        return Conversion(
            tensors=tensors,
            parameters=sum(view[fact.name].spec.size for fact in facts),
            quantized=dict.fromkeys(chosen, SCHEME),
            ignored=unquantized_modules(context.architecture, chosen, _PLAIN_ROLES),
            figures=figures,
        )

    def _chosen(self, facts: Sequence[TensorFact]) -> Iterator[TensorFact]:
        names, patterns = [fact.name for fact in facts], KEEP_LISTS[self.defaults]
        left = set(Patterns(list(patterns)).select(names)) | kept(self.keep, names)
        if MTP_HEADS in patterns:
            # Their names differ from family to family.
            left |= {fact.name for fact in facts if fact.part is Part.MTP}
        for fact in facts:
            if fact.role is Role.LINEAR and fact.name not in left:
                yield fact


def _chosen(
    groups: Sequence[Sequence[str]], chosen: Mapping[str, TensorFact]
) -> list[list[TensorFact]]:
    """Of groups of modules, the facts of those that are `chosen`."""
    found = ([chosen[module] for module in group if module in chosen] for group in groups)
    return [group for group in found if group]


def _outside(
    modules: Sequence[str],
    chosen: Mapping[str, TensorFact],
    view: View,
    activations: Activations,
    context: PlanContext,
) -> dict[str, list[OutputTensor]]:
    """The tensors of each of `modules`, which are in no decoder layer; each has its own input."""
    amax, linears = activations.outside
    left = [module for module in modules if module not in linears]
    refuse_unfit(dict.fromkeys(left, _UNCALIBRATED), "it among `keep`")
    assert amax is not None
    return _quantized([[chosen[module]] for module in modules], amax, linears, view, context)


def _quantized(
    groups: Sequence[Sequence[TensorFact]],
    amax: TensorRef,
    linears: Sequence[str],
    view: View,
    context: PlanContext,
) -> dict[str, list[OutputTensor]]:
    """The tensors of each module of `groups`, each of which reads one input.

    `amax` are the largest inputs of `linears`; of a stack there is one for each expert.
    """
    places: dict[str, list[int]] = {}
    for index, linear in enumerate(linears):
        places.setdefault(linear, []).append(index)
    params = {
        "groups": [[index for fact in group for index in places[fact.module]] for group in groups],
        "shapes": [
            () if _turned(group[0]) else view[group[0].name].spec.shape[:-2] for group in groups
        ],
    }
    scales = context.graph.add(InputScales(), params, amax)
    return {
        fact.module: tensors
        for group, scale in zip(groups, scales, strict=True)
        for fact, tensors in _group(group, scale, view, context)
    }


def _group(
    group: Sequence[TensorFact], input_scale: TensorRef, view: View, context: PlanContext
) -> Iterator[tuple[TensorFact, list[OutputTensor]]]:
    inputs = [view[fact.name] for fact in group]
    if name := _turned(group[0]):
        with about_module(", ".join(fact.module for fact in group)):
            packed, scales, scale_2 = context.graph.add(TurnsQuantize(), {}, *inputs)
        parts = {
            f"{name}_input_scale": input_scale,
            name: packed,
            f"{name}_weight_scale": scales,
            f"{name}_weight_scale_2": scale_2,
        }
        yield group[0], [OutputTensor(part, ref, group[0]) for part, ref in parts.items()]
        yield from ((fact, []) for fact in group[1:])
        return
    with about_module(", ".join(fact.module for fact in group)):
        made = context.graph.add_each(BlockQuantize(), {}, *inputs)
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


def _turned(fact: TensorFact) -> str | None:
    """The one tensor that the library publishes experts as, where transformers has them so."""
    return fact.fused.turned if fact.fused else None


def _turned_biases(
    facts: Sequence[TensorFact],
    chosen: Mapping[str, TensorFact],
    view: View,
    context: PlanContext,
) -> dict[str, list[OutputTensor]]:
    """What is published of the biases of such experts, by the names of their facts."""
    fused: dict[str, list[TensorFact]] = {}
    for fact in facts:
        owner = chosen.get(fact.module)
        if fact.role is Role.BIAS and fact.fused and owner and _turned(owner):
            fused.setdefault(fact.fused.name, []).append(fact)
    found: dict[str, list[OutputTensor]] = {}
    for name, group in fused.items():
        refs = [view[fact.name] for fact in group]
        ref = refs[0] if len(refs) == 1 else context.graph.add(TakeTurns(), {}, *refs)[0]
        found |= {fact.name: [] for fact in group}
        found[group[0].name] = [OutputTensor(name, ref, group[0])]
    return found
