"""Actions on the layers of a model in turn, and what a calibration wants of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from carnice_build.calibration.every_expert import EveryExpert
from carnice_build.calibration.parts import Combine, CombineExperts, Join, Total
from carnice_build.calibration.passes import (
    Forward,
    ForwardExperts,
    linear_counts,
    made_specs,
)
from carnice_build.calibration.plan import Calibration, LayerPart, Samples
from carnice_build.graph import ActionGraph, ProcessOp, TensorRef
from carnice_build.models.base import Passed
from carnice_build.tensors import STACK


class Chain:
    """Actions on layer after layer, each of which is given what those before it made."""

    def __init__(self, graph: ActionGraph, samples: Samples) -> None:
        """Begin with the rows of the embedding for `samples`."""
        self._graph = graph
        self._samples = samples
        self._hidden = samples.start
        self._made: dict[tuple[int, str, str | None], Sequence[TensorRef]] = {}

    def add(
        self, kind: Callable[[int, frozenset[int]], ProcessOp], layer: LayerPart, **params: Any
    ) -> Sequence[TensorRef]:
        """Run the next layer by an op of this `kind`, and give what else comes out of it.

        `kind` takes `workspace` and `transient`.
        Its inputs are those of `Forward`, its outputs begin and end as those do.
        """
        inputs = self.inputs(layer)
        params |= layer.params
        specs = [ref.spec for ref in inputs]
        count = len(kind(layer.workspace, frozenset()).infer(params, specs))
        end = count - len(made_specs(params, specs))
        op = kind(layer.workspace, frozenset({0, *range(end, count)}))
        outputs = self._graph.add(op, params, *inputs)
        self._hidden, made = outputs[0], iter(outputs[end:])
        for item in layer.made:
            key = layer.params["layer"], item.argument, item.key
            self._made[key] = [next(made) for _ in item.shapes]
        return outputs[1:end]

    def look(self, op: ProcessOp, layer: LayerPart, **params: Any) -> Sequence[TensorRef]:
        """What `op`, whose inputs are those of `Forward`, makes of what the next layer is given.

        The chain stays where it is.
        """
        return self._graph.add(op, {**params, **layer.params}, *self.inputs(layer))

    def inputs(self, layer: LayerPart) -> Sequence[TensorRef]:
        """Those of `Forward`, of the next layer."""
        given = (ref for item in layer.given for ref in self._given(layer.params["layer"], item))
        return self._samples.tokens, self._hidden, *layer.weights, *given

    def _given(self, layer: int, item: Passed) -> Sequence[TensorRef]:
        if item.maker is None:
            return [self._samples.of_tokens[layer, item.argument]]
        return self._made[item.maker, item.argument, item.key]


_COMBINED: Mapping[type[Forward], type[Combine]] = {
    Forward: Combine,
    ForwardExperts: CombineExperts,
}


class Squares(NamedTuple):
    """Of what a linear was given: F32 [in] the sums of squares by column, F32 [1] how many vectors.

    Of a stack [E, in] and [E].
    """

    sums: TensorRef
    counts: TensorRef


def _taken(outputs: list[TensorRef], linears: int) -> list[Squares]:
    """The last of what `Forward` gives, of as many linears, which goes from `outputs`."""
    start = len(outputs) - 2 * linears
    found = outputs[start:]
    del outputs[start:]
    return list(map(Squares, found[::2], found[1::2]))


class Activations:
    """The largest inputs of linears, layer by layer, as far as somebody asks for them.

    And the sums of their squares, and the ranges of keys and values, which come from the same
    passes; and those of experts that are all given every token.
    """

    def __init__(self, calibration: Calibration) -> None:
        self._calibration = calibration
        self._parts = [(part, Chain(calibration.graph, part)) for part in calibration.parts]
        self._amax: list[tuple[TensorRef, tuple[str, ...]]] = []
        self._squares: dict[int, dict[str, list[Squares]]] = {}
        self._ranges: dict[int, list[TensorRef]] = {}
        self._read: dict[int, tuple[LayerPart, list[Sequence[TensorRef]]]] = {}
        self.experts: dict[int, TensorRef] = {}
        """How many tokens each expert was sent, I64 [experts], in those layers that have experts.

        An expert without any is quantized with what the others were given.
        """

    @property
    def outside(self) -> tuple[TensorRef | None, tuple[str, ...]]:
        """As `amax`, of the linears before all layers; None without any."""
        found = [part.outside for part in self._calibration.parts]
        amax = [ref for ref in found if ref is not None]
        linears = self._calibration.outside_linears
        return (self._combined(amax, Combine())[0] if amax else None), linears

    def amax(self, layer: int) -> tuple[TensorRef, tuple[str, ...]]:
        """The largest inputs of a layer's linears, F32 [linears], and the linears' module paths.

        A stack has an entry for each expert, all under its own path.
        """
        while len(self._amax) <= layer:
            self._forward(len(self._amax))
        return self._amax[layer]

    def everyone(self, number: int) -> tuple[TensorRef, tuple[str, ...]]:
        """As `amax`, of a layer's experts alone, when every expert is given every token.

        That takes passes of their own, through all experts.
        """
        layer, inputs = self._entered(number)
        linears = [name for name in layer.linears if STACK in name]
        params = {"linears": linears, **layer.params}
        found = [
            self._calibration.graph.add(EveryExpert(layer.workspace, part.first), params, *refs)[0]
            for (part, _), refs in zip(self._parts, inputs, strict=True)
        ]
        (amax,) = self._combined(found, Combine())
        return amax, _modules(layer, linears)

    def squares(self, layer: int) -> dict[str, Squares]:
        """The sums of squares of what a layer's linears were given, by their module paths.

        Those of parts are added in their order: other parts may round to other last bits.
        """
        self.amax(layer)
        return {module: self._added(found) for module, found in self._squares[layer].items()}

    def ranges(self, layer: int) -> TensorRef:
        """The ranges of the keys and values of a layer that caches its own, F32 [samples, 4].

        See `Forward`; samples are in the order in which they pass.
        """
        self.amax(layer)
        found = self._ranges[layer]
        return found[0] if len(found) == 1 else self._calibration.graph.add(Join(), {}, *found)[0]

    @property
    def longest_order(self) -> TensorRef | None:
        """See `Calibration.longest_order`."""
        return self._calibration.longest_order()

    def _entered(self, number: int) -> tuple[LayerPart, list[Sequence[TensorRef]]]:
        """A layer, and what each part's passes through it read."""
        if number not in self._read:
            while len(self._amax) < number:
                self._forward(len(self._amax))
            layer = self._calibration.layer(number)
            self._read[number] = layer, [chain.inputs(layer) for _, chain in self._parts]
        return self._read[number]

    def _forward(self, number: int) -> None:
        layer, _ = self._entered(number)
        linears = list(layer.linears)
        op = ForwardExperts if any(STACK in name for name in linears) else Forward
        more = {"caches": True} if layer.caches else {}
        kept = [
            list(chain.add(partial(op, first=part.first), layer, linears=linears, **more))
            for part, chain in self._parts
        ]
        if layer.caches:
            self._ranges[number] = [outputs.pop() for outputs in kept]
        squares = [_taken(outputs, len(linears)) for outputs in kept]
        self._squares[number] = {
            layer.prefix + name: found for name, *found in zip(linears, *squares, strict=True)
        }
        found = [ref for outputs in kept for ref in outputs]
        amax, *experts = self._combined(found, _COMBINED[op]())
        self._amax.append((amax, _modules(layer, linears)))
        if experts:
            (self.experts[number],) = experts

    def _added(self, found: Sequence[Squares]) -> Squares:
        """What the parts found, in one."""
        if len(found) == 1:
            return found[0]
        graph = self._calibration.graph
        return Squares(*(graph.add(Total(), {}, *refs)[0] for refs in zip(*found, strict=True)))

    def _combined(self, found: Sequence[TensorRef], op: Combine) -> Sequence[TensorRef]:
        """What the parts found, one after the other, as one chain would find it."""
        if len(self._parts) == 1:
            return found
        return self._calibration.graph.add(op, {}, *found)


def _modules(layer: LayerPart, linears: Sequence[str]) -> tuple[str, ...]:
    """The module path of each linear of a layer's amax, that of a stack for each of its experts."""
    params = {"names": layer.names, "linears": linears}
    counts = linear_counts(params, [ref.spec for ref in layer.weights])
    return tuple(
        layer.prefix + name
        for name, count in zip(linears, counts, strict=True)
        for _ in range(count)
    )
