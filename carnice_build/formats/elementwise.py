"""Op `elementwise`: add a constant in a tensor's own type, then cast; for small tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from carnice_build.dtypes import WIDE_FLOATS, TensorSpec
from carnice_build.errors import PlanError
from carnice_build.graph import ArrayOp, BadElement, TensorData, require_finite


class Elementwise(ArrayOp):
    """`cast(x + add)`, the sum rounded to the type of x first, as mlx and torch do.

    Parameters: `add` (a number, or None for no sum), `dtype` (of the output) and `nonfinite`
    (`refuse`, or `zero` to take NaN and infinity for 0).
    """

    name = "elementwise"
    version = 1
    libraries = ("numpy",)
    rowwise = True

    def infer(
        self, params: Mapping[str, Any], inputs: Sequence[TensorSpec]
    ) -> tuple[TensorSpec, ...]:
        """One output of the input's shape in `dtype`; both must be floats of 16 or 32 bits."""
        (spec,) = inputs
        for dtype in (spec.dtype, params["dtype"]):
            if dtype not in WIDE_FLOATS:
                raise PlanError(f"cannot compute in {dtype}", expected=" or ".join(WIDE_FLOATS))
        return (TensorSpec(params["dtype"], spec.shape),)

    def apply(
        self,
        params: Mapping[str, Any],
        inputs: Sequence[TensorData],
        outputs: Sequence[TensorData],
    ) -> None:
        """Fill the output; raises as `cast_finite`, unless NaN and infinity count as 0."""
        import numpy as np

        from carnice_build.kernels import elementwise

        source, out = inputs[0], outputs[0]
        if params["nonfinite"] == "zero":
            finite = elementwise.zero_non_finite(source.array, source.dtype)
            source = TensorData(source.dtype, finite)
        if params["add"] is not None:
            summed = np.empty_like(source.array)
            require_finite(
                elementwise.add_scalar(source.array, source.dtype, params["add"], summed)
            )
            source = TensorData(source.dtype, summed)
        cast_finite(source, out)


def cast_finite(source: TensorData, out: TensorData) -> None:
    """Fill `out` with the floats of `source`, in its own type.

    Raises NonFiniteValue for NaN or infinity, BadElement for a number that the type cannot hold.
    """
    from carnice_build.kernels import elementwise

    require_finite(elementwise.cast(source.array, source.dtype, out.dtype, out.array))
    beyond = elementwise.non_finite_index(out.array, out.dtype)
    if beyond >= 0:
        raise BadElement(0, f"holds a number beyond those of {out.dtype}", index=beyond)
