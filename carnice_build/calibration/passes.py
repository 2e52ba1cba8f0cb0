"""Ops of a calibration: forward passes, cut at the decoder layer.

tokens -> hidden(0) -> for each layer *i*: forward(i) -> hidden(i + 1), amax, squares, ranges of i

The hidden states are large and go when the next layer is done; what is kept of a layer are the
largest magnitudes that its linears were given, the sums of their squares by column, and the ranges
of the keys and values that it made.
No key holds anything of the quantizer, so all recipes of one body and one dataset share them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from carnice_build.calibration.beside import passed_specs
from carnice_build.calibration.libraries import LAYER_LIBRARIES
from carnice_build.calibration.samples import samples, table_rows
from carnice_build.calibration.work import pass_work
from carnice_build.dtypes import FLOAT_NAMES, ITEM_SIZE, NUMPY_NAME, TensorSpec
from carnice_build.graph import ProcessOp
from carnice_build.rates import Work
from carnice_build.tensor_file import TensorFile
from carnice_build.tensors import STACK, numbered

if TYPE_CHECKING:
    from carnice_build.calibration.watch import Seen

T = TypeVar("T")


class Embed(ProcessOp):
    """The rows of the embedding for each token: the hidden states before the first layer.

    Inputs: tokens I32 [samples, length]; the embedding [vocabulary, hidden].
    Output: [samples, length, hidden] of `dtype`, zero behind the end of a sample.
    Parameter: `dtype`.
    """

    name = "calibration.embed"
    version = 1
    libraries = ("numpy",)
    transient = frozenset({0})

    def infer(
        self, params: Mapping[str, Any], inputs: Sequence[TensorSpec]
    ) -> tuple[TensorSpec, ...]:
        """Hidden states."""
        tokens, table = inputs
        return (TensorSpec(params["dtype"], (*tokens.shape, table.shape[1])),)

    def memory(self, params: Mapping[str, Any], inputs: Sequence[TensorSpec]) -> int:
        """The tokens, and one sample twice."""
        (hidden,) = self.infer(params, inputs)
        return inputs[0].nbytes + 2 * hidden.row_bytes

    def run(
        self,
        params: Mapping[str, Any],
        inputs: Sequence[TensorFile],
        outputs: Sequence[TensorFile],
        progress: Callable[[], None],
    ) -> None:
        """Raises CheckpointError for a token that has no row."""
        import numpy as np

        from carnice_build.kernels.elementwise import cast

        table = inputs[1]
        for index, tokens in enumerate(samples(inputs[0])):
            rows = table_rows(table, tokens)
            out = np.empty(rows.shape, NUMPY_NAME[params["dtype"]])
            cast(rows, table.spec.dtype, params["dtype"], out)
            outputs[0].write_row(index, out)


@dataclass(frozen=True)
class Forward(ProcessOp):
    """One decoder layer over every sample, as transformers computes it.

    `workspace` are the bytes that one sample needs inside the layer, `first` is what number the
    first of these samples has among all; neither changes a result.

    Inputs: tokens; hidden states [samples, length, hidden]; the layer's tensors; then what it is
    given beside them (`beside.passed_specs`).
    Outputs: the layer's own hidden states; amax F32 [linears], the largest magnitude of each
    linear's inputs over all samples, as modelopt's max calibrator has it; for each of `linears` the
    sums of its inputs' squares by column, F32 [in], or [E, in] of a stack, and how many vectors
    these are of, F32 [1] or [E]; of a layer that `caches` F32 [samples, 4], the least and the
    largest key of each sample, and value, as they enter a cache; last, what the layer makes for
    others to be given.
    A stack of experts is as many linears; one that no token was sent to has 0.
    Parameters: `names` (of the tensors, within the layer), `linears` (of the modules in amax),
    `layer` (its number), `given` and `made` (`beside.told`, where there is any), `caches` (true
    where the layer keeps keys and values of its own, and else not there), `config` of the
    text model, and `dtype`, `attention`, `threads`, `device` and `processor` of the arithmetic;
    `gpus`, the kinds that the machine has, where `device` is not the processor.

    The number and the whole config are parameters though most layers compute alike whatever theirs:
    what else a layer depends on, only the code of its family knows.  That costs nothing within a
    model, whose layers never have equal tensors, and between models of equal layers but another
    depth it costs what they might have shared.
    """

    name = "calibration.forward"
    version = 4
    libraries = LAYER_LIBRARIES

    workspace: int = 0
    transient: frozenset[int] = frozenset({0})
    first: int = 0

    def infer(
        self, params: Mapping[str, Any], inputs: Sequence[TensorSpec]
    ) -> tuple[TensorSpec, ...]:
        """Hidden states, amax, squares, the ranges if there are any, and what is made."""
        amax = TensorSpec("F32", (sum(linear_counts(params, inputs[2:])),))
        more = (*_squares(params, inputs), *_ranges(params, inputs), *made_specs(params, inputs))
        return inputs[1], amax, *more

    def steps(self, params: Mapping[str, Any], inputs: Sequence[TensorSpec]) -> int:
        """One for each sample."""
        return inputs[0].shape[0]

    def work(self, params: Mapping[str, Any], inputs: Sequence[TensorSpec]) -> Work:
        """One pass."""
        return pass_work(params, inputs)

    def memory(self, params: Mapping[str, Any], inputs: Sequence[TensorSpec]) -> int:
        """The layer, what one sample of full length needs inside it, and sums in float64."""
        sums = 3 * sum(spec.nbytes for spec in _squares(params, inputs))
        return layer_memory(params, inputs, self.workspace) + sums

    def run(
        self,
        params: Mapping[str, Any],
        inputs: Sequence[TensorFile],
        outputs: Sequence[TensorFile],
        progress: Callable[[], None],
    ) -> None:
        """Raises CheckpointError for NaN or infinity in what a linear is given.

        And BackendError for a linear of whose inputs nothing is known.
        """
        import numpy as np

        from carnice_build.calibration.layer_files import layer_name
        from carnice_build.calibration.layer_pass import run_layer

        specs = [file.spec for file in inputs]
        made = len(outputs) - len(made_specs(params, specs))
        ranges = made - len(_ranges(params, specs))
        squares = ranges - len(_squares(params, specs))
        weights, given = layer_inputs(params, inputs)
        seen = run_layer(
            params,
            samples(inputs[0]),
            inputs[1],
            weights,
            given,
            (outputs[0], *outputs[made:]),
            progress,
            self.first,
        )
        counts = linear_counts(params, [file.spec for file in weights])
        linears = list(map(numbered, params["linears"], counts))
        prefix = layer_name(params, weights)
        outputs[1].write(np.array(seen.largest(linears, prefix), np.float32))
        for entry, file, vectors in zip(
            linears, outputs[squares:ranges:2], outputs[squares + 1 : ranges : 2], strict=True
        ):
            _write_squares(seen, entry, file)
            vectors.write(np.array([seen.tokens[name] for name in entry], np.float32))
        for file in outputs[ranges:made]:
            file.write(np.array(seen.ranges, np.float32))
        for file in outputs[2:squares]:
            stack = next(name for name in params["linears"] if STACK in name)
            experts = numbered(stack, file.spec.size)
            file.write(np.array([seen.tokens.get(name, 0) for name in experts], np.int64))


class ForwardExperts(Forward):
    """`Forward` through a layer with stacks of experts.

    The third output, I64 [experts], says how many tokens each expert was sent.
    """

    name = "calibration.forward_experts"
    figures = frozenset({2})

    def infer(
        self, params: Mapping[str, Any], inputs: Sequence[TensorSpec]
    ) -> tuple[TensorSpec, ...]:
        """Hidden states, amax, counts, squares, the ranges if there are any, and what is made."""
        hidden, amax, *rest = super().infer(params, inputs)
        counts = TensorSpec("I64", (max(linear_counts(params, inputs[2:])),))
        return hidden, amax, counts, *rest


def _write_squares(seen: Seen, linears: Sequence[str], file: TensorFile) -> None:
    """The sums of `linears`, an expert after the other; what was given no vector stays zero."""
    import numpy as np

    sums = np.zeros((len(linears), file.spec.shape[-1]), np.float32)
    most = np.finfo(np.float32).max
    for row, linear in enumerate(linears):
        if linear in seen.squares:
            # The square of a number that float32 has may be none.
            sums[row] = np.minimum(seen.squares[linear].numpy(), most)
    file.write(sums.reshape(file.spec.shape))


def _squares(params: Mapping[str, Any], inputs: Sequence[TensorSpec]) -> list[TensorSpec]:
    """Of each of `linears` the sums by column, and how many vectors they are of."""
    named = dict(zip(params["names"], inputs[2:], strict=False))
    shapes = (named[f"{linear}.weight"].shape for linear in params["linears"])
    return [
        TensorSpec("F32", shape)
        for *experts, _, columns in shapes
        for shape in ((*experts, columns), (*experts,) or (1,))
    ]


def _ranges(params: Mapping[str, Any], inputs: Sequence[TensorSpec]) -> list[TensorSpec]:
    """Of the keys and values of each sample, where the layer caches its own."""
    samples = inputs[0].shape[0]
    return [TensorSpec("F32", (samples, 4))] if params.get("caches") else []


def layer_inputs(params: Mapping[str, Any], inputs: Sequence[T]) -> tuple[Sequence[T], Sequence[T]]:
    """Of what `Forward` reads: the layer's tensors, and what it is given beside hidden states."""
    end = 2 + len(params["names"])
    return inputs[2:end], inputs[end:]


