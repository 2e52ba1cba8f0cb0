"""Format `mlx`: quantization in groups, and the names, norms and types of mlx-lm or mlx-vlm.

What their `convert` does to a checkpoint, written as actions: what a `trace` says of each tensor
becomes nothing (another name or shape, or a stack), a small op (a cast, a norm + 1) or a program
of mlx's primitives; then what they quantize is quantized.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from carnice_build.checkpoint.assets import Reads
from carnice_build.errors import PlanError
from carnice_build.formats.base import Companion, Conversion, Format
from carnice_build.formats.blame import refuse_unfit, uneven
from carnice_build.formats.card import Card, own_template
from carnice_build.formats.mlx.conversion import knows, mlx_trace
from carnice_build.formats.mlx.files import mlx_files
from carnice_build.formats.mlx.kept import METHOD, kept_trace
from carnice_build.formats.mlx.made import Made
from carnice_build.formats.mlx.modes import (
    AFFINE,
    Bits,
    GroupSize,
    Mode,
    ModeRule,
    chosen,
    defaults,
    fitting,
    scheme_of,
)
from carnice_build.formats.mlx.names import drafter_table
from carnice_build.formats.mlx.target import Target
from carnice_build.formats.mlx.trace import Trace, Traced
from carnice_build.formats.rules import Settings, fitted
from carnice_build.formats.scheme import Scheme
from carnice_build.formats.variant import Variant
from carnice_build.graph import View
from carnice_build.models.base import Architecture, Part, TensorFact
from carnice_build.steps.base import PlanContext

if TYPE_CHECKING:
    from carnice_build.formats.mlx.checks import MlxChecks, MlxReader


class MlxRule(ModeRule):
    """Mode, bits and group size of the modules that the rule is about."""

    about = ("paths",)

    paths: Literal["source", "mlx"] = Field(
        "source",
        description="Which paths `match` is about: those of the source, or those that the library "
        "gives its modules, by which its own mixed recipes choose.",
    )


class MlxFormat(Format):
    """MLX quantization, as `mlx_lm.convert` or `mlx_vlm.convert` does it."""

    format: Literal["mlx"]
    target: Literal["mlx-lm", "mlx-vlm"] = Field(
        "mlx-lm",
        description="The library that the folder is for: mlx-lm, which runs the text model alone, "
        "or mlx-vlm, for which the vision tower is kept, and the MTP head becomes a drafter in a "
        "folder of its own, `VARIANT-mtp`.",
    )
    mode: Mode = Field(
        "affine",
        description="How weights are stored where no rule says otherwise: integers with a scale "
        "and a bias for each group, or floats with a scale, E2M1 (`mxfp4`, `nvfp4`) or E4M3 "
        "(`mxfp8`).",
    )
    bits: Bits | None = Field(
        None,
        validate_default=True,
        description="Bits per weight where no rule says otherwise; must be said for mode `affine`, "
        "and follows from the others.",
    )
    group_size: GroupSize | None = Field(
        None,
        validate_default=True,
        description="Weights that share a scale; 64 unless another mode than `affine` has its own: "
        "32 in `mxfp4` and `mxfp8`, 16 in `nvfp4`.",
    )
    rules: list[MlxRule] = Field(
        default_factory=list, description="Exceptions; the last rule that fits a module wins."
    )
    mtp: Literal["plain"] | Bits | None = Field(
        None,
        description="Bits per weight of the drafter, or `plain` for the MTP head as it is; the "
        "bits that config.json states for the whole model if nothing is said, and `plain` where "
        "they are of another mode than `affine`, the only one of drafters.",
    )
    config_bits: Bits | None = Field(
        None,
        description="The bits that config.json states for the whole model; `bits` if none. "
        "mlx-lm states 4 for its mixed recipes, whose every module is listed by name.",
    )
    backend: Literal["fused", "mlx"] = Field(
        "fused", description="The kernel: ours, or mlx itself in a worker process (slower)."
    )
    nonfinite: Literal["refuse", "zero"] = Field(
        "refuse", description="NaN and infinity in a weight stop the build, or count as 0."
    )

    @field_validator("bits", "group_size", "config_bits")
    @classmethod
    def _fits(cls, value: int | None, info: ValidationInfo) -> int | None:
        """What the mode has, where nothing is said."""
        mode = info.data.get("mode")
        fitting(value, info)
        if value is not None or mode is None or info.field_name == "config_bits":
            return value
        if (mode, info.field_name) == (AFFINE, "bits"):
            raise PydanticCustomError("missing", "must be said for mode affine")
        return defaults(mode)[str(info.field_name)]

    def takes_untabled(self, model_type: str) -> bool:
        """See `Format.takes_untabled`."""
        return knows(model_type, self.library)

    def engine_reads(self) -> Collection[Reads]:
        """A tokenizer, and a processor where there may be a tower: mlx-lm has none."""
        if self.library is Target.MLX_LM:
            return (Reads.TOKENIZER,)
        return (Reads.TOKENIZER, Reads.PROCESSOR)

    @property
    def library(self) -> Target:
        """The library that the folder is for."""
        return Target(self.target)

    def metadata(self) -> Mapping[str, str]:
        """As MLX marks its files."""
        return {"format": "mlx"}

    def files(self, variant: Variant) -> Mapping[str, bytes]:
        """As the library writes and loads them."""
        return mlx_files(self.library, variant)

    def companions(self, view: View, context: PlanContext) -> Sequence[Companion]:
        """The MTP head as a drafter, in folders for mlx-vlm."""
        from carnice_build.formats.mlx.drafter import MlxDrafter

        if self.library is Target.MLX_LM:
            why_not = "mlx-lm has no use for an MTP head: that takes `target: mlx-vlm`"
        elif drafter_table(context.architecture) is None:
            why_not = f"mlx-vlm makes no drafter of a model of {context.architecture.name}"
        elif not any(context.architecture.tensors[name].part is Part.MTP for name in view):
            why_not = "there is no MTP head"
        else:
            plain = self.mtp == "plain" or (self.mtp is None and self.mode != AFFINE)
            bits = self.whole.bits if self.mtp in (None, "plain") else self.mtp
            group = self.group_size if self.mode == AFFINE else None
            knobs = self.model_dump() | {
                "mode": AFFINE,
                "bits": bits,
                "group_size": group,
                "rules": [],
                "config_bits": None,
            }
            drafter = MlxDrafter(**knobs, plain=plain)
            return (Companion("-mtp", drafter.about, drafter),)
        if self.mtp is not None:
            raise PlanError(why_not, at=("mtp",))
        return ()

    def leaves_out(self) -> Mapping[Part, str]:
        """Of a model, mlx-lm takes the text."""
        if self.library is not Target.MLX_LM:
            return {}
        return {
            Part.TOWER: "mlx-lm runs the text model alone",
            Part.MTP: "mlx-lm leaves the MTP head out",
        }

    def leaving(self, modules: Sequence[str], architecture: Architecture) -> Mapping[str, Any]:
        """A rule, after which mlx-lm's own words for these modules do not count."""
        return {"rules+": [{"match": list(modules), "skip": True}]}

    def card(self) -> Card:
        """See `Format.card`."""
        return Card(own_template(__package__), "mlx", ("mlx",))

    def checks(self) -> MlxChecks:
        """See `Format.checks`."""
        from carnice_build.formats.mlx.checks import MlxChecks, MlxVlmChecks

        kind = MlxChecks if self.library is Target.MLX_LM else MlxVlmChecks
        return kind(zero=self.nonfinite == "zero")

    @classmethod
    def reader(cls) -> type[MlxReader]:
        """See `Format.reader`."""
        from carnice_build.formats.mlx.checks import MlxReader

        return MlxReader

    def extras(self) -> tuple[str, ...]:
        """mlx is needed only when it is the backend."""
        return ("mlx",) if self.backend == "mlx" else ()

    @classmethod
    def keeps(cls, method: str) -> bool:
        """MXFP4, as mlx-lm does."""
        return method == METHOD

    def convert(self, view: View, context: PlanContext) -> Conversion:
        """Every tensor that the library keeps, under its MLX name."""
        if context.codes and self.library is not Target.MLX_LM:
            raise PlanError(
                f"{self.library} is not asked about what is quantized already",
                expected="a step `- decode: {}`",
                at=("target",),
            )
        trace = kept_trace(view, context) if context.codes else self.trace(view, context)
        facts = context.architecture.tensors
        order = {name: index for index, name in enumerate(facts)}
        items = sorted(trace.tensors, key=lambda item: order[item.sources[0].name])
        weights = {
            item.name: facts[item.sources[0].name] for item in items if item.module in trace.modules
        }
        rules = self._rules_by_weight(weights, trace, context)
        made = Made(self, trace, view, context)
        settings_of = {
            item.name: self._settings(made.own(item), rules[item.name])
            for item in items
            if item.name in weights and weights[item.name].name not in context.codes
        }
        self._check_fit(items, settings_of, weights)
        for item in items:
            fact = facts[item.sources[0].name]
            if fact.name in context.codes:
                made.add_codes(item, fact, context.codes[fact.name])
                continue
            settings = settings_of.get(item.name)
            if settings is None:
                made.add_plain(item, fact)
            else:
                made.add_quantized(item, fact, settings)
        towers = any(fact.part is Part.TOWER for fact in made.facts)
        return made.conversion(towers=towers, drafter=bool(self.companions(view, context)))

    def _rules_by_weight(
        self, weights: Mapping[str, TensorFact], trace: Trace, context: PlanContext
    ) -> dict[str, list[tuple[int, MlxRule]]]:
        """For each weight, by its MLX name, the rules that fit it, and their numbers, in order."""
        own = {name: fact.module for name, fact in weights.items()}
        mlx = {name: name.removesuffix(".weight") for name in weights}
        # A rule for a head is no mistake when the head is tied: there is nothing left to choose.
        tied = [name.rpartition(".")[0] for name in context.architecture.ties]
        chosen: dict[str, list[tuple[int, MlxRule]]] = {name: [] for name in weights}
        for index, rule in enumerate(self.rules):
            paths, others = (own, tied) if rule.paths == "source" else (mlx, [*trace.quantized])
            layers = {paths[name]: fact.layer for name, fact in weights.items()}
            try:
                found = fitted(rule, layers, others, context)
            except PlanError as error:
                raise error.revised(at=("rules", index)) from None
            for name in weights:
                if paths[name] in found:
                    chosen[name].append((index, rule))
        return chosen

    def _check_fit(
        self,
        items: Sequence[Traced],
        settings_of: Mapping[str, Settings | None],
        weights: Mapping[str, TensorFact],
    ) -> None:
        unfit: dict[str, str] = {}
        for item in items:
            if settings := settings_of.get(item.name):
                why = uneven(item.spec.shape[-1], settings.values["group_size"])
                module = weights[item.name].module
                unfit[module] = unfit.get(module) or why
        refuse_unfit(unfit, "a rule under `rules` that skips it")

    def trace(self, view: View, context: PlanContext) -> Trace:
        """What becomes of the view."""
        return mlx_trace(view, context, self.library)

    def _settings(
        self, own: Mapping[str, Any], rules: Sequence[tuple[int, MlxRule]]
    ) -> Settings | None:
        """Those of the recipe's rules, else of the model's `own` code, else of the recipe."""
        return chosen(self.settings, own, rules)

    @property
    def settings(self) -> Mapping[str, Any]:
        """Mode, group size and bits where nobody says otherwise."""
        return {"mode": self.mode, "group_size": self.group_size, "bits": self.bits}

    @property
    def whole(self) -> Scheme:
        """What config.json states for the whole model."""
        return scheme_of({**self.settings, "bits": self.config_bits or self.bits})
