"""The ops that make ggml's blocks of weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from carnice_build.checkpoint.gguf_header import stored_spec
from carnice_build.checkpoint.gguf_types import TYPES
from carnice_build.dtypes import TensorSpec
from carnice_build.errors import PlanError
from carnice_build.formats.blame import require_floats
from carnice_build.graph import ArrayOp, BadElement, NonFiniteValue, TensorData, require_finite


class Quantize(ArrayOp):
    """A weight in blocks of a type of ggml, byte for byte as `ggml_quantize_chunk` makes them.

    Parameter `type`: one of `gguf_types.TYPES` that has blocks.
    Input: a weight [rows, columns] in F32, F16 or BF16.
    Output: U8 [rows, bytes of a row].
    """

    name = "gguf.quantize"
    version = 1
    libraries = ("numba",)
    rowwise = True

    def infer(
        self, params: Mapping[str, Any], inputs: Sequence[TensorSpec]
    ) -> tuple[TensorSpec, ...]:
        """The bytes of the rows; PlanError where whole blocks do not make up one."""
        spec = inputs[0]
        require_floats(spec)
        try:
            return (stored_spec(params["type"], spec.shape),)
        except ValueError as error:
            raise PlanError(str(error)) from None

    def apply(
        self, params: Mapping[str, Any], inputs: Sequence[TensorData], outputs: Sequence[TensorData]
    ) -> None:
        """Quantize rows; raises NonFiniteValue, and BadElement for what no block can hold."""
        from carnice_build.kernels.ggml import first_unsound

        kind, weight, made = params["type"], inputs[0], outputs[0].array
        importance = _importance(inputs[1]) if len(inputs) > 1 else None
        _, bad = self._quantize(kind, weight.array, importance, made)
        require_finite(bad)
        block = first_unsound(kind, made.reshape(-1, TYPES[kind].nbytes))
        if block >= 0:
            what = f"holds a number too large for the scale of a block of {kind}"
            raise BadElement(0, what, index=_largest(weight, block, TYPES[kind].elements))

    def _quantize(self, *arguments: Any) -> Any:
        """See `kernels.ggml.quantize`."""
        from carnice_build.kernels.ggml import quantize

        return quantize(*arguments)


def _largest(weight: TensorData, block: int, size: int) -> int:
    """The index of the number of largest magnitude in a block of so many."""
    import numpy as np

    from carnice_build.kernels.elementwise import widen

    some = weight.array.reshape(-1)[block * size : (block + 1) * size]
    return block * size + int(np.argmax(np.abs(widen(some, weight.dtype))))


def _importance(given: TensorData) -> Any:
    """Numbers that weigh; raises NonFiniteValue or BadElement, which tell of the second input."""
    import numpy as np

    from carnice_build.kernels.elementwise import non_finite_index

    bad = non_finite_index(given.array, given.dtype)
    if bad >= 0:
        raise NonFiniteValue(bad, 1)
    negative = given.array < 0
    if negative.any():
        raise BadElement(
            1, "says that a column counts less than nothing", index=int(np.argmax(negative))
        )
    return given.array


class QuantizeWeighted(Quantize):
    """The same with the importance of each column, F32 [columns], as the second input."""

    name = "gguf.quantize_weighted"
    rowwise = False

    def infer(
        self, params: Mapping[str, Any], inputs: Sequence[TensorSpec]
    ) -> tuple[TensorSpec, ...]:
        """The bytes of the rows; PlanError for importance of another width."""
        weight, importance = inputs
        if importance != TensorSpec("F32", weight.shape[-1:]):
            raise PlanError(
                f"cannot weigh {list(weight.shape)} by {importance.dtype} {list(importance.shape)}",
                expected=f"F32 {list(weight.shape[-1:])}",
            )
        return super().infer(params, inputs)


_GGML = ("libggml-python",)


class _ByGgml:
    """What makes an op ggml's own: all its types, slower than ours."""

    def _quantize(self, *arguments: Any) -> Any:
        from carnice_build.backends.ggml import quantize_with_ggml

        return quantize_with_ggml(*arguments)


class GgmlQuantize(_ByGgml, Quantize):
    """As `Quantize`, by the library."""

    name = "gguf.ggml_quantize"
    libraries = _GGML


class GgmlQuantizeWeighted(_ByGgml, QuantizeWeighted):
    """As `QuantizeWeighted`, by the library."""

    name = "gguf.ggml_quantize_weighted"
    libraries = _GGML