def made_specs(params: Mapping[str, Any], inputs: Sequence[TensorSpec]) -> list[TensorSpec]:
    """What a layer makes for layers behind it."""
    return passed_specs(params["dtype"], inputs[0], params.get("made", ()))


def linear_counts(params: Mapping[str, Any], weights: Sequence[TensorSpec]) -> list[int]:
    """How many linears each entry of `linears` stands for: as many as there are experts, or one.

    `weights` are the tensors of `names`, and whatever comes behind them.
    """
    named = dict(zip(params["names"], weights, strict=False))
    return [
        named[f"{linear}.weight"].shape[0] if STACK in linear else 1 for linear in params["linears"]
    ]


def layer_memory(params: Mapping[str, Any], inputs: Sequence[TensorSpec], workspace: int) -> int:
    """Bytes for a layer beside what one sample needs inside it, `workspace`.

    `inputs` are tokens, hidden states, the layer's tensors, and what it is given of each sample.

    Fitted to `python -m benchmarks.calibration` on a CPU with torch 2.13 and transformers 5.17:
    1.05 to 1.25 times what was taken.
    """
    dtype = FLOAT_NAMES[params["dtype"]]
    tensors, given = layer_inputs(params, inputs)
    weights = sum(spec.nbytes for spec in tensors)
    passed = (*given, *made_specs(params, inputs))
    # What is cast is there twice, and so are stacks of experts, which transformers fuses.
    named = zip(params["names"], tensors, strict=True)
    twice = (spec for name, spec in named if spec.dtype != dtype or STACK in name)
    placed = sum(spec.size * ITEM_SIZE[dtype] for spec in twice)
    beside = 2 * sum(spec.row_bytes for spec in passed)
    return (128 << 20) + weights + placed + beside + workspace
