"""Format `compressed-tensors`: asymmetric INT4 in groups, as llm-compressor writes it.

Weights are rounded to nearest, as they are or after AWQ has smoothed them.  Where nothing is
smoothed norms stay as they are, as `model_free_ptq` leaves them; `oneshot` rounds their gains.
The section speaks llm-compressor's language, so that its recipe can be read off it and is written
beside the weights.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from carnice_build.calibration.plan import Calibration
from carnice_build.errors import PlanError
from carnice_build.formats.base import (
    Conversion,
    Format,
    OutputTensor,
    check_fusions,
    in_stated_dtype,
)
from carnice_build.formats.blame import about_module, refuse_unfit, uneven
from carnice_build.formats.card import Card, own_template
from carnice_build.formats.compressed_config import ignored_modules
from carnice_build.formats.compressed_tensors.awq import Scales, search
from carnice_build.formats.compressed_tensors.files import compressed_files
from carnice_build.formats.compressed_tensors.ops import (
    SUFFIXES,
    GroupQuantize,
    SmoothNorm,
    SmoothWeight,
)
from carnice_build.formats.scheme import Scheme
from carnice_build.formats.variant import Variant
from carnice_build.graph import ArrayOp, Stacked, TensorRef, View
from carnice_build.models.base import Architecture, Part, Role, TensorFact
from carnice_build.recipe.patterns import Patterns, expression
from carnice_build.recipe.schema import AnyPatterns, Strict
from carnice_build.serving.profile import Serving, ServingProfiles
from carnice_build.steps.base import PlanContext

if TYPE_CHECKING:
    from carnice_build.formats.compressed_tensors.checks import CompressedChecks, CompressedReader

_WEIGHTS = ("config_groups", "group_0", "weights")


class Weights(Strict):
    """How the integers of a weight are chosen, in the words of compressed-tensors."""

    num_bits: Literal[4] = Field(4, description="Bits per weight.")
    type: Literal["int"] = Field("int", description="Integers.")
    symmetric: Literal[False] = Field(False, description="Each group has a zero point.")
    strategy: Literal["group"] = Field("group", description="A scale for each group of inputs.")
    group_size: Literal[32, 64, 128] = Field(128, description="Weights that share a scale.")
    dynamic: Literal[False] = Field(False, description="Scales are stored.")
    observer: Literal["mse", "memoryless_minmax"] = Field(
        "mse",
        description="The range of a group: where the error is least, or from the smallest to the "
        "largest weight.",
    )


class ConfigGroup(Strict):
    """Modules that share a scheme."""

    targets: list[Literal["Linear"]] = Field(description="Classes of modules.")
    weights: Weights = Field(description="The scheme of their weights.")


class ConfigGroups(Strict):
    """The one group of modules."""

    group_0: ConfigGroup = Field(description="What is quantized.")


class AwqSpec(Strict):
    """How AWQ searches; names and defaults are the library's, but for `norms`."""

    n_grid: int = Field(20, ge=4, description="Ratios that the search tries.")
    duo_scaling: bool | Literal["both"] = Field(
        True, description="Use the weights' magnitudes beside those of activations."
    )
    norms: Literal["library", "exact"] = Field(
        "library",
        description="Hold gains 1 + w in the model's type, as llm-compressor does, which alters "
        "norms that nothing smoothed; or in float32, which leaves those alone.",
    )


