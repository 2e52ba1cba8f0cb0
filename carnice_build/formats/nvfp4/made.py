"""The tensors that quantized linears become, by modelopt's algorithms."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from carnice_build.calibration.chain import Activations
from carnice_build.formats.base import OutputTensor
from carnice_build.formats.blame import UNCALIBRATED, about_module, refuse_unfit
from carnice_build.formats.nvfp4.algorithms import ALGORITHMS, Algorithm
from carnice_build.formats.nvfp4.fp8_ops import Fp8InputScales, MxQuantize, TensorQuantize
from carnice_build.formats.nvfp4.ops import BlockQuantize, InputScales, TakeTurns, TurnsQuantize
from carnice_build.graph import TensorRef, View
from carnice_build.models.base import Role, TensorFact
from carnice_build.steps.base import PlanContext

_INPUT_SCALES: Mapping[str, Callable[[], InputScales]] = {
    "NVFP4": InputScales,
    "FP8": Fp8InputScales,
}

Made = dict[str, list[OutputTensor]]
"""The tensors of each quantized module, by the module's path."""


@dataclass(frozen=True)
class Linears:
    """The linears that are quantized: the fact of each by its module, and its algorithm's name.

    `activations` gives the largest inputs of a layer's linears, once somebody asks.
    """

    chosen: Mapping[str, TensorFact]
    algorithms: Mapping[str, str]
    activations: Callable[[], Activations]
    view: View
    context: PlanContext

    def made(self) -> Made:
        """What all of them become."""
        made: Made = {}
        architecture = self.context.architecture
        for layer in range(architecture.num_layers):
            for algorithm, groups in self._by_algorithm(architecture.shared_inputs(layer)):
                if algorithm.calibrated:
                    amax, linears = self.activations().amax(layer)
                    scales = self._input_scales(algorithm, groups, amax, linears)
                else:
                    scales = [None] * len(groups)
                made |= self._tensors(algorithm, groups, scales)
        left = [[module] for module in self.chosen if module not in made]
        for algorithm, groups in self._by_algorithm(left):
            if algorithm.calibrated:
                scales = self._outside(algorithm, groups)
            else:
                scales = [None] * len(groups)
            made |= self._tensors(algorithm, groups, scales)
        return made

    def _by_algorithm(
        self, groups: Sequence[Sequence[str]]
    ) -> Iterator[tuple[Algorithm, list[list[TensorFact]]]]:
        """Groups of modules as the facts of those that are chosen, by their algorithm."""
        found: dict[str, list[list[TensorFact]]] = {}
        for group in groups:
            parts: dict[str, list[TensorFact]] = {}
            for module in group:
                if module in self.chosen:
                    parts.setdefault(self.algorithms[module], []).append(self.chosen[module])
            for name, facts in parts.items():
                found.setdefault(name, []).append(facts)
        return ((ALGORITHMS[name], facts) for name, facts in found.items())

    def _outside(
        self, algorithm: Algorithm, groups: Sequence[Sequence[TensorFact]]
    ) -> Sequence[TensorRef | None]:
        """The input scales of linears in no decoder layer, each of which has its own input."""
        amax, linears = self.activations().outside
        left = [fact.module for group in groups for fact in group if fact.module not in linears]
        refuse_unfit(dict.fromkeys(left, UNCALIBRATED), "it among `keep`")
        assert amax is not None
        return self._input_scales(algorithm, groups, amax, linears)

    def _input_scales(
        self,
        algorithm: Algorithm,
        groups: Sequence[Sequence[TensorFact]],
        amax: TensorRef,
        linears: Sequence[str],
    ) -> Sequence[TensorRef | None]:
        """The scale of the input of each of `groups`.

        `amax` are the largest inputs of `linears`; of a stack there is one for each expert.
        """
        places: dict[str, list[int]] = {}
        for index, linear in enumerate(linears):
            places.setdefault(linear, []).append(index)
        params = {
            "groups": [
                [index for fact in group for index in places[fact.module]] for group in groups
            ],
            "shapes": [
                () if turned(group[0]) else self.view[group[0].name].spec.shape[:-2]
                for group in groups
            ],
        }
        return self.context.graph.add(_INPUT_SCALES[algorithm.name](), params, amax)

    def _tensors(
        self,
        algorithm: Algorithm,
        groups: Sequence[Sequence[TensorFact]],
        scales: Sequence[TensorRef | None],
    ) -> Made:
        make = _MAKERS[algorithm.name]
        return {
            fact.module: tensors
            for group, scale in zip(groups, scales, strict=True)
            for fact, tensors in make(self, group, scale)
        }

    def _packed(
        self, group: Sequence[TensorFact], input_scale: TensorRef | None
    ) -> Iterator[tuple[TensorFact, list[OutputTensor]]]:
        """Linears in E2M1 that share `weight_scale_2`."""
        inputs = [self.view[fact.name] for fact in group]
        if name := turned(group[0]):
            with about_module(_names(group)):
                packed, scales, scale_2 = self.context.graph.add(TurnsQuantize(), {}, *inputs)
            parts = {
                f"{name}_input_scale": input_scale,
                name: packed,
                f"{name}_weight_scale": scales,
                f"{name}_weight_scale_2": scale_2,
            }
            yield (
                group[0],
                [OutputTensor(part, ref, group[0]) for part, ref in parts.items() if ref],
            )
            yield from ((fact, []) for fact in group[1:])
            return
        with about_module(_names(group)):
            made = self.context.graph.add_each(BlockQuantize(), {}, *inputs)
        for number, fact in enumerate(group):
            parts = {
                "input_scale": input_scale,
                "weight": made[2 * number],
                "weight_scale": made[2 * number + 1],
                "weight_scale_2": made[-1],
            }
            yield fact, _outputs(fact, parts)

    def _fp8(
        self, group: Sequence[TensorFact], input_scale: TensorRef | None
    ) -> Iterator[tuple[TensorFact, list[OutputTensor]]]:
        """Linears in FP8: each has a scale of its own, but for the projections of an expert.

        These are one tensor in transformers, so that the library measures them as one.
        """
        stacked = len(self.view[group[0].name].spec.shape) > _MATRIX
        for facts in [group] if stacked else [[fact] for fact in group]:
            inputs = [self.view[fact.name] for fact in facts]
            with about_module(_names(facts)):
                *codes, scale = self.context.graph.add_each(TensorQuantize(), {}, *inputs)
            for fact, weight in zip(facts, codes, strict=True):
                parts = {"input_scale": input_scale, "weight": weight, "weight_scale": scale}
                yield fact, _outputs(fact, parts)

    def _mxfp8(
        self, group: Sequence[TensorFact], input_scale: TensorRef | None
    ) -> Iterator[tuple[TensorFact, list[OutputTensor]]]:
        """Linears in MXFP8, each by itself."""
        for fact in group:
            with about_module(fact.module):
                made = self.context.graph.add_each(MxQuantize(), {}, self.view[fact.name])
            yield fact, _outputs(fact, dict(zip(("weight", "weight_scale"), made, strict=True)))


