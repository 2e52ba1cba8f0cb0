"""Ops of what llama.cpp computes once, or has in another order, and other engines do not."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from carnice_build.dtypes import WIDE_FLOATS, TensorSpec
from carnice_build.errors import PlanError
from carnice_build.graph import ArrayOp, BadElement, NonFiniteValue, TensorData, require_finite


class Values(ArrayOp):
    """A function of each number, computed in F16 where the tensor is of that type, else in F32.

    Parameter `how`: `add_one` (of a norm that stores w for a gain of 1 + w), or `negative_exp`
    (-e^x, of a decay whose logarithm is stored), or `softplus` (log(1 + e^x), of scales).  The
    output is F32.
    What a function rounds, it rounds to nearest; the converter's own e^x and log(1 + e^x)
    are those of torch's library, which differ in the last place of a few numbers, by machine.
    """

    name = "gguf.values"
    version = 1
    libraries = ("numpy",)
    rowwise = True

    def infer(
        self, params: Mapping[str, Any], inputs: Sequence[TensorSpec]
    ) -> tuple[TensorSpec, ...]:
        """One output of the input's shape."""
        (spec,) = inputs
        if spec.dtype not in WIDE_FLOATS:
            raise PlanError(f"cannot compute in {spec.dtype}", expected=" or ".join(WIDE_FLOATS))
        return (TensorSpec("F32", spec.shape),)

    def apply(
        self,
        params: Mapping[str, Any],
        inputs: Sequence[TensorData],
        outputs: Sequence[TensorData],
    ) -> None:
        """Fill the output; raises NonFiniteValue for such inputs and such results."""
        import numpy as np

        from carnice_build.kernels import elementwise

        (source,), (out,) = inputs, outputs
        require_finite(elementwise.non_finite_index(source.array, source.dtype))
        half = source.dtype == "F16"
        values = source.array if half else elementwise.widen(source.array, source.dtype)
        with np.errstate(over="ignore"):
            out.array[...] = _FUNCTIONS[params["how"]](values)
        index = elementwise.non_finite_index(out.array, "F32")
        if index >= 0:
            raise NonFiniteValue(index, None)


def _add_one(values: Any) -> Any:
    return values + values.dtype.type(1)


def _negative_exp(values: Any) -> Any:
    import numpy as np

    return -np.exp(values.astype(np.float64)).astype(values.dtype)


def _softplus(values: Any) -> Any:
    import numpy as np

    # In two steps, of which torch rounds the first one as well.
    powers = np.exp(values.astype(np.float64)).astype(np.float32)
    found = np.where(values > _LINEAR, values, np.log1p(powers.astype(np.float64)))
    return found.astype(values.dtype)


_LINEAR = 20
"""Above it softplus is its argument, in torch and in F32."""


_FUNCTIONS: Mapping[str, Callable[[Any], Any]] = {
    "add_one": _add_one,
    "negative_exp": _negative_exp,
    "softplus": _softplus,
}


class PackMxfp4(ArrayOp):
    """Blocks of MXFP4 as ggml has them, from those of a checkpoint; no value changes.

    Inputs are codes U8 [rows, groups, 16], of which a byte holds two neighbours, the first in its
    low half, and scales U8 [rows, groups].
    The output is U8 [rows, groups * 17]: of each group its scale, and bytes that hold a number of
    the first half of the group and, above it, that of the second half.
    """

    name = "gguf.pack_mxfp4"
    version = 1
    libraries = ("numpy",)
    rowwise = True

    def infer(
        self, params: Mapping[str, Any], inputs: Sequence[TensorSpec]
    ) -> tuple[TensorSpec, ...]:
        """One output; PlanError for other shapes."""
        blocks, scales = inputs
        rows, groups, size = blocks.shape
        if blocks.dtype != "U8" or size != _HALF or scales != TensorSpec("U8", (rows, groups)):
            raise PlanError(
                f"cannot pack codes {blocks.dtype} {list(blocks.shape)} with scales "
                f"{scales.dtype} {list(scales.shape)}",
                expected=f"U8 [rows, groups, {_HALF}] and U8 [rows, groups]",
            )
        return (TensorSpec("U8", (rows, groups * (1 + _HALF))),)

    def apply(
        self,
        params: Mapping[str, Any],
        inputs: Sequence[TensorData],
        outputs: Sequence[TensorData],
    ) -> None:
        """Fill the output; raises BadElement for a scale that is none."""
        import numpy as np

        (blocks, scales), (out,) = (item.array for item in inputs), outputs
        if (bad := scales == _NO_POWER).any():
            raise BadElement(1, "has a scale that is NaN", index=int(np.argmax(bad)))
        rows, groups, _ = blocks.shape
        numbers = np.stack((blocks & 0x0F, blocks >> 4), axis=-1).reshape(rows, groups, 2 * _HALF)
        made = out.array.reshape(rows, groups, 1 + _HALF)
        made[..., 0] = scales
        made[..., 1:] = numbers[..., :_HALF] | numbers[..., _HALF:] << 4


_NO_POWER = 0xFF
"""The scale in MXFP4 that is NaN."""

_HALF = 16
"""Half of a group of MXFP4, and bytes of its codes."""
