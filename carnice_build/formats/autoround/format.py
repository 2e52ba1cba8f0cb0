"""Format `autoround`: symmetric INT4 in groups, as auto-round packs it for GPTQ kernels.

Three ways to the codes: `nearest` rounds each weight by itself, `tune` learns the rounding over
a calibration, and `merge` takes over what was learned for the base that the model was fine-tuned
from.  What is published looks the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from carnice_build.calibration.plan import Calibration
from carnice_build.checkpoint.checkpoint import Checkpoint, source_view
from carnice_build.checkpoint.model_dtype import stated_dtype
from carnice_build.dtypes import FLOAT_NAMES, TensorSpec
from carnice_build.errors import PlanError, nearest
from carnice_build.formats.autoround.files import autoround_files
from carnice_build.formats.autoround.ops import SUFFIXES, Merge, Nearest, packed_specs, unfit
from carnice_build.formats.autoround.tune import Tuning
from carnice_build.formats.base import Conversion, Format, OutputTensor, cast, check_fusions
from carnice_build.formats.blame import about_module, refuse_unfit
from carnice_build.formats.card import Card, own_template
from carnice_build.formats.exclusions import unquantized_modules
from carnice_build.formats.keep import kept, weights_of
from carnice_build.formats.scheme import Scheme
from carnice_build.formats.variant import Variant
from carnice_build.graph import TensorRef, View
from carnice_build.models.base import LINEARS, Architecture, Part, Role, TensorFact
from carnice_build.recipe.patterns import Patterns
from carnice_build.recipe.schema import (
    AnyPatterns,
    CalibrationSpec,
    Expectation,
    PatternList,
    Strict,
)
from carnice_build.serving.profile import Serving, ServingProfiles
from carnice_build.steps.base import PlanContext, require_match

if TYPE_CHECKING:
    from carnice_build.formats.autoround.checks import AutoRoundChecks, AutoRoundReader

GroupSize = Literal[32, 64, 128]

_CAUSES = {"group_size": ("group_size",), "rounding": ("grid", "rounding")}
"""Which knobs the parameters of a module's action are."""

_PLAIN = ("BF16", "F16")
"""What is not quantized may be of these types."""


class TuneSpec(Strict):
    """How auto-round learns; names and defaults are the library's."""

    iters: int = Field(200, ge=1, description="Steps of each decoder layer.")
    lr: float | None = Field(None, gt=0, description="Learning rate; 1 / iters if none.")
    minmax_lr: float | None = Field(None, gt=0, description="Learning rate of ranges; lr if none.")
    enable_minmax_tuning: bool = Field(True, description="Learn the ranges of groups, too.")
    batch_size: int = Field(8, ge=1, description="Samples a step; more than 1 need one length.")
    gradient_accumulate_steps: int = Field(1, ge=1, description="Batches a step.")
    not_use_best_mse: bool = Field(False, description="Keep the last step, not the best.")
    seed: int = Field(42, description="Decides the batches of each layer.")


class LeftOut(Strict):
    """Tensors of the grid that have no place in the variant."""

    match: PatternList = Field(description="Names of tensors of the grid's source.")
    expect: Expectation = Field(None, description="How many there must be.")


class GridSpec(Strict):
    """A quantized base whose grid a fine-tune is put on."""

    source: str = Field(description="Name of the source that is quantized in this format.")
    base: str = Field(description="Name of the source that it was quantized from.")
    rounding: Literal["nearest", "delta"] = Field(
        "nearest",
        description="Round each weight that the fine-tune changed to the nearest code, or move the "
        "base's codes by the whole steps of the change.",
    )
    leave: LeftOut | None = Field(None, description="What is not taken of the grid.")


