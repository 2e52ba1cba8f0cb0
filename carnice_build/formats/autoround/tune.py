"""Op `autoround.tune`: one decoder layer's linears, rounded as its samples suit best.

tokens -> hidden(0) -> for each layer *i*: tune(i) -> advance(i) -> both hidden(i + 1)

Two chains of hidden states run beside each other: the layers as they were say what should come
out, the quantized ones what will go in.
Tuning takes long, and its results are kept; hidden states are large, and go when the next layer
is done.  So they are actions of their own: when layer *k* changes, the layers before it are run
through once more, which takes little, and none is tuned again.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import Any

from carnice_build.calibration.libraries import LAYER_LIBRARIES
from carnice_build.calibration.plan import CPU, Calibration
from carnice_build.calibration.samples import samples
from carnice_build.calibration.work import pass_work, tuning_work
from carnice_build.dtypes import TensorSpec
from carnice_build.errors import PlanError
from carnice_build.formats.autoround.ops import packed_specs
from carnice_build.graph import ProcessOp, TensorRef
from carnice_build.models.base import Role, TensorFact
from carnice_build.rates import Work
from carnice_build.tensor_file import TensorFile

_LIBRARIES = (*LAYER_LIBRARIES, "numba")


class Tune(ProcessOp):
    """AutoRound on one decoder layer, through the library's `quantize_block`.

    Inputs: tokens; hidden states [samples, length, hidden] before the layer, of the model as it
    was and of the quantized one; the layer's tensors.
    Outputs: losses F32 [2], mean squared errors of the layer's outputs when rounded to nearest
    and when tuned; then qweight, qzeros and scales of each linear, of a stack with the number of
    experts in front.
    Parameters: `linears` to quantize, by their names in the layer; `settings`, those of
    `backends.autoround.AutoRoundSettings` but `layer_bits`; `names`, `layer`, `config`, `threads`
    and `processor`, and where it is not the processor that computes, `device` and `gpus`.
    """

    name = "autoround.tune"
    version = 4
    libraries = ("auto-round", *_LIBRARIES)
    figures = frozenset({0})

    def infer(
        self, params: Mapping[str, Any], inputs: Sequence[TensorSpec]
    ) -> tuple[TensorSpec, ...]:
        """Losses, and the tensors of each linear."""
        weights = dict(zip(params["names"], inputs[3:], strict=True))
        group_size = params["settings"]["group_size"]
        packed = [
            TensorSpec(spec.dtype, (*experts, *spec.shape))
            for linear in params["linears"]
            for experts, weight in [_of_each(weights[f"{linear}.weight"])]
            for spec in packed_specs(weight, group_size)
        ]
        return TensorSpec("F32", (2,)), *packed

    def steps(self, params: Mapping[str, Any], inputs: Sequence[TensorSpec]) -> int:
        """One: the library does not tell how far it is."""
        return 1

    def work(self, params: Mapping[str, Any], inputs: Sequence[TensorSpec]) -> Work:
        """All iterations."""
        return tuning_work(params, inputs)

    def memory(self, params: Mapping[str, Any], inputs: Sequence[TensorSpec]) -> int:
        """All samples, what goes in and what comes out, and some 30 bytes a weight to train it.

        Measured with auto-round 0.15.1 on a layer of 57 million weights.
        """
        return 6 * inputs[1].nbytes + 32 * _weights(params, inputs)

    def run(
        self,
        params: Mapping[str, Any],
        inputs: Sequence[TensorFile],
        outputs: Sequence[TensorFile],
        progress: Callable[[], None],
    ) -> None:
        """Raises CheckpointError when outputs of the layer are NaN or infinite."""
        from carnice_build.formats.autoround.worker import tune

        tune(params, samples(inputs[0]), inputs[1:3], inputs[3:], outputs, progress)


class Advance(ProcessOp):
    """Both hidden states behind a layer that was tuned, with the bits that tuning has them in.

    Inputs: those of `Tune`, then qweight, qzeros and scales of each linear.
    Outputs: hidden states of the model as it was, and of the quantized one.
    Parameters: `linears`; `batch_size` and `amp` of the settings; `names`, `layer`, `config`,
    `threads` and `processor`, and where it is not the processor that computes, `device` and `gpus`.
    """

    name = "autoround.advance"
    version = 3
    libraries = _LIBRARIES
    transient = frozenset({0, 1})

    def infer(
        self, params: Mapping[str, Any], inputs: Sequence[TensorSpec]
    ) -> tuple[TensorSpec, ...]:
        """Hidden states."""
        return inputs[1], inputs[2]

    def steps(self, params: Mapping[str, Any], inputs: Sequence[TensorSpec]) -> int:
        """One for each of both."""
        return 2

    def work(self, params: Mapping[str, Any], inputs: Sequence[TensorSpec]) -> Work:
        """Two passes."""
        once = pass_work(params, inputs, 3)
        return Work(once.kind, 2 * once.amount)

    def memory(self, params: Mapping[str, Any], inputs: Sequence[TensorSpec]) -> int:
        """As `Tune.memory`, without what training takes: some 8 bytes a weight are left."""
        return 6 * inputs[1].nbytes + 8 * _weights(params, inputs)

    def run(
        self,
        params: Mapping[str, Any],
        inputs: Sequence[TensorFile],
        outputs: Sequence[TensorFile],
        progress: Callable[[], None],
    ) -> None:
        """Run the samples through the layer as it was, and as it is packed."""
        from carnice_build.formats.autoround.worker import advance

        end = 3 + len(params["names"])
        weights, packed = inputs[3:end], inputs[end:]
        advance(params, samples(inputs[0]), inputs[1:3], weights, packed, outputs, progress)


def _of_each(weight: TensorSpec) -> tuple[tuple[int, ...], TensorSpec]:
    """How many experts a weight is of, none for a matrix, and what each of them has."""
    experts, matrix = weight.shape[:-2], weight.shape[-2:]
    return experts, TensorSpec(weight.dtype, matrix)


def _weights(params: Mapping[str, Any], inputs: Sequence[TensorSpec]) -> int:
    """How many the layer has."""
    return sum(spec.size for spec in inputs[3 : 3 + len(params["names"])])


def _lacks_gates(facts: Iterable[TensorFact]) -> bool:
    """True for a layer of experts with one matrix on the way in, and one on the way out."""
    shapes = [fact.shape[1:] for fact in facts if fact.stacked and fact.role is Role.LINEAR]
    return len(shapes) == _UNGATED and shapes[0] == shapes[1][::-1]


_UNGATED = 2
"""Matrices of an expert without a gate."""


class Tuning:
    """Tunes the layers of a model in turn, as far as somebody asks for them."""

    def __init__(self, calibration: Calibration, settings: Mapping[str, Any]) -> None:
        """`settings` are those of `backends.autoround.AutoRoundSettings` but `layer_bits`.

        What is not to be quantized is none of the `linears` of a layer.
        """
        self._calibration = calibration
        self._samples = samples = calibration.whole("method tune")
        self._settings = settings
        # Behind the last layer nobody asks.
        self._hidden: Callable[[], Sequence[TensorRef]] = lambda: (samples.start,) * 2

    def layer(
        self, number: int, linears: Container[str]
    ) -> tuple[Mapping[str, Sequence[TensorRef]], TensorRef]:
        """The parts of each of `linears`, by module path, and the losses of layer `number`.

        To be asked for all layers in their order.
        PlanError for a layer that reads more than hidden states, or makes more for others: the
        library would call it with what the first layer was given, and with what the last batch
        left, whichever sample it tunes on.
        Also for experts that it has no forward pass for: it would fail on those without a gate,
        and take rows of gate and up that take turns for those of one.
        """
        calibration = self._calibration
        layer = calibration.layer(number)
        if beside := (*layer.given, *layer.made):
            raise PlanError(
                f"auto-round cannot tune layer {number}, for layers are given {beside[0].argument}",
                expected="`method: nearest`",
            )
        if _lacks_gates(layer.facts) or any(f.fused and f.fused.turns for f in layer.facts):
            raise PlanError(
                f"auto-round cannot tune layer {number}: it runs no experts without a gate, or "
                "whose gate takes turns with up",
                expected="`method: nearest`",
            )
        chosen = [name for name in layer.linears if layer.prefix + name in linears]
        used = ["names", "layer", "config", "threads", "processor"]
        if layer.params["device"] != CPU:
            used += ["device", "gpus"]
        params = {**{name: layer.params[name] for name in used}, "linears": chosen}
        settings = self._settings
        inputs = self._samples.tokens, *self._hidden(), *layer.weights
        losses, *packed = calibration.graph.add(Tune(), {**params, "settings": settings}, *inputs)
        passing = {**params, **{name: settings[name] for name in ("batch_size", "amp")}}
        self._hidden = lambda: calibration.graph.add(Advance(), passing, *inputs, *packed)
        triples = (packed[first : first + 3] for first in range(0, len(packed), 3))
        modules = (layer.prefix + name for name in chosen)
        return dict(zip(modules, triples, strict=True)), losses