class CompressedFormat(Format):
    """W4A16 in the format pack-quantized."""

    format: Literal["compressed-tensors"]
    algorithm: Literal["awq", "nearest"] = Field(
        "awq",
        description="What happens before the rounding to nearest: AWQ's smoothing, for which the "
        "recipe needs a calibration, or nothing.",
    )
    targets: list[Literal["Linear"]] = Field(description="Classes of modules that are quantized.")
    config_groups: ConfigGroups = Field(description="Groups of modules and their schemes.")
    ignore: AnyPatterns = Field(description="Modules that stay as they are.")
    awq: AwqSpec | None = Field(None, description="For algorithm `awq`.")

    retired: ClassVar[Mapping[str, str]] = {
        "n_grid": "`awq: {n_grid: ...}`",
        "duo_scaling": "`awq: {duo_scaling: ...}`",
        "norms": "`awq: {norms: ...}`",
        "mappings": "nothing in its place: the model's family says what is smoothed",
        "sequential_targets": "nothing in its place: decoder layers are calibrated one at a time",
        "moe_calibrate_all_experts": "nothing in its place: every expert reads every token",
    }

    @model_validator(mode="after")
    def _fits(self) -> CompressedFormat:
        if self.algorithm != "awq" and self.awq is not None:
            raise ValueError(f"algorithm {self.algorithm} has no use for `awq`")
        return self

    @property
    def smoothing(self) -> AwqSpec | None:
        """How AWQ searches, with the defaults where the recipe says nothing; None without AWQ."""
        if self.algorithm != "awq":
            return None
        return self.awq or AwqSpec.model_validate({})

    @property
    def weights(self) -> Weights:
        """The scheme of all weights."""
        return self.config_groups.group_0.weights

    def files(self, variant: Variant) -> Mapping[str, bytes]:
        """As llm-compressor saves them."""
        return compressed_files(self, variant)

    def takes_untabled(self, model_type: str) -> bool:
        """See `Format.takes_untabled`."""
        return self.smoothing is None

    def card(self) -> Card:
        """See `Format.card`."""
        algorithm = ("awq",) if self.smoothing else ()
        tags = ("compressed-tensors", *algorithm, "w4a16", "int4", "vllm")
        # transformers leaves the zero points of experts aside, and then cannot do without them.
        return Card(own_template(__package__), "transformers", tags, with_experts="vllm")

    def checks(self) -> CompressedChecks:
        """See `Format.checks`."""
        from carnice_build.formats.compressed_tensors.checks import CompressedChecks

        return CompressedChecks(self.weights.observer, self.weights.group_size)

    @classmethod
    def reader(cls) -> type[CompressedReader]:
        """See `Format.reader`."""
        from carnice_build.formats.compressed_tensors.checks import CompressedReader

        return CompressedReader

    def extras(self) -> tuple[str, ...]:
        """The search is llm-compressor's."""
        return ("llmcompressor",) if self.smoothing else ()

    def leaving(self, modules: Sequence[str], architecture: Architecture) -> Mapping[str, Any]:
        """Expressions under `ignore`, as llm-compressor reads them."""
        return {"ignore+": [expression(glob) for glob in modules]}

    @classmethod
    def serving(cls) -> Serving:
        """As vLLM's `--quantization` has it."""
        return Serving("compressed-tensors", ServingProfiles(__package__))

    def prepare(self, view: View, context: PlanContext) -> View:
        """In the type that the library loads the model in."""
        return in_stated_dtype(view, context)

    def convert(self, view: View, context: PlanContext) -> Conversion:
        """Every tensor of the view, smoothed by AWQ's scales if any, and the linears quantized."""
        architecture = context.architecture
        facts = [fact for name, fact in architecture.tensors.items() if name in view]
        chosen = {fact.module: fact for fact in self._quantized(facts)}
        try:
            check_fusions(chosen, view, architecture)
        except PlanError as error:
            raise error.revised(at=("ignore",)) from None
        columns = {module: view[fact.name].spec.shape[-1] for module, fact in chosen.items()}
        refuse_unfit(
            {module: uneven(count, self.weights.group_size) for module, count in columns.items()},
            "a pattern for it under `ignore`",
            (*_WEIGHTS, "group_size"),
        )
        published = _Published(self, chosen, self._scales(chosen, view, context), context)
        tensors = [item for fact in facts for item in published.of(fact, view[fact.name])]
        return Conversion(
            tensors=tensors,
            parameters=sum(view[fact.name].spec.size for fact in facts),
            quantized=dict.fromkeys(chosen, Scheme(4, self.weights.group_size)),
            causes=self._causes(facts, chosen),
            ignored=ignored_modules(architecture, chosen),
        )

    def _causes(
        self, facts: Sequence[TensorFact], chosen: Mapping[str, TensorFact]
    ) -> dict[str, Mapping[str, tuple[str, ...]]]:
        found: dict[str, Mapping[str, tuple[str, ...]]] = {}
        for fact in facts:
            if chosen.get(fact.module) is fact:
                weights = {name: (*_WEIGHTS, name) for name in ("observer", "group_size")}
                found[f"{fact.module}.{SUFFIXES[0]}"] = weights
            elif fact.role is Role.NORM and self.smoothing:
                found[fact.name] = {"exact": ("awq", "norms")}
        return found

    def _quantized(self, facts: Sequence[TensorFact]) -> Iterator[TensorFact]:
        patterns = Patterns(self.ignore)
        for fact in facts:
            if fact.role is Role.LINEAR and not patterns.matches(fact.module):
                if fact.part not in (Part.LAYERS, Part.BODY):
                    raise PlanError(
                        f"{fact.module} would be quantized, and is in no decoder layer",
                        expected="a pattern for it under `ignore`",
                        at=("ignore",),
                    )
                yield fact

    def _scales(self, quantized: Container[str], view: View, context: PlanContext) -> Scales:
        """What AWQ finds; nothing without it."""
        if self.smoothing is None:
            return Scales()
        scheme = {"num_bits": 4, "group_size": self.weights.group_size, "symmetric": False}
        settings = {"scheme": scheme, **self.smoothing.model_dump()}
        calibration = Calibration(view, context.calibrated(), "longest")
        return search(calibration, context.architecture, quantized, settings)


