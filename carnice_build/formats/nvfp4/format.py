"""Format `nvfp4`: 4-bit floats in blocks of 16, and 8-bit ones, as NVIDIA ModelOpt exports them.

In NVFP4 a linear weight becomes packed E2M1 codes, an E4M3 scale a block and one float32 scale a
tensor.  Linears that read the same input share the latter, and the scale of that input, which
comes from a calibration: serving engines run them as one.
Each expert of a layer has scales of its own for its weights; that of the input is one for all
experts, whichever of them a token was sent to.
`algorithms` has the others; rules give some modules another one than the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from carnice_build.calibration.chain import Activations
from carnice_build.calibration.plan import Calibration
from carnice_build.errors import PlanError
from carnice_build.formats.base import (
    Conversion,
    Format,
    OutputTensor,
    check_fusions,
    in_stated_dtype,
)
from carnice_build.formats.blame import refuse_unfit
from carnice_build.formats.card import Card, own_template
from carnice_build.formats.exclusions import unquantized_modules
from carnice_build.formats.keep import kept, weights_of
from carnice_build.formats.kv_cache import KvCache, cache_scales, check_caches
from carnice_build.formats.nvfp4.algorithms import ALGORITHMS, Algorithm, QuantAlgo
from carnice_build.formats.nvfp4.files import DEFAULT, LAYERS, SCALES, modelopt_files
from carnice_build.formats.nvfp4.made import Linears, turned, turned_biases
from carnice_build.formats.rules import Rule, choose, fitted
from carnice_build.formats.variant import Variant
from carnice_build.graph import View
from carnice_build.models.base import LINEARS, Architecture, Part, Role, TensorFact
from carnice_build.models.kept import KEEP_LISTS, MTP_HEADS
from carnice_build.recipe.patterns import Patterns
from carnice_build.recipe.schema import AnyPatterns
from carnice_build.serving.profile import Serving, ServingProfiles
from carnice_build.steps.base import PlanContext
from carnice_build.tensors import STACK

if TYPE_CHECKING:
    from carnice_build.formats.nvfp4.checks import Nvfp4Checks, Nvfp4Reader

_EIGHT = 8

_TAGS = {"NVFP4": "nvfp4", "FP8": "fp8", "W4A16_NVFP4": "nvfp4", "MXFP8": "mxfp8"}

_PLAIN_ROLES = (*LINEARS, Role.EMBEDDING, Role.CONV)


class ModelOptRule(Rule):
    """Another algorithm for some modules."""

    quant_algo: QuantAlgo | None = Field(None, description="How these modules are quantized.")


class Nvfp4Format(Format):
    """NVFP4, FP8 and MXFP8, as modelopt's `export_hf_checkpoint` writes them."""

    format: Literal["nvfp4"]
    quant_algo: QuantAlgo = Field(
        "NVFP4",
        description="How linears are quantized where no rule says otherwise, by the library's own "
        "name: `NVFP4` and `FP8` round activations too, under scales from a calibration, `MXFP8` "
        "under scales that engines find as they go, and `W4A16_NVFP4` leaves them alone.",
    )
    rules: list[ModelOptRule] = Field(
        default_factory=list,
        description="Exceptions; the last rule that fits a module wins. Linears that engines fuse, "
        "that read one input, or that are a layer's experts, take one algorithm.",
    )
    defaults: Literal["modelopt-0.47", "modelopt-0.43"] = Field(
        "modelopt-0.47",
        description="Whose NVFP4_DEFAULT_CFG says what stays in BF16; 0.43, unlike 0.47, "
        "quantizes the narrow projections of linear attention.",
    )
    keep: AnyPatterns = Field(
        default_factory=list, description="Further weights to keep in BF16, by name."
    )
    kv_cache: KvCache | None = Field(
        None, description="Store scales for a cache of FP8, as modelopt's FP8_KV_CFG does."
    )

    def schemes(self) -> tuple[str, ...]:
        """The algorithms that the recipe names."""
        return tuple(item.name for item in self.used)

    def files(self, variant: Variant) -> Mapping[str, bytes]:
        """As modelopt exports them and vLLM loads them."""
        return modelopt_files(variant, self.kv_cache is not None)

    def card(self) -> Card:
        """See `Format.card`."""
        kinds = dict.fromkeys(_TAGS[algorithm.name] for algorithm in self.used)
        return Card(own_template(__package__), "vllm", ("modelopt", *kinds, "vllm"))

    def checks(self) -> Nvfp4Checks:
        """See `Format.checks`."""
        from carnice_build.formats.nvfp4.checks import Nvfp4Checks

        return Nvfp4Checks(
            self.quant_algo, mixed=len(self.used) > 1, kv_cache=self.kv_cache is not None
        )

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
        """A calibration runs in torch."""
        return ("torch",) if self._calibrated else ()

    def leaving(self, modules: Sequence[str], architecture: Architecture) -> Mapping[str, Any]:
        """See `Format.leaving`."""
        return {"keep+": weights_of(modules)}

    def prepare(self, view: View, context: PlanContext) -> View:
        """In the type that the library loads the model in."""
        return in_stated_dtype(view, context)

    def convert(self, view: View, context: PlanContext) -> Conversion:
        """Every tensor of the view under its own name, the linears quantized."""
        facts = [fact for name, fact in context.architecture.tensors.items() if name in view]
        algorithms = self._algorithms({fact.module: fact for fact in self._open(facts)}, context)
        chosen = {fact.module: fact for fact in self._open(facts) if fact.module in algorithms}
        check_fusions(chosen, view, context.architecture)
        check_algorithms(algorithms, context.architecture)
        found = {module: _unfit(fact, algorithms[module], view) for module, fact in chosen.items()}
        refuse_unfit(found, "it among `keep`")
        key = None if any(item.calibrated for item in self.used) else "kv_cache"
        activations = cache(lambda: Activations(Calibration(view, context.calibrated(key))))
        made = Linears(chosen, algorithms, activations, view, context).made()
        biases = turned_biases(facts, chosen, view, context)
        cached = self._cache_scales(view, activations, context)
        tensors: list[OutputTensor] = []
        for fact in facts:
            if chosen.get(fact.module) is fact:
                tensors += made[fact.module]
            elif fact.name in biases:
                tensors += biases[fact.name]
            else:
                tensors.append(OutputTensor(fact.name, view[fact.name], fact))
            tensors += cached.get(fact.name, ())
        figures = {
            f"tokens sent to each expert of layer {layer}": counts
            for layer, counts in (activations().experts if self._calibrated else {}).items()
        }
        return Conversion(
            tensors=tensors,
            parameters=sum(view[fact.name].spec.size for fact in facts),
            quantized={module: ALGORITHMS[algorithms[module]].scheme for module in chosen},
            ignored=unquantized_modules(context.architecture, chosen, _PLAIN_ROLES),
            figures=figures,
            stated={
                DEFAULT: self.quant_algo,
                LAYERS: {_stated(module): algorithms[module] for module in chosen},
            },
            kv_cache=self.kv_cache.dtype if self.kv_cache else None,
        )

    def _cache_scales(
        self, view: View, activations: Callable[[], Activations], context: PlanContext
    ) -> dict[str, list[OutputTensor]]:
        """The scales of caches, by the names of the facts that they come after."""
        if self.kv_cache is None:
            return {}
        check_caches(context.architecture)
        return cache_scales(context, view, activations(), SCALES, dtype="F32", borrowed=True)

    @property
    def used(self) -> tuple[Algorithm, ...]:
        """The algorithms that the recipe names, that of most modules first."""
        names = {self.quant_algo: None}
        names |= {rule.quant_algo: None for rule in self.rules if rule.quant_algo}
        return tuple(ALGORITHMS[name] for name in names)

    @property
    def _calibrated(self) -> bool:
        """Whether modules may need the largest of their inputs, or caches those of theirs."""
        return self.kv_cache is not None or any(item.calibrated for item in self.used)

    def _algorithms(
        self, facts: Mapping[str, TensorFact], context: PlanContext
    ) -> dict[str, QuantAlgo]:
        """The algorithm of each module that no rule skips."""
        layers = {module: fact.layer for module, fact in facts.items()}
        chosen: dict[str, list[tuple[int, ModelOptRule]]] = {module: [] for module in facts}
        for index, rule in enumerate(self.rules):
            try:
                found = fitted(rule, layers, [], context)
            except PlanError as error:
                raise error.revised(at=("rules", index)) from None
            for module in found:
                chosen[module].append((index, rule))
        settings = {
            module: choose({"quant_algo": self.quant_algo}, rules)
            for module, rules in chosen.items()
        }
        return {module: item.values["quant_algo"] for module, item in settings.items() if item}

    def _open(self, facts: Sequence[TensorFact]) -> Iterator[TensorFact]:
        """The linears that neither the library nor `keep` leaves alone."""
        names, patterns = [fact.name for fact in facts], KEEP_LISTS[self.defaults]
        left = set(Patterns(list(patterns)).select(names)) | kept(self.keep, names)
        if MTP_HEADS in patterns:
            # Their names differ from family to family.
            left |= {fact.name for fact in facts if fact.part is Part.MTP}
        for fact in facts:
            if fact.role is Role.LINEAR and fact.name not in left:
                yield fact


