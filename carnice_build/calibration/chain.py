"""Actions on the layers of a model in turn, and what a calibration wants of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from carnice_build.calibration.passes import (
    Forward,
    ForwardExperts,
    linear_counts,
    made_specs,
)
from carnice_build.calibration.plan import Calibration, LayerPart
from carnice_build.graph import ProcessOp, TensorRef
from carnice_build.models.base import Passed
from carnice_build.tensors import STACK


class Chain:
    """Actions on layer after layer, each of which is given what those before it made."""

    def __init__(self, calibration: Calibration) -> None:
        """Begin with rows of the embedding."""
        self._calibration = calibration
        self._hidden = calibration.start
        self._made: dict[tuple[int, str, str | None], Sequence[TensorRef]] = {}

    def add(
        self, kind: Callable[[int, frozenset[int]], ProcessOp], layer: LayerPart, **params: Any
    ) -> Sequence[TensorRef]:
        """Run the next layer by an op of this `kind`, and give what else comes out of it.

        `kind` takes `workspace` and `transient`.
        Its inputs are those of `Forward`, its outputs begin and end as those do.
        """
        calibration = self._calibration
        given = (ref for item in layer.given for ref in self._given(layer.params["layer"], item))
        inputs = calibration.tokens, self._hidden, *layer.weights, *given
        params |= layer.params
        specs = [ref.spec for ref in inputs]
        count = len(kind(layer.workspace, frozenset()).infer(params, specs))
        end = count - len(made_specs(params, specs))
        op = kind(layer.workspace, frozenset({0, *range(end, count)}))
        outputs = calibration.graph.add(op, params, *inputs)
        self._hidden, made = outputs[0], iter(outputs[end:])
        for item in layer.made:
            key = layer.params["layer"], item.argument, item.key
            self._made[key] = [next(made) for _ in item.shapes]
        return outputs[1:end]

    def _given(self, layer: int, item: Passed) -> Sequence[TensorRef]:
        if item.maker is None:
            return [self._calibration.of_tokens[layer, item.argument]]
        return self._made[item.maker, item.argument, item.key]


class Activations:
    """The largest inputs of linears, layer by layer, as far as somebody asks for them."""

    def __init__(self, calibration: Calibration) -> None:
        self._calibration = calibration
        self._chain = Chain(calibration)
        self._amax: list[tuple[TensorRef, tuple[str, ...]]] = []
        self.experts: dict[int, TensorRef] = {}
        """How many tokens each expert was sent, I64 [experts], in those layers that have experts.

        An expert without any is quantized with what the others were given.
        """

    @property
    def outside(self) -> tuple[TensorRef | None, tuple[str, ...]]:
        """As `amax`, of the linears before all layers; None without any."""
        return self._calibration.outside

    def amax(self, layer: int) -> tuple[TensorRef, tuple[str, ...]]:
        """The largest inputs of a layer's linears, F32 [linears], and the linears' module paths.

        A stack has an entry for each expert, all under its own path.
        """
        while len(self._amax) <= layer:
            self._forward(len(self._amax))
        return self._amax[layer]

    def _forward(self, number: int) -> None:
        layer = self._calibration.layer(number)
        linears = list(layer.linears)
        op = ForwardExperts if any(STACK in name for name in linears) else Forward
        amax, *experts = self._chain.add(op, layer, linears=linears)
        params = {"names": layer.names, "linears": linears}
        counts = linear_counts(params, [ref.spec for ref in layer.weights])
        modules = (
            layer.prefix + name
            for name, count in zip(layer.linears, counts, strict=True)
            for _ in range(count)
        )
        self._amax.append((amax, tuple(modules)))
        if experts:
            (self.experts[number],) = experts
