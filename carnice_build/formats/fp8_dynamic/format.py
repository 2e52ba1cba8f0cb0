"""Format `fp8-dynamic`: the scheme FP8_DYNAMIC of llm-compressor, without calibration.

A linear weight becomes E4M3 with a scale a row; engines scale activations a token, as they come.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from carnice_build.formats.base import (
    Conversion,
    Format,
    OutputTensor,
    check_fusions,
    in_stated_dtype,
)
from carnice_build.formats.blame import about_module
from carnice_build.formats.card import Card, own_template
from carnice_build.formats.compressed_config import ignored_modules
from carnice_build.formats.fp8_dynamic.files import fp8_files
from carnice_build.formats.fp8_dynamic.ops import SUFFIXES, RowQuantize
from carnice_build.formats.keep import kept, weights_of
from carnice_build.formats.scheme import Scheme
from carnice_build.formats.variant import Variant
from carnice_build.graph import View
from carnice_build.models.base import Architecture, Part, Role, TensorFact
from carnice_build.recipe.schema import AnyPatterns
from carnice_build.serving.profile import Serving, ServingProfiles
from carnice_build.steps.base import PlanContext

if TYPE_CHECKING:
    from carnice_build.formats.fp8_dynamic.checks import Fp8Checks, Fp8Reader

SCHEME = Scheme(8, kind="float")


class Fp8DynamicFormat(Format):
    """FP8 weights and activations, as llm-compressor saves them."""

    format: Literal["fp8-dynamic"]
    keep: AnyPatterns = Field(
        default_factory=list,
        description="Weights of decoder layers that stay as they are, by name.",
    )

    def files(self, variant: Variant) -> Mapping[str, bytes]:
        """As llm-compressor saves them."""
        return fp8_files(variant)

    def takes_untabled(self, model_type: str) -> bool:
        """See `Format.takes_untabled`."""
        return True

    def card(self) -> Card:
        """See `Format.card`."""
        tags = ("compressed-tensors", "fp8", "w8a8", "vllm")
        return Card(own_template(__package__), "transformers", tags)

    def checks(self) -> Fp8Checks:
        """See `Format.checks`."""
        from carnice_build.formats.fp8_dynamic.checks import Fp8Checks

        return Fp8Checks()

    @classmethod
    def reader(cls) -> type[Fp8Reader]:
        """See `Format.reader`."""
        from carnice_build.formats.fp8_dynamic.checks import Fp8Reader

        return Fp8Reader

    @classmethod
    def serving(cls) -> Serving:
        """As vLLM's `--quantization` has it."""
        return Serving("compressed-tensors", ServingProfiles(__package__))

    def leaving(self, modules: Sequence[str], architecture: Architecture) -> Mapping[str, Any]:
        """See `Format.leaving`."""
        return {"keep+": weights_of(modules)}

    def prepare(self, view: View, context: PlanContext) -> View:
        """In the type that the library loads the model in."""
        return in_stated_dtype(view, context)

    def convert(self, view: View, context: PlanContext) -> Conversion:
        """Every tensor of the view, the linears of decoder layers quantized."""
        architecture = context.architecture
        facts = [fact for name, fact in architecture.tensors.items() if name in view]
        linears = [fact for fact in facts if fact.part is Part.LAYERS and fact.role is Role.LINEAR]
        left = kept(self.keep, [fact.name for fact in linears])
        chosen = {fact.module: fact for fact in linears if fact.name not in left}
        check_fusions(chosen, view, architecture)
        tensors: list[OutputTensor] = []
        for fact in facts:
            if chosen.get(fact.module) is fact:
                tensors += _quantized(fact, view, context)
            else:
                tensors.append(OutputTensor(fact.name, view[fact.name], fact))
        return Conversion(
            tensors=tensors,
            parameters=sum(view[fact.name].spec.size for fact in facts),
            quantized=dict.fromkeys(chosen, SCHEME),
            causes={},
            ignored=ignored_modules(architecture, chosen),
        )


def _quantized(fact: TensorFact, view: View, context: PlanContext) -> list[OutputTensor]:
    with about_module(fact.module):
        made = context.graph.add_each(RowQuantize(), {}, view[fact.name])
    return [
        OutputTensor(f"{fact.module}.{suffix}", ref, fact)
        for suffix, ref in zip(SUFFIXES, made, strict=True)
    ]