def check_algorithms(algorithms: Mapping[str, str], architecture: Architecture) -> None:
    """Raise PlanError where rules part what an engine, or the library's export, takes together."""
    groups = [
        (fusion.parts, f"serving engines fuse them to {fusion.module}")
        for fusion in architecture.fusions
    ]
    for layer in range(architecture.num_layers):
        inputs = architecture.shared_inputs(layer)
        groups += [
            (tuple(group), "modelopt scales linears of one input together") for group in inputs
        ]
        experts = tuple(module for group in inputs for module in group if STACK in module)
        groups.append((experts, "engines run a layer's experts as one"))
    for parts, why in groups:
        found = {algorithms[module] for module in parts if module in algorithms}
        if len(found) > 1:
            raise PlanError(
                f"{', '.join(parts)} are given {' and '.join(sorted(found))}",
                expected=f"one algorithm, because {why}",
                at=("rules",),
            )


def _unfit(fact: TensorFact, algorithm: str, view: View) -> str:
    """Why a linear cannot be quantized so, nothing where it can."""
    if turned(fact) and ALGORITHMS[algorithm].scheme.bits == _EIGHT:
        return f"experts that are one tensor with columns for rows are not quantized to {algorithm}"
    return ALGORITHMS[algorithm].unfit(view[fact.name].spec.shape[-1])


def _stated(module: str) -> str:
    """What configs call a module: the experts of a layer are one in the library."""
    return module.partition(f".{STACK}")[0]