_MATRIX = 2
"""Axes of a weight that is no stack."""

_MAKERS = {
    "NVFP4": Linears._packed,
    "W4A16_NVFP4": Linears._packed,
    "FP8": Linears._fp8,
    "MXFP8": Linears._mxfp8,
}


def _names(group: Sequence[TensorFact]) -> str:
    return ", ".join(fact.module for fact in group)


def _outputs(fact: TensorFact, parts: Mapping[str, TensorRef | None]) -> list[OutputTensor]:
    """The tensors of a module by the ends of their names, as far as there are any."""
    return [
        OutputTensor(f"{fact.module}.{suffix}", ref, fact) for suffix, ref in parts.items() if ref
    ]


def turned(fact: TensorFact) -> str | None:
    """The one tensor that the library publishes experts as, where transformers has them so."""
    return fact.fused.turned if fact.fused else None


def turned_biases(
    facts: Sequence[TensorFact],
    chosen: Mapping[str, TensorFact],
    view: View,
    context: PlanContext,
) -> dict[str, list[OutputTensor]]:
    """What is published of the biases of such experts, by the names of their facts."""
    fused: dict[str, list[TensorFact]] = {}
    for fact in facts:
        owner = chosen.get(fact.module)
        if fact.role is Role.BIAS and fact.fused and owner and turned(owner):
            fused.setdefault(fact.fused.name, []).append(fact)
    found: dict[str, list[OutputTensor]] = {}
    for name, group in fused.items():
        refs = [view[fact.name] for fact in group]
        ref = refs[0] if len(refs) == 1 else context.graph.add(TakeTurns(), {}, *refs)[0]
        found |= {fact.name: [] for fact in group}
        found[group[0].name] = [OutputTensor(name, ref, group[0])]
    return found
