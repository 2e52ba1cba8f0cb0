"""Format `mlx`: affine group quantization and the names, norms and types of mlx-lm.

What `mlx_lm.convert` does to a checkpoint, written as actions on single tensors: the vision
tower and the MTP head are left out, names get MLX's prefix, 1 is added to the norms that store
w for a gain of 1 + w, convolution kernels move their channel axis (which, being of size 1,
moves no byte), and every tensor is cast to the model's type but those that mlx-lm exempts.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from carnice_build.checkpoint.assets import Reads
from carnice_build.dtypes import FLOAT_NAMES, WIDE_FLOATS
from carnice_build.errors import PlanError
from carnice_build.formats.base import Conversion, Format, OutputTensor
from carnice_build.formats.blame import about_module
from carnice_build.formats.card import Card, own_template
from carnice_build.formats.elementwise import Elementwise
from carnice_build.formats.mlx.files import mlx_files
from carnice_build.formats.mlx.ops import SUFFIXES, AffineQuantize, ReferenceAffineQuantize
from carnice_build.formats.rules import Rule, Settings, choose, rules_by_module
from carnice_build.formats.scheme import Scheme
from carnice_build.formats.variant import Variant
from carnice_build.graph import Op, TensorRef, View
from carnice_build.models.base import QUANTIZABLE, Role, TensorFact
from carnice_build.steps.base import PlanContext

if TYPE_CHECKING:
    from carnice_build.formats.mlx.checks import MlxChecks, MlxReader

Bits = Literal[2, 3, 4, 5, 6, 8]
GroupSize = Literal[32, 64, 128]


class MlxRule(Rule):
    """Bits and group size of the modules that the rule is about."""

    bits: Bits | None = Field(None, description="Bits per weight.")
    group_size: GroupSize | None = Field(None, description="Weights that share a scale and a bias.")


class MlxFormat(Format):
    """MLX affine quantization, as `mlx_lm.convert` does it."""

    format: Literal["mlx"]
    bits: Bits = Field(description="Bits per weight where no rule says otherwise.")
    group_size: GroupSize = Field(64, description="Weights that share a scale and a bias.")
    rules: list[MlxRule] = Field(
        default_factory=list, description="Exceptions; the last rule that fits a module wins."
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

    def engine_reads(self) -> Collection[Reads]:
        """A tokenizer: mlx-lm runs the text model alone, and its config has no vision tower."""
        return (Reads.TOKENIZER,)

    def metadata(self) -> Mapping[str, str]:
        """As mlx-lm marks its files."""
        return {"format": "mlx"}

    def files(self, variant: Variant) -> Mapping[str, bytes]:
        """As mlx-lm writes and loads them."""
        return mlx_files(self, variant)

    def card(self) -> Card:
        """See `Format.card`."""
        return Card(own_template(__package__), "mlx", ("mlx",))

    def checks(self) -> MlxChecks:
        """See `Format.checks`."""
        from carnice_build.formats.mlx.checks import MlxChecks

        return MlxChecks(zero=self.nonfinite == "zero")

    @classmethod
    def reader(cls) -> type[MlxReader]:
        """See `Format.reader`."""
        from carnice_build.formats.mlx.checks import MlxReader

        return MlxReader

    def extras(self) -> tuple[str, ...]:
        """mlx is needed only when it is the backend."""
        return ("mlx",) if self.backend == "mlx" else ()

    def convert(self, view: View, context: PlanContext) -> Conversion:
        """Every tensor that mlx-lm keeps, under its MLX name."""
        architecture = context.architecture
        if refusal := architecture.mlx_refusal():
            raise PlanError(refusal, at=("format",))
        kept = [
            fact
            for name, fact in architecture.tensors.items()
            if name in view and architecture.mlx_name(name)
        ]
        targets = [fact for fact in kept if fact.role in QUANTIZABLE]
        rules = rules_by_module(self.rules, targets, context)
        tensors: list[OutputTensor] = []
        quantized: dict[str, Scheme] = {}
        causes: dict[str, dict[str, tuple[str | int, ...]]] = {}
        for fact in kept:
            ref = view[fact.name]
            settings = self._settings(rules[fact.module]) if fact.role in QUANTIZABLE else None
            if settings is None:
                tensors.append(self._plain(fact, ref, context))
            else:
                outputs = self._quantized(fact, ref, settings.values, context)
                tensors += outputs
                quantized[_mlx_path(fact, context)] = Scheme(**settings.values)
                causes[outputs[0].name] = settings.causes
        return Conversion(
            tensors=tensors,
            parameters=sum(view[fact.name].spec.size for fact in kept),
            quantized=quantized,
            causes=causes,
        )

    def _settings(self, rules: Sequence[tuple[int, MlxRule]]) -> Settings | None:
        return choose({"group_size": self.group_size, "bits": self.bits}, rules)

    def _quantized(
        self, fact: TensorFact, ref: TensorRef, settings: Mapping[str, Any], context: PlanContext
    ) -> list[OutputTensor]:
        params = {
            **settings,
            "dtype": _dtype(fact, ref, context),
            "nonfinite": self.nonfinite,
        }
        with about_module(fact.module):
            outputs = context.graph.add(self._op(), params, ref)
        path = _mlx_path(fact, context)
        return [
            OutputTensor(f"{path}.{suffix}", out, fact)
            for suffix, out in zip(SUFFIXES, outputs, strict=True)
        ]

    def _op(self) -> Op:
        return AffineQuantize() if self.backend == "fused" else ReferenceAffineQuantize()

    def _plain(self, fact: TensorFact, ref: TensorRef, context: PlanContext) -> OutputTensor:
        architecture = context.architecture
        if fact.role is Role.CONV:
            channels, middle, kernel = ref.spec.shape
            ref = ref.reshaped(channels, kernel, middle)
        add = 1.0 if architecture.offset_norm(fact.name) else None
        dtype = _dtype(fact, ref, context)
        # What passes as it is has its NaN refused while it is copied; zeroing takes an action.
        zeroed = self.nonfinite == "zero" and dtype in WIDE_FLOATS
        if add is not None or dtype != ref.spec.dtype or zeroed:
            params = {"add": add, "dtype": dtype, "nonfinite": self.nonfinite}
            (ref,) = context.graph.add(Elementwise(), params, ref)
        name = architecture.mlx_name(fact.name)
        assert name is not None
        return OutputTensor(name, ref, fact)


def _mlx_path(fact: TensorFact, context: PlanContext) -> str:
    name = context.architecture.mlx_name(fact.name)
    assert name is not None
    return name.rpartition(".")[0]


def _dtype(fact: TensorFact, ref: TensorRef, context: PlanContext) -> str:
    """The type that mlx-lm casts the tensor to: the config's, unless the tensor is exempt."""
    if ref.spec.dtype not in WIDE_FLOATS or context.architecture.keeps_dtype(fact.name):
        return ref.spec.dtype
    return FLOAT_NAMES.get(context.architecture.dtype or "", ref.spec.dtype)