class AutoRoundFormat(Format):
    """INT4 in auto-round's `auto_round:auto_gptq` packing."""

    format: Literal["autoround"]
    method: Literal["nearest", "tune", "merge"] = Field(description="Where the codes come from.")
    group_size: GroupSize = Field(128, description="Weights that share a scale.")
    keep: AnyPatterns | None = Field(
        None,
        description="Weights of decoder layers that stay as they are, by name; if none are given, "
        "those that the model's family holds to be too narrow.",
    )
    plain: Literal["bfloat16", "float16"] | None = Field(
        None,
        description="Type of everything that is not quantized, which config.json then states; what "
        "the source's states if none, or bfloat16 where that is neither.  States that engines hold "
        "in float32 stay so.",
    )
    tune: TuneSpec | None = Field(None, description="For method `tune`.")
    grid: GridSpec | None = Field(None, description="For method `merge`.")

    @model_validator(mode="after")
    def _fits(self) -> AutoRoundFormat:
        if self.method == "merge" and self.grid is None:
            raise ValueError("method merge needs a section `grid`")
        sections = {"tune": ("tune", self.tune), "merge": ("grid", self.grid)}
        for method, (name, given) in sections.items():
            if method != self.method and given is not None:
                raise ValueError(f"method {self.method} has no use for `{name}`")
        return self

    @property
    def tuning(self) -> TuneSpec:
        """How auto-round learns, with the defaults where the recipe says nothing."""
        return self.tune or TuneSpec.model_validate({})

    def files(self, variant: Variant) -> Mapping[str, bytes]:
        """As auto-round writes them and vLLM loads them."""
        return autoround_files(self, variant)

    def takes_untabled(self, model_type: str) -> bool:
        """See `Format.takes_untabled`."""
        return self.method == "nearest"

    def takes(self) -> Mapping[str, str]:
        """See `Format.takes`."""
        if self.grid is None:
            return {}
        return {
            self.grid.source: "the INT4 grid that the weights are put on",
            self.grid.base: "the weights that the grid was made for",
        }

    def card(self) -> Card:
        """See `Format.card`."""
        tags = ("autoround", "int4", "w4a16", "vllm")
        return Card(own_template(__package__), "transformers", tags)

    def checks(self) -> AutoRoundChecks:
        """See `Format.checks`."""
        from carnice_build.formats.autoround.checks import AutoRoundChecks

        return AutoRoundChecks(self.method, self.group_size)

    @classmethod
    def reader(cls) -> type[AutoRoundReader]:
        """See `Format.reader`."""
        from carnice_build.formats.autoround.checks import AutoRoundReader

        return AutoRoundReader

    def extras(self) -> tuple[str, ...]:
        """Only tuning needs the library."""
        return ("autoround",) if self.method == "tune" else ()

    def leaving(self, modules: Sequence[str], architecture: Architecture) -> Mapping[str, Any]:
        """All of `keep`, for one that says something takes the place of the family's list."""
        if self.keep is not None:
            return {"keep+": weights_of(modules)}
        names = [fact.name for fact in architecture.tensors.values() if fact.role is Role.LINEAR]
        narrow = [glob for glob in architecture.narrow_linears if Patterns(glob).select(names)]
        return {"keep": [*narrow, *weights_of(modules)]}

    @classmethod
    def serving(cls) -> Serving:
        """As vLLM's `--quantization` has it."""
        return Serving("inc", ServingProfiles(__package__))

    def convert(self, view: View, context: PlanContext) -> Conversion:
        """Every tensor of the view, the linears of decoder layers quantized."""
        facts = [fact for name, fact in context.architecture.tensors.items() if name in view]
        chosen = {fact.module: fact for fact in self._quantized(facts, context.architecture)}
        check_fusions(chosen, view, context.architecture)
        specs = {module: _of_one(view[fact.name].spec) for module, fact in chosen.items()}
        found = {module: unfit(spec, self.group_size) for module, spec in specs.items()}
        refuse_unfit(found, "it among `keep`")
        for module, spec in specs.items():
            with about_module(module):
                packed_specs(spec, self.group_size)
        parts, figures = self._parts(chosen, view, context)
        plain = self._plain_dtype(context)
        tensors: list[OutputTensor] = []
        for fact in facts:
            if chosen.get(fact.module) is fact:
                made = zip(SUFFIXES, parts[fact.module], strict=True)
                tensors += [
                    OutputTensor(f"{fact.module}.{suffix}", ref, fact) for suffix, ref in made
                ]
            else:
                ref = _plain(view[fact.name], fact, plain, context)
                tensors.append(OutputTensor(fact.name, ref, fact))
        return Conversion(
            tensors=tensors,
            parameters=sum(view[fact.name].spec.size for fact in facts),
            quantized=dict.fromkeys(chosen, Scheme(4, self.group_size)),
            causes={f"{module}.{SUFFIXES[0]}": _CAUSES for module in chosen},
            ignored=unquantized_modules(context.architecture, chosen, LINEARS),
            dtype=plain,
            figures=figures,
        )

    def _quantized(
        self, facts: Sequence[TensorFact], architecture: Architecture
    ) -> Iterator[TensorFact]:
        linears = [fact for fact in facts if fact.part is Part.LAYERS and fact.role is Role.LINEAR]
        names = [fact.name for fact in linears]
        if self.keep is None:
            left = set(Patterns(list(architecture.narrow_linears)).select(names))
        else:
            left = kept(self.keep, names)
        return (fact for fact in linears if fact.name not in left)

    def _parts(
        self, chosen: Mapping[str, TensorFact], view: View, context: PlanContext
    ) -> tuple[dict[str, Sequence[TensorRef]], dict[str, TensorRef]]:
        """The tensors of each quantized module, and what was measured on the way."""
        if self.method == "tune":
            return self._tuned(chosen, view, context)
        if self.method == "merge":
            return self._merged(chosen, view, context)
        params = {"group_size": self.group_size}
        return {
            module: context.graph.add_each(Nearest(), params, view[fact.name])
            for module, fact in chosen.items()
        }, {}

    def _tuned(
        self, chosen: Mapping[str, TensorFact], view: View, context: PlanContext
    ) -> tuple[dict[str, Sequence[TensorRef]], dict[str, TensorRef]]:
        source = context.calibrated()
        _check_arithmetic(source.spec, context.architecture)
        calibration = Calibration(view, source)
        settings = {
            "group_size": self.group_size,
            "amp": source.spec.dtype == "bfloat16",
            **self.tuning.model_dump(),
        }
        tuning = Tuning(calibration, settings)
        parts: dict[str, Sequence[TensorRef]] = {}
        figures = {}
        for layer in range(context.architecture.num_layers):
            made, losses = tuning.layer(layer, chosen)
            parts |= made
            figures[f"loss of layer {layer}, nearest and tuned"] = losses
        return parts, figures

    def _merged(
        self, chosen: Mapping[str, TensorFact], view: View, context: PlanContext
    ) -> tuple[dict[str, Sequence[TensorRef]], dict[str, TensorRef]]:
        assert self.grid is not None
        spec = self.grid
        grid = _source(context, spec.source, "source")
        base = source_view(_source(context, spec.base, "base"))
        _check_scheme(grid, self.group_size)
        tensors = source_view(grid)
        if spec.leave is not None:
            patterns = Patterns(spec.leave.match)
            left = require_match(patterns, list(tensors), "tensor of the grid's source")
            context.check_count(spec.leave.expect, patterns, len(left), derive=False)
        params = {"group_size": self.group_size, "rounding": spec.rounding}
        parts: dict[str, Sequence[TensorRef]] = {}
        figures = {}
        for module, fact in chosen.items():
            names = [f"{module}.{suffix}" for suffix in SUFFIXES]
            weight = _tensor(base, fact.name, spec.base)
            stored = [_tensor(tensors, name, spec.source) for name in names]
            operands = (view[fact.name], weight, *stored)
            with about_module(module):
                qweight, clipped = context.graph.add(Merge(), params, *operands)
            parts[module] = (qweight, *stored[1:])
            figures[f"clipped codes of {module}"] = clipped
        return parts, figures

    def _plain_dtype(self, context: PlanContext) -> str:
        if self.plain is not None:
            return FLOAT_NAMES[self.plain]
        stated = stated_dtype(context.body.config)
        return stated if stated in _PLAIN else "BF16"


