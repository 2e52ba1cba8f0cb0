"""GPTQ: integers that make up for the errors of those before them, layer by layer.

tokens -> hidden(0) -> for each layer *i*: hessians(i) -> quantize(i), a module each
                                           -> advance(i) -> hidden(i + 1)

A Hessian follows from what a layer's linears are given and depends on no knob of its own layer's
weights.  What they are given does, though, on those of the layers before, whose quantized outputs
the library hands on; with `propagate_error: false` it hands on what the unquantized layers make,
and then `hessians(i)` itself gives hidden(i + 1), no Hessian depends on any knob of weights, and
nothing is advanced.
Hessians are large, [in, in] in F32, and go when the modules that need them are quantized; what is
quantized is kept.  So when layer *k* changes, the layers before it are run through once more, which
takes little, and none of them is quantized again.
The arithmetic is in `backends.gptq`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from carnice_build.calibration.chain import Chain
from carnice_build.calibration.plan import Calibration, LayerPart
from carnice_build.errors import PlanError
from carnice_build.formats.compressed_tensors.gptq_ops import (
    GptqAdvance,
    GptqQuantize,
    Hessians,
    comes_back,
    suffixes,
)
from carnice_build.formats.compressed_tensors.gptq_spec import GptqSpec
from carnice_build.graph import TensorRef
from carnice_build.models.base import Architecture
from carnice_build.units import format_size


@dataclass(frozen=True)
class Quantized:
    """Tensors by the path of the module whose weight they stand for, in the order of `suffixes`.

    `figures` are what `GptqQuantize` counts, by what it is of; `notices` say how much of the cache
    Hessians take, where they stay.
    """

    parts: dict[str, Sequence[TensorRef]] = field(default_factory=dict)
    figures: dict[str, TensorRef] = field(default_factory=dict)
    notices: tuple[str, ...] = ()


def quantized(
    calibration: Calibration,
    architecture: Architecture,
    schemes: Mapping[str, Mapping[str, Any]],
    knobs: GptqSpec,
) -> Quantized:
    """GPTQ in all layers of a model.

    `schemes` are those of the modules to quantize: `num_bits`, `symmetric`, `strategy`,
    `group_size` (None without groups) and `observer`, of integers that are packed.
    PlanError where the recipe cuts the samples, for Hessians are sums over all of them, and for a
    module that is in no decoder layer.
    """
    return _Layers(calibration, architecture, schemes, knobs).run()


class _Layers:
    """GPTQ in the layers of a model in turn."""

    def __init__(
        self,
        calibration: Calibration,
        architecture: Architecture,
        schemes: Mapping[str, Mapping[str, Any]],
        knobs: GptqSpec,
    ) -> None:
        self._calibration = calibration
        self._architecture = architecture
        self._schemes = schemes
        self._knobs = knobs
        samples = calibration.whole("GPTQ")
        self._chain = Chain(calibration.graph, samples)
        self._hidden = samples.start.spec.shape[-1]
        self._parts: dict[str, Sequence[TensorRef]] = {}
        self._whole: dict[str, TensorRef] = {}
        self._figures: dict[str, TensorRef] = {}

    def run(self) -> Quantized:
        count = self._architecture.num_layers
        kept = 0
        for number in range(count):
            layer = self._calibration.layer(number)
            groups = list(self._groups(number, layer))
            hessians = self._hessians(layer, groups) if self._needed(groups, number) else ()
            kept += sum(ref.spec.nbytes for ref in hessians)
            for (linears, _), hessian in zip(groups, hessians, strict=True):
                for linear in linears:
                    self._quantize(layer, linear, hessian)
            if self._knobs.propagate_error and number + 1 < count:
                self._advance(layer)
        self._refuse_others()
        notice = f"gptq.keep_hessians: Hessians of {format_size(kept)} stay in the cache"
        notices = (notice,) if self._knobs.keep_hessians else ()
        return Quantized(self._parts, self._figures, notices)

    def _refuse_others(self) -> None:
        """Refuse linears that no layer has."""
        for module in self._schemes:
            if module not in self._parts:
                raise PlanError(
                    f"GPTQ has no Hessian of {module}, which is in no decoder layer",
                    expected="a pattern for it under `ignore`",
                    at=("ignore",),
                )

    def _needed(self, groups: Sequence[Any], number: int) -> bool:
        """Whether a layer is run through as it was."""
        if groups:
            return True
        return not self._knobs.propagate_error and number + 1 < self._architecture.num_layers

    def _groups(self, number: int, layer: LayerPart) -> Iterator[tuple[list[str], bool]]:
        """The linears to quantize, by their names in the layer, those together that read one input.

        And whether each expert reads another one.  All read every token, so only what they make
        themselves differs; where it is as wide as hidden states, widths do not tell it from these.
        """
        weights = dict(zip(layer.names, layer.weights, strict=True))
        for group in self._architecture.shared_inputs(number):
            linears = [name.removeprefix(layer.prefix) for name in group if name in self._schemes]
            if linears:
                *experts, rows, columns = weights[f"{linears[0]}.weight"].spec.shape
                each = columns != self._hidden or rows == self._hidden
                yield linears, bool(experts) and each

    def _hessians(
        self, layer: LayerPart, groups: Sequence[tuple[list[str], bool]]
    ) -> Sequence[TensorRef]:
        hands_on = not self._knobs.propagate_error
        params = {
            "groups": [[linears, each] for linears, each in groups],
            "hands_on": hands_on,
            "norms": self._knobs.norms,
        }
        keep = self._knobs.keep_hessians
        last = len(groups)

        def op(workspace: int, transient: frozenset[int]) -> Hessians:
            own = range(1, last + 1) if hands_on else range(last)
            return Hessians(workspace, transient if keep else transient | {*own})

        if hands_on:
            return self._chain.add(op, layer, **params)
        return self._chain.look(op(layer.workspace, frozenset()), layer, **params)

    def _quantize(self, layer: LayerPart, linear: str, hessian: TensorRef) -> None:
        module = layer.prefix + linear
        knobs = self._knobs
        params = {
            **self._schemes[module],
            "block_size": knobs.block_size,
            "dampening_frac": knobs.dampening_frac,
            # The library has two names for one order.
            "actorder": "weight" if knobs.actorder else None,
            **_where(layer),
        }
        weight = layer.weights[layer.names.index(f"{linear}.weight")]
        ends = suffixes(params)
        whole = () if comes_back(params["num_bits"]) else (1 + len(ends),)
        op = GptqQuantize(frozenset(whole))
        counts, *made = self._calibration.graph.add(op, params, weight, hessian)
        self._parts[module] = made[: len(ends)]
        if whole:
            self._whole[module] = made[-1]
        self._figures[f"matrices of {module}, and how many rounded to nearest"] = counts

    def _advance(self, layer: LayerPart) -> None:
        """Run the samples through the layer as it was quantized."""
        names: list[str] = []
        weights: list[TensorRef] = []
        schemes = {}
        for name, ref in zip(layer.names, layer.weights, strict=True):
            linear = name.removesuffix(".weight")
            module = layer.prefix + linear
            parts = self._parts.get(module) if linear != name else None
            if parts is None or module in self._whole:
                names.append(name)
                weights.append(self._whole.get(module, ref) if parts else ref)
                continue
            scheme = dict(self._schemes[module])
            del scheme["observer"]
            schemes[linear] = scheme
            names += [f"{linear}.{suffix}" for suffix in suffixes(scheme)]
            weights += parts
        changed = replace(
            layer,
            names=tuple(names),
            weights=tuple(weights),
            params={**layer.params, "names": names},
        )
        self._chain.add(GptqAdvance, changed, schemes=schemes, norms=self._knobs.norms)


def _where(layer: LayerPart) -> dict[str, Any]:
    """On what a layer computes, which decides the last bits of sums."""
    used = ("threads", "device", "processor", "gpus")
    return {name: layer.params[name] for name in used if name in layer.params}
