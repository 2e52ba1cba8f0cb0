"""Op `autoround.tune`: one decoder layer's linears, rounded as its samples suit best.

tokens -> hidden(0) -> for each layer *i*: tune(i) -> hidden(i + 1), quantized hidden(i + 1)

Two chains of hidden states run beside each other: the layers as they were say what should come
out, the quantized ones what will go in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from carnice_build.checkpoint.dtypes import TensorSpec
from carnice_build.checkpoint.tensor_file import TensorFile
from carnice_build.graph import ProcessOp, TensorRef
from carnice_build.transforms.calibration import Calibration, samples
from carnice_build.transforms.int4 import packed_specs

_FIRST = 3
"""The number of the first output that belongs to a linear."""


class Tune(ProcessOp):
    """AutoRound on one decoder layer, through the library's `quantize_block`.

    Inputs: tokens; hidden states [samples, length, hidden] before the layer, of the model as it
    was and of the quantized one; the layer's tensors.
    Outputs: the two hidden states behind the layer; losses F32 [2], mean squared errors of the
    layer's outputs when rounded to nearest and when tuned; then qweight, qzeros and scales of
    each linear.
    Parameters: `linears` to quantize, by their names in the layer; `settings`, those of
    `backends.autoround.AutoRoundSettings`; `names`, `kind`, `config`, `threads` and `processor`.
    """

    name = "autoround.tune"
    version = 1
    libraries = (
        "auto-round",
        "torch",
        "transformers",
        "flash-linear-attention",
        "causal-conv1d",
        "numba",
    )
    transient = frozenset({0, 1})
    figures = frozenset({2})

    def infer(
        self, params: Mapping[str, Any], inputs: Sequence[TensorSpec]
    ) -> tuple[TensorSpec, ...]:
        """Hidden states, losses, and the tensors of each linear."""
        weights = dict(zip(params["names"], inputs[3:], strict=True))
        group_size = params["settings"]["group_size"]
        packed = [
            spec
            for linear in params["linears"]
            for spec in packed_specs(weights[f"{linear}.weight"], group_size)
        ]
        return inputs[1], inputs[2], TensorSpec("F32", (2,)), *packed

    def steps(self, params: Mapping[str, Any], inputs: Sequence[TensorSpec]) -> int:
        """One: the library does not tell how far it is."""
        return 1

    def memory(self, params: Mapping[str, Any], inputs: Sequence[TensorSpec]) -> int:
        """All samples, what goes in and what comes out, and some 30 bytes a weight to train it.

        Measured with auto-round 0.15.1 on a layer of 57 million weights.
        """
        weights = sum(spec.size for spec in inputs[3:])
        return 6 * inputs[1].nbytes + 32 * weights

    def run(
        self,
        params: Mapping[str, Any],
        inputs: Sequence[TensorFile],
        outputs: Sequence[TensorFile],
        report: Callable[[], None],
    ) -> None:
        """Raises CheckpointError when outputs of the layer are NaN or infinite."""
        from carnice_build.backends.tuning import tune

        tune(params, samples(inputs[0]), inputs[1:3], inputs[3:], outputs, report)


class Tuning:
    """Tunes the layers of a model in turn, as far as somebody asks for them."""

    def __init__(self, calibration: Calibration, settings: Mapping[str, Any]) -> None:
        """`settings` are those of `backends.autoround.AutoRoundSettings` but `layer_bits`."""
        self._calibration = calibration
        self._settings = settings
        self._hidden = (calibration.start, calibration.start)

    def layer(
        self, number: int, linears: Sequence[str]
    ) -> tuple[dict[str, tuple[TensorRef, ...]], TensorRef]:
        """The parts of each of `linears`, by module path, and the losses of layer `number`.

        To be asked for all layers in their order.
        """
        calibration = self._calibration
        layer = calibration.layer(number)
        chosen = [name for name in layer.linears if layer.prefix + name in linears]
        kept = {name: 16 for name in layer.linears if name not in chosen}
        used = ("names", "kind", "config", "threads", "processor")
        params = {
            **{name: layer.params[name] for name in used},
            "linears": chosen,
            "settings": {**self._settings, "layer_bits": kept},
        }
        made = calibration.graph.add(
            Tune(), params, calibration.tokens, *self._hidden, *layer.weights
        )
        self._hidden = made[0], made[1]
        parts = {
            layer.prefix + name: made[_FIRST + 3 * index : _FIRST + 3 * index + 3]
            for index, name in enumerate(chosen)
        }
        return parts, made[2]
