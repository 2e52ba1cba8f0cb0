"""A conversion to MLX in the making: what becomes of one tensor after the other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING, Any

from carnice_build.dtypes import WIDE_FLOATS
from carnice_build.formats.base import Conversion, OutputTensor
from carnice_build.formats.blame import about_module
from carnice_build.formats.elementwise import Elementwise
from carnice_build.formats.mlx.files import section_of, short_section
from carnice_build.formats.mlx.kept import codes_of
from carnice_build.formats.mlx.modes import AFFINE, chosen, parameters, scheme_of
from carnice_build.formats.mlx.ops import (
    SUFFIXES,
    AffineQuantize,
    FloatQuantize,
    ReferenceAffineQuantize,
    ReferenceFloatQuantize,
    Transform,
    TransformFloatQuantize,
    TransformQuantize,
)
from carnice_build.formats.mlx.target import Target
from carnice_build.formats.mlx.trace import Kind, Trace, Traced, as_params, from_params
from carnice_build.formats.rules import Settings
from carnice_build.formats.scheme import Scheme
from carnice_build.graph import ArrayOp, Op, Stacked, TensorRef, View
from carnice_build.models.base import TensorFact
from carnice_build.steps.base import Codes, PlanContext
from carnice_build.units import plural

if TYPE_CHECKING:
    from carnice_build.formats.mlx.format import MlxFormat


class Made:
    """A conversion in the making."""

    def __init__(self, knobs: MlxFormat, trace: Trace, view: View, context: PlanContext) -> None:
        self._knobs = knobs
        self._trace = trace
        self._view = view
        self._graph = context.graph
        self._tensors: list[OutputTensor] = []
        self._quantized: dict[str, Scheme] = {}
        self._causes: dict[str, dict[str, tuple[str | int, ...]]] = {}
        self._kept: dict[str, TensorRef] = {}
        self._own: Counter[str] = Counter()

    def own(self, item: Traced) -> Mapping[str, Any]:
        """Mode, bits and group size of a module by the model's own code, as far as it says."""
        return self._trace.modules[item.module]

    def add_plain(self, item: Traced, fact: TensorFact) -> None:
        """A tensor that is not quantized."""
        refs = self._refs(item)
        if item.kind is Kind.PROGRAM:
            (ref,) = self._transformed(Transform(), item, refs, {"dtype": item.spec.dtype})
        else:
            ref = self._elementwise(item, refs[0])
        self._tensors.append(OutputTensor(item.name, ref.reshaped(*item.spec.shape), fact))

    def _elementwise(self, item: Traced, ref: TensorRef) -> TensorRef:
        """A tensor that is cast at most, or a number added."""
        add = item.steps[0].arguments[0] if item.kind is Kind.SHIFT else None
        dtype = item.spec.dtype
        # What passes as it is has its NaN refused while it is copied; zeroing takes an action.
        zeroed = self._knobs.nonfinite == "zero" and dtype in WIDE_FLOATS
        if add is not None or dtype != ref.spec.dtype or zeroed:
            params = {"add": add, "dtype": dtype, "nonfinite": self._knobs.nonfinite}
            (ref,) = self._graph.add(Elementwise(), params, ref)
        return ref

    def add_codes(self, item: Traced, fact: TensorFact, codes: Codes) -> None:
        """Words or scales of a weight that stays quantized as it is; no action."""
        path, _, suffix = item.name.rpartition(".")
        stated = self._trace.quantized[path]
        self._refs(item)
        self._tensors.append(OutputTensor(item.name, codes_of(codes, suffix), fact))
        self._quantized[path] = Scheme(stated["bits"], stated["group_size"], "float")

    def add_quantized(self, item: Traced, fact: TensorFact, settings: Settings) -> None:
        """A weight in packed groups, with scales, and with biases in mode affine."""
        params = {**parameters(settings.values), "dtype": item.spec.dtype}
        refs, fused = self._refs(item), self._knobs.backend == "fused"
        made: Sequence[TensorRef]
        with about_module(fact.module):
            if item.kind is not Kind.PROGRAM:
                made = self._packed(params, refs[0], item)
            elif fused:
                op = TransformFloatQuantize() if "mode" in params else TransformQuantize()
                made = self._transformed(op, item, refs, params)
            else:
                dtype = {"dtype": item.spec.dtype}
                (ref,) = self._transformed(Transform(), item, refs, dtype)
                made = self._packed(params, ref, item)
        path = item.module
        outputs = [
            OutputTensor(f"{path}.{suffix}", out, fact)
            for suffix, out in zip(SUFFIXES, made, strict=False)
        ]
        self._tensors += outputs
        self._quantized[path] = scheme_of(settings.values)
        if settings.causes.keys().isdisjoint(("mode", "bits")):
            self._own[_in_words(settings.values)] += 1
        self._causes[outputs[0].name] = settings.causes

    def _packed(self, params: Mapping[str, Any], ref: TensorRef, item: Traced) -> list[TensorRef]:
        """A weight quantized; of a stack, the rows of all its experts alike."""
        *before, columns = item.spec.shape
        fused, floats = self._knobs.backend == "fused", "mode" in params
        op: Op
        if fused:
            op = FloatQuantize() if floats else AffineQuantize()
        else:
            op = ReferenceFloatQuantize() if floats else ReferenceAffineQuantize()
        rows = ref.reshaped(prod(before), columns)
        made = self._graph.add(op, {**params, "nonfinite": self._knobs.nonfinite}, rows)
        return [out.reshaped(*before, out.spec.shape[-1]) for out in made]

    def _transformed(
        self, op: ArrayOp, item: Traced, refs: Sequence[TensorRef], params: Mapping[str, Any]
    ) -> Sequence[TensorRef]:
        """What an op with steps makes; of stacks, one expert after another where it can."""
        steps = item.steps
        if len(steps) == 1 and steps[0].op == "each":
            op, refs = Stacked(op), [refs[index] for index in steps[0].operands]
            steps = from_params(steps[0].arguments[0])
        params = {**params, "steps": as_params(steps), "nonfinite": self._knobs.nonfinite}
        return self._graph.add(op, params, *refs)

    def _refs(self, item: Traced) -> list[TensorRef]:
        refs = {source.name: self._view[source.name] for source in item.sources}
        self._kept.update(refs)
        return list(refs.values())

    @property
    def facts(self) -> Sequence[TensorFact]:
        """What the tensors that were added stand for."""
        return [tensor.fact for tensor in self._tensors]

    def conversion(self, **stated: bool) -> Conversion:
        """All that was added, with what else the card says of it."""
        return Conversion(
            tensors=self._tensors,
            parameters=sum(ref.spec.size for ref in self._kept.values()),
            quantized=self._quantized,
            causes=self._causes,
            notices=self._notices(),
            stated={
                "whole": self._trace.stated or section_of(self._knobs.whole),
                "modules": self._modules(),
                "entries": self._trace.entries,
                **stated,
            },
        )

    def _notices(self) -> list[str]:
        """What the model's own code asks for, where neither the recipe nor a rule says it."""
        said = _in_words(self._knobs.settings)
        return [
            f"{self._knobs.library} wants {own} for {plural(count, 'module')} of this model, "
            f"not {said.removesuffix(' bits')}, and they get them unless a rule says otherwise"
            for own, count in sorted(self._own.items())
            if own != said
        ]

    def _modules(self) -> dict[str, Any]:
        """The entries of config.json about modules, as the library writes them.

        Modules that the model's own code treats otherwise are listed as that code says it; when
        the recipe treats some otherwise, or the source was quantized, every one is listed.
        """
        whole, modules = self._knobs.whole, self._trace.modules
        plain = self._knobs.settings
        expected = {path: _scheme(chosen(plain, own, [])) for path, own in modules.items()}
        found = {path: own for path, own in self._quantized.items() if path in modules}.items()
        if self._trace.stated is not None and all(own == expected[path] for path, own in found):
            return {path: dict(modules[path]) or section_of(own) for path, own in found}
        if whole != scheme_of(plain) or any(scheme != expected[path] for path, scheme in found):
            section = section_of if self._knobs.library is Target.MLX_LM else short_section
            return {path: section(scheme) for path, scheme in found}
        return {path: dict(modules[path]) for path, _ in found if modules[path]}


def _scheme(settings: Settings | None) -> Scheme | None:
    return None if settings is None else scheme_of(settings.values)


def _in_words(values: Mapping[str, Any]) -> str:
    return f"{values['bits']} bits" if values["mode"] == AFFINE else str(values["mode"])