def _plain(ref: TensorRef, fact: TensorFact, dtype: str, context: PlanContext) -> TensorRef:
    """What is published of a tensor that is not quantized; engines hold some states in F32."""
    if ref.spec.dtype == "F32" and context.architecture.keeps_dtype(fact.name):
        return ref
    return cast(ref, dtype, context)


def _of_one(spec: TensorSpec) -> TensorSpec:
    """The spec of a weight; that of one expert where it is a stack's."""
    return TensorSpec(spec.dtype, spec.shape[-2:])


def _check_arithmetic(spec: CalibrationSpec, architecture: Architecture) -> None:
    """Refuse what `backends.autoround` does not offer, for it would be left out in silence."""
    if architecture.eager:
        raise PlanError(
            "method tune needs attention sdpa, which transformers does not have for "
            f"{architecture.name}",
            expected="`method: nearest`",
        )
    if spec.attention != "sdpa":
        raise PlanError(
            f"method tune cannot use calibration.attention {spec.attention}", expected="sdpa"
        )


def _tensor(tensors: View, name: str, source: str) -> TensorRef:
    if name not in tensors:
        raise PlanError(
            f"source {source!r} has no {name!r}", nearest=nearest(name, tensors), at=("grid",)
        )
    return tensors[name]


def _source(context: PlanContext, name: str, key: str) -> Checkpoint:
    if name not in context.sources:
        raise PlanError(
            f"the recipe has no source {name!r}",
            expected=" or ".join(context.sources),
            nearest=nearest(name, context.sources),
            at=("grid", key),
        )
    return context.sources[name].checkpoint


def _check_scheme(grid: Checkpoint, group_size: int) -> None:
    """Refuse a grid of another kind than ours; what it is stands in its config."""
    found = grid.config.get("quantization_config")
    if not isinstance(found, dict):
        raise PlanError("is not quantized", where=grid.where, expected="a grid by auto-round")
    packing = str(found.get("packing_format", ""))
    wanted = {"bits": 4, "group_size": group_size, "sym": True}
    for key, value in wanted.items():
        if found.get(key) != value:
            raise PlanError(
                f"the grid's {key} is {found.get(key)}", where=grid.where, expected=str(value)
            )
    if not packing.endswith("gptq"):
        raise PlanError(
            f"the grid's packing_format is {packing!r}",
            where=grid.where,
            expected="auto_round:auto_gptq",
        )
