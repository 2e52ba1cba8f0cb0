"""AWQ's search for smoothing scales, layer by layer.

tokens -> hidden(0) -> for each layer *i*: smooth(i) -> hidden(i + 1), scales(i)

The search does not depend on the observer that picks the integers, and the next layer reads
smoothed, unquantized outputs; so one chain serves every observer.  The arithmetic of the search is
in `backends.awq`; what its scales make of weights and norms, in `ops`.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from carnice_build.calibration.chain import Chain
from carnice_build.calibration.libraries import LAYER_LIBRARIES
from carnice_build.calibration.passes import layer_inputs, layer_memory, made_specs
from carnice_build.calibration.plan import Calibration
from carnice_build.calibration.samples import samples
from carnice_build.calibration.work import search_work
from carnice_build.dtypes import TensorSpec
from carnice_build.errors import PlanError
from carnice_build.graph import ProcessOp, TensorRef
from carnice_build.models import table_of
from carnice_build.models.base import Architecture
from carnice_build.models.smoothing import mappings_of_layer
from carnice_build.models.table_file import SHIPPED
from carnice_build.rates import Work
from carnice_build.tensor_file import TensorFile


@dataclass(frozen=True)
class Smooth(ProcessOp):
    """llm-compressor's AWQ search on one decoder layer; `workspace` is as in `Forward`.

    Inputs: those of `Forward`.
    Outputs: the smoothed layer's hidden states; scales F64 [channels], of a stack [E, channels],
    for each of `mappings`; last, what the smoothed layer makes for others to be given.
    Parameters: `mappings`, each the name of a smoothed module and those it is balanced by, within
    the layer; `quantized`, the linears that will be; `scheme` (`num_bits`, `group_size`,
    `symmetric`), `n_grid`, `duo_scaling` and `norms` as in `backends.awq.AwqSettings`; `names`,
    `layer`, `given`, `made`, `config`, `dtype`, `attention`, `threads`, `device` and `processor`.
    """

    name = "awq.smooth"
    version = 4
    libraries = ("llmcompressor", "compressed-tensors", *LAYER_LIBRARIES)

    workspace: int = 0
    transient: frozenset[int] = frozenset({0})

    def infer(
        self, params: Mapping[str, Any], inputs: Sequence[TensorSpec]
    ) -> tuple[TensorSpec, ...]:
        """Hidden states, a vector for each mapping, and what is made."""
        weights = dict(zip(params["names"], inputs[2:], strict=False))
        shapes = [
            (weights[f"{smooth}.weight"].shape, weights[f"{balance[0]}.weight"].shape)
            for smooth, balance in params["mappings"]
        ]
        scales = (
            TensorSpec("F64", (*divided[:-2], multiplied[-1])) for divided, multiplied in shapes
        )
        return inputs[1], *scales, *made_specs(params, inputs)

    def steps(self, params: Mapping[str, Any], inputs: Sequence[TensorSpec]) -> int:
        """One for each sample that the smoothed layer has read."""
        return inputs[0].shape[0]

    def work(self, params: Mapping[str, Any], inputs: Sequence[TensorSpec]) -> Work:
        """The grid of each mapping, and two passes."""
        return search_work(params, inputs)

    def memory(self, params: Mapping[str, Any], inputs: Sequence[TensorSpec]) -> int:
        """The layer twice, and one sample inside it; what the search keeps lies on disk."""
        weights = sum(spec.nbytes for spec in layer_inputs(params, inputs)[0])
        return layer_memory(params, inputs, self.workspace) + 2 * weights

    def run(
        self,
        params: Mapping[str, Any],
        inputs: Sequence[TensorFile],
        outputs: Sequence[TensorFile],
        progress: Callable[[], None],
    ) -> None:
        """Raises BackendError when the library finds no scales."""
        from carnice_build.formats.compressed_tensors.worker import smooth

        weights, beside = layer_inputs(params, inputs)
        smooth(params, samples(inputs[0]), inputs[1], weights, beside, outputs, progress)


@dataclass(frozen=True)
class Scales:
    """Vectors F64 [channels] by the path of the module that they smooth.

    `columns` are what a weight's columns are multiplied by, `rows` what its rows, or a norm's
    gain, are divided by.
    """

    columns: Mapping[str, TensorRef] = field(default_factory=dict)
    rows: Mapping[str, TensorRef] = field(default_factory=dict)


def search(
    calibration: Calibration,
    architecture: Architecture,
    quantized: Container[str],
    settings: Mapping[str, Any],
) -> Scales:
    """The search in all layers of a model of which the modules `quantized` will be.

    `settings` are `scheme`, `n_grid`, `duo_scaling` and `norms`.
    Raises PlanError where nothing is smoothed, for rounding alone is not AWQ.
    """
    columns: dict[str, TensorRef] = {}
    rows: dict[str, TensorRef] = {}
    chain = Chain(calibration.graph, calibration.whole("AWQ's search"))
    for number in range(architecture.num_layers):
        layer = calibration.layer(number)
        modules = {name.rpartition(".")[0] for name in layer.names}
        chosen = [name for name in layer.linears if layer.prefix + name in quantized]
        mappings = list(mappings_of_layer(architecture.smoothing, modules, chosen))
        params = {
            **settings,
            "mappings": [[mapping.smooth, list(mapping.balance)] for mapping in mappings],
            "quantized": chosen,
        }
        found = chain.add(Smooth, layer, **params)
        for mapping, scales in zip(mappings, found, strict=True):
            rows[layer.prefix + mapping.smooth] = scales
            columns |= {layer.prefix + name: scales for name in mapping.balance}
    if not rows:
        raise _smooths_nothing(architecture)
    return Scales(columns, rows)


def _smooths_nothing(architecture: Architecture) -> PlanError:
    path = table_of(architecture.name)
    table = f"{path.parent.name}/{path.name}" if path else f"the family {architecture.name}"
    why = "is in this model and quantized" if architecture.smoothing else "is for this model"
    own = "a table of yours" if path and path.parent == SHIPPED else "it"
    return PlanError(
        f"AWQ would smooth nothing: no entry under `smoothing` of {table} {why}",
        expected=f"one in {own}; or no AWQ, by `algorithm: nearest` or the preset w4a16-rtn",
        at=("algorithm",),
    )
