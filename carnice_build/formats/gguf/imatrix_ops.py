"""Ops of importance matrices: how much each column of a weight counts, from sums of squares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

from carnice_build.dtypes import TensorSpec
from carnice_build.errors import PlanError
from carnice_build.graph import (
    ArrayOp,
    BadElement,
    NonFiniteValue,
    TensorData,
    require_finite,
)

_MOST = 2.0**53
"""Vectors that a count may tell of: more is no count, and no longer a whole number."""


class Importance(ArrayOp):
    """The mean square of each column's inputs, as llama-quantize makes it of an imatrix.

    Inputs: sums of squares, F32 of any shape; how many vectors they are of, F32, a number for each
    of as many equal parts of the sums.  The second is not there for files of the old form, which
    have one count for all.
    Output: F32 of the first input's shape; 1 where nothing was counted.
    Parameter: `calls`, the count where there is no second input, else None; none of 0 divides.
    """

    name = "imatrix.importance"
    version = 1
    libraries = ("numpy",)

    def infer(
        self, params: Mapping[str, Any], inputs: Sequence[TensorSpec]
    ) -> tuple[TensorSpec, ...]:
        """As the sums; PlanError for counts that do not divide them."""
        sums, *counts = inputs
        if counts and (not counts[0].size or sums.size % counts[0].size):
            raise PlanError(f"cannot divide {sums.size} sums by {counts[0].size} counts")
        return (sums,)

    def apply(
        self, params: Mapping[str, Any], inputs: Sequence[TensorData], outputs: Sequence[TensorData]
    ) -> None:
        """Fill the output; raises NonFiniteValue, and BadElement for what is no sum of squares."""
        import numpy as np

        from carnice_build.kernels.elementwise import non_finite_index

        for operand, item in enumerate(inputs):
            bad_index = non_finite_index(item.array, item.dtype)
            if bad_index >= 0:
                raise NonFiniteValue(bad_index, operand)
        sums, *counted = (item.array.reshape(-1) for item in inputs)
        if (sums < 0).any():
            raise BadElement(0, "has a negative sum of squares", index=int(np.argmax(sums < 0)))
        if not counted:
            calls = np.float32(max(params["calls"], 1))
            outputs[0].array[...] = (sums / calls).reshape(outputs[0].array.shape)
            return
        (counts,) = counted
        if (beyond := np.abs(counts) > _MOST).any():
            what = "has a count of more vectors than there are"
            raise BadElement(1, what, index=int(np.argmax(beyond)))
        # Halves are rounded away from zero, and only what is above zero was counted.
        whole = np.floor(counts.astype(np.float64) + 0.5).astype(np.float32)
        parts = sums.reshape(len(whole), -1)
        means = parts / np.where(whole > 0, whole, 1)[:, None]
        means[whole <= 0] = 1
        outputs[0].array[...] = means.reshape(outputs[0].array.shape)


class ColumnOrder(ArrayOp):
    """Numbers of columns in the order in which a GGUF file has these.

    Input: F32 [..., columns].  Output: as the input.
    Parameters: `split`, whose product is `columns`, and `order`, the axes of `split` as they are to
    follow one another.
    """

    name = "imatrix.columns"
    version = 1
    libraries = ("numpy",)
    rowwise = True

    def infer(
        self, params: Mapping[str, Any], inputs: Sequence[TensorSpec]
    ) -> tuple[TensorSpec, ...]:
        """As the input; PlanError for a split that does not fit."""
        columns, split = inputs[0].shape[-1], params["split"]
        if prod(split) != columns or sorted(params["order"]) != [*range(len(split))]:
            raise PlanError(f"cannot split {columns} columns into {split}")
        return (inputs[0],)

    def apply(
        self, params: Mapping[str, Any], inputs: Sequence[TensorData], outputs: Sequence[TensorData]
    ) -> None:
        """Fill the output; raises NonFiniteValue."""
        from carnice_build.kernels.elementwise import non_finite_index

        require_finite(non_finite_index(inputs[0].array, inputs[0].dtype))
        outer = inputs[0].array.shape[:-1]
        split = inputs[0].array.reshape(*outer, *params["split"])
        axes = (*range(len(outer)), *(len(outer) + axis for axis in params["order"]))
        outputs[0].array[...] = split.transpose(axes).reshape(outputs[0].array.shape)