class _Published:
    """What is published of each tensor of a model."""

    def __init__(
        self,
        knobs: CompressedFormat,
        quantized: Mapping[str, TensorFact],
        scales: Scales,
        context: PlanContext,
    ) -> None:
        self._knobs = knobs
        self._quantized = quantized
        self._scales = scales
        self._graph = context.graph
        self._architecture = context.architecture

    def of(self, fact: TensorFact, ref: TensorRef) -> list[OutputTensor]:
        """What is published of a source tensor."""
        module = fact.module
        # A bias is part of what the module gives out, and has nothing to do with what it reads.
        columns = self._scales.columns.get(module) if fact.name == f"{module}.weight" else None
        rows = self._scales.rows.get(module)
        if fact.role is Role.NORM and self._architecture.offset_norm(fact.name):
            return [OutputTensor(fact.name, self._norm(fact, ref, rows), fact)]
        vectors = [scales for scales in (columns, rows) if scales is not None]
        used = {"columns": columns is not None, "rows": rows is not None}
        if self._quantized.get(module) is fact:
            return self._packed(fact, ref, vectors, used)
        if vectors and fact.name.endswith((".weight", ".bias")):
            (ref,) = self._graph.add(_of_each(SmoothWeight(), fact, vectors), used, ref, *vectors)
        return [OutputTensor(fact.name, ref, fact)]

    def _norm(self, fact: TensorFact, ref: TensorRef, scales: TensorRef | None) -> TensorRef:
        smoothing = self._knobs.smoothing
        if smoothing is None or fact.part is Part.MTP:
            return ref
        exact = smoothing.norms == "exact"
        if exact and scales is None:
            return ref
        vectors = () if scales is None else (scales,)
        (norm,) = self._graph.add(SmoothNorm(), {"exact": exact}, ref, *vectors)
        return norm

    def _packed(
        self,
        fact: TensorFact,
        ref: TensorRef,
        vectors: Sequence[TensorRef],
        used: Mapping[str, Any],
    ) -> list[OutputTensor]:
        weights = self._knobs.weights
        params = {**used, "observer": weights.observer, "group_size": weights.group_size}
        with about_module(fact.module, _WEIGHTS):
            op = _of_each(GroupQuantize(), fact, vectors)
            made = self._graph.add(op, params, ref, *vectors)
        return [
            OutputTensor(f"{fact.module}.{suffix}", output, fact)
            for suffix, output in zip(SUFFIXES, made, strict=True)
        ]


def _of_each(op: ArrayOp, fact: TensorFact, scales: Sequence[TensorRef]) -> ArrayOp:
    """`op` on a tensor and its scales; on each expert of a stack, who may share some."""
    if not fact.stacked:
        return op
    return Stacked(op, [number for number, ref in enumerate(scales, 1) if len(ref.spec.shape) < 2])
