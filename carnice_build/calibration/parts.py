"""Ops of a calibration in parts: samples cut into some chains, and what these find, put together.

tokens -> cut -> for each part: a chain of its own -> for each layer: combine(what the parts found)

A sample passes through a layer alone, so the largest of the parts' maxima is that of all samples,
bit for bit, and so is a sum of counts: what reads either has the key that it has without parts.
Sums of squares are added in the order of the parts, and may differ from one chain's in last bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from carnice_build.dtypes import TensorSpec
from carnice_build.graph import ArrayOp, BadInput, NonFiniteValue, ProcessOp, TensorData
from carnice_build.tensor_file import TensorFile


def shares(samples: int, parts: int) -> list[int]:
    """How many samples each part has; they differ by one at most, and the first have more."""
    least, more = divmod(samples, parts)
    return [least + (part < more) for part in range(parts)]


class Cut(ProcessOp):
    """The samples of each part, which are in the order of all.

    Input: tokens I32 [samples, length].  Outputs: I32 [size, length] for each of `sizes`.
    What a part is follows from its tokens alone, not from how many other parts there are.
    All chains wait for it, so it is one of the ops whose jobs go first.
    """

    name = "calibration.cut"
    version = 1
    libraries = ("numpy",)

    def infer(
        self, params: Mapping[str, Any], inputs: Sequence[TensorSpec]
    ) -> tuple[TensorSpec, ...]:
        """One a part."""
        (tokens,) = inputs
        return tuple(
            TensorSpec(tokens.dtype, (size, *tokens.shape[1:])) for size in params["sizes"]
        )

    def memory(self, params: Mapping[str, Any], inputs: Sequence[TensorSpec]) -> int:
        """The tokens."""
        return inputs[0].nbytes

    def run(
        self,
        params: Mapping[str, Any],
        inputs: Sequence[TensorFile],
        outputs: Sequence[TensorFile],
        progress: Callable[[], None],
    ) -> None:
        """Copy whole rows."""
        tokens, first = inputs[0].read(), 0
        for size, output in zip(params["sizes"], outputs, strict=True):
            output.write(tokens[first : first + size])
            first += size


class Combine(ArrayOp):
    """The largest inputs of linears over all samples, from those over the samples of each part.

    Inputs: for each part, what is kept of `Forward`: amax F32 [linears].
    Output: amax F32 [linears].
    """

    name = "calibration.combine"
    version = 1
    libraries = ("numpy",)

    def infer(
        self, params: Mapping[str, Any], inputs: Sequence[TensorSpec]
    ) -> tuple[TensorSpec, ...]:
        """As each part's."""
        return (inputs[0],)

    def apply(
        self, params: Mapping[str, Any], inputs: Sequence[TensorData], outputs: Sequence[TensorData]
    ) -> None:
        """Fill the output; raises NonFiniteValue, and BadInput for what is no magnitude."""
        self._combine_amax(range(len(inputs)), inputs, outputs[0])

    def _combine_amax(
        self, operands: Sequence[int], inputs: Sequence[TensorData], output: TensorData
    ) -> None:
        """Of inputs number `operands`."""
        import numpy as np

        from carnice_build.kernels.elementwise import non_finite_index

        output.array[...] = 0
        for operand in operands:
            amax = inputs[operand]
            bad_index = non_finite_index(amax.array, amax.dtype)
            if bad_index >= 0:
                raise NonFiniteValue(bad_index, operand)
            # A zero with a sign is none either, and which of two zeros is larger nobody says.
            if np.signbit(amax.array).any():
                raise BadInput(operand, "was given a negative magnitude")
            np.maximum(output.array, amax.array, out=output.array)


class Join(ArrayOp):
    """The ranges of keys and values of all samples, from those of the samples of each part.

    Inputs: for each part, F32 [size, 4] of `Forward`.  Output: F32 [samples, 4], in their order.
    """

    name = "calibration.join"
    version = 1
    libraries = ("numpy",)

    def infer(
        self, params: Mapping[str, Any], inputs: Sequence[TensorSpec]
    ) -> tuple[TensorSpec, ...]:
        """All rows."""
        rows = sum(spec.shape[0] for spec in inputs)
        return (TensorSpec(inputs[0].dtype, (rows, *inputs[0].shape[1:])),)

    def apply(
        self, params: Mapping[str, Any], inputs: Sequence[TensorData], outputs: Sequence[TensorData]
    ) -> None:
        """Put them one below the other; raises NonFiniteValue, with the part's number."""
        import numpy as np

        from carnice_build.kernels.elementwise import non_finite_index

        for number, part in enumerate(inputs):
            bad_index = non_finite_index(part.array, part.dtype)
            if bad_index >= 0:
                raise NonFiniteValue(bad_index, number)
        np.concatenate([part.array for part in inputs], out=outputs[0].array)


class Total(ArrayOp):
    """Sums over all samples, from those over the samples of each part, added in their order.

    Inputs: for each part F32 of one shape.  Output: F32 of that shape, rounded once.
    """

    name = "calibration.total"
    version = 1
    libraries = ("numpy",)

    def infer(
        self, params: Mapping[str, Any], inputs: Sequence[TensorSpec]
    ) -> tuple[TensorSpec, ...]:
        """As each part's."""
        return (inputs[0],)

    def apply(
        self, params: Mapping[str, Any], inputs: Sequence[TensorData], outputs: Sequence[TensorData]
    ) -> None:
        """Fill the output; raises NonFiniteValue, with the part's number."""
        import numpy as np

        from carnice_build.kernels.elementwise import non_finite_index

        total = np.zeros(outputs[0].array.shape, np.float64)
        for number, part in enumerate(inputs):
            bad_index = non_finite_index(part.array, part.dtype)
            if bad_index >= 0:
                raise NonFiniteValue(bad_index, number)
            total += part.array
        outputs[0].array[...] = np.minimum(total, np.finfo(np.float32).max)


class CombineExperts(Combine):
    """`Combine` of a layer with stacks of experts.

    Inputs: for each part, what is kept of `ForwardExperts`: amax F32 [linears], and how many tokens
    each expert was sent, I64 [experts].
    Outputs: amax F32 [linears], and the sums of the counts, I64 [experts].
    """

    name = "calibration.combine_experts"
    figures = frozenset({1})

    def infer(
        self, params: Mapping[str, Any], inputs: Sequence[TensorSpec]
    ) -> tuple[TensorSpec, ...]:
        """As each part's."""
        return (inputs[0], inputs[1])

    def apply(
        self, params: Mapping[str, Any], inputs: Sequence[TensorData], outputs: Sequence[TensorData]
    ) -> None:
        """Fill the outputs; raises NonFiniteValue, and BadInput for what is no magnitude."""
        self._combine_amax(range(0, len(inputs), 2), inputs, outputs[0])
        outputs[1].array[...] = sum(counts.array for counts in inputs[1::2])
