"""Ops on weights in auto-round's INT4 format: rounding to nearest, and merging onto a grid.

A weight [rows, columns] becomes `qweight` I32 [columns / 8, rows], `qzeros` I32 [columns / group,
rows / 8] and `scales` F16 [columns / group, rows]; see `kernels.autoround`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from carnice_build.dtypes import TensorSpec
from carnice_build.errors import PlanError
from carnice_build.formats.blame import require_floats, uneven
from carnice_build.graph import ArrayOp, BadInput, NonFiniteValue, TensorData

SUFFIXES = ("qweight", "qzeros", "scales")
"""The tensors that a weight becomes, by the end of their names, in the order of outputs."""

_NEAR = 0.02
"""Steps beyond one that the weight of a grid's own base may lie from its code.

AutoRound adds a learned offset of half a step at most before it rounds, so code and weight are
within one step of each other, clipped ranges included: clipping moves both.
What remains is arithmetic.  With a range of 8 steps, a quotient in BF16 is off by 8 * 2^-9 and a
scale stored in F16 by 8 * 2^-11, together 0.0196.
"""


def packed_specs(spec: TensorSpec, group_size: int) -> tuple[TensorSpec, ...]:
    """Specs of qweight, qzeros and scales; PlanError when the weight does not fit the format."""
    require_floats(spec)
    if why := unfit(spec, group_size):
        raise PlanError(why)
    rows, columns = spec.shape
    groups = columns // group_size
    return (
        TensorSpec("I32", (columns // 8, rows)),
        TensorSpec("I32", (groups, rows // 8)),
        TensorSpec("F16", (groups, rows)),
    )


def unfit(spec: TensorSpec, group_size: int) -> str:
    """What of the shape of a weight does not fit the format, if anything."""
    rows, columns = spec.shape
    if why := uneven(columns, group_size):
        return why
    return f"8 does not divide the {rows} outputs" if rows % 8 else ""


class Nearest(ArrayOp):
    """Symmetric INT4, each weight rounded to nearest: auto-round without a single iteration.

    Input: a weight.  Outputs: qweight, qzeros and scales.  Parameter: `group_size`.
    """

    name = "autoround.nearest"
    version = 1
    libraries = ("numba",)
    transposed = True

    def infer(
        self, params: Mapping[str, Any], inputs: Sequence[TensorSpec]
    ) -> tuple[TensorSpec, ...]:
        """See `packed_specs`."""
        (spec,) = inputs
        return packed_specs(spec, params["group_size"])

    def apply(
        self, params: Mapping[str, Any], inputs: Sequence[TensorData], outputs: Sequence[TensorData]
    ) -> None:
        """Quantize; raises NonFiniteValue, and BadInput for a weight whose scale is too large."""
        self.apply_rows(params, 0, inputs[0], outputs)

    def apply_rows(
        self,
        params: Mapping[str, Any],
        first: int,
        rows: TensorData,
        outputs: Sequence[TensorData],
    ) -> None:
        """Quantize some rows, which are columns of the outputs."""
        from carnice_build.kernels.autoround import LARGEST, quantize_rtn
        from carnice_build.kernels.elementwise import non_finite_index

        arrays = [output.array for output in outputs]
        bad_index = quantize_rtn(rows.array, rows.dtype, params["group_size"], first, *arrays)
        if bad_index < 0:
            return
        if non_finite_index(rows.array.reshape(-1)[bad_index : bad_index + 1], rows.dtype) >= 0:
            raise NonFiniteValue(bad_index)
        raise BadInput(
            0,
            "holds a number so large that the scale of its group does not fit F16",
            expected=f"weights below {LARGEST:.0f}, or this one among `keep`",
            index=bad_index,
        )


class Merge(ArrayOp):
    """A fine-tune's weight on the grid of its quantized base; `kernels.autoround_merge` says how.

    Inputs: the weight, the base's weight, and the base's qweight, qzeros and scales.
    Outputs: qweight; clipped I64 [], the codes that would have left the grid's range.
    Parameters: `rounding`, `delta` or `nearest`, and `group_size`.
    A weight that equals the base's keeps the base's codes, and nothing is computed.
    """

    name = "autoround.merge"
    version = 1
    libraries = ("numba",)
    figures = frozenset({1})

    def infer(
        self, params: Mapping[str, Any], inputs: Sequence[TensorSpec]
    ) -> tuple[TensorSpec, ...]:
        """The new codes, and how many were clipped."""
        weight, base, *grid = inputs
        if base != weight:
            raise PlanError(
                f"the grid's base is {base.dtype} {list(base.shape)}",
                expected=f"{weight.dtype} {list(weight.shape)}",
            )
        expected = packed_specs(weight, params["group_size"])
        for suffix, spec, wanted in zip(SUFFIXES, grid, expected, strict=True):
            if spec != wanted:
                raise PlanError(
                    f"{suffix} of the grid is {spec.dtype} {list(spec.shape)}",
                    expected=f"{wanted.dtype} {list(wanted.shape)}",
                )
        return expected[0], TensorSpec("I64", ())

    def passes(self, digests: Sequence[str]) -> Sequence[int | None] | None:
        """The grid's own codes, none clipped, for a weight that the fine-tune left alone."""
        return (2, None) if digests[0] == digests[1] else None

    def check(self, params: Mapping[str, Any], inputs: Sequence[TensorData]) -> None:
        """Raises BadInput for a base or a grid that does not fit the other."""
        _, base, codes, zeros, scales = (item.array for item in inputs)
        _check_grid(base, inputs[1].dtype, codes, zeros, scales)

    def apply(
        self, params: Mapping[str, Any], inputs: Sequence[TensorData], outputs: Sequence[TensorData]
    ) -> None:
        """Merge, after `check`."""
        from carnice_build.kernels.autoround_merge import merge_delta, merge_reround

        self.check(params, inputs)
        weight, base, codes, zeros, scales = (item.array for item in inputs)
        dtype, out = inputs[0].dtype, outputs[0].array
        if params["rounding"] == "delta":
            merged = merge_delta(weight, base, dtype, 0, codes, zeros, scales, out)
        else:
            merged = merge_reround(weight, dtype, 0, codes, zeros, scales, out)
        if merged.non_finite >= 0:
            raise NonFiniteValue(merged.non_finite)
        outputs[1].array[...] = merged.clipped


def _check_grid(base: Any, dtype: str, codes: Any, zeros: Any, scales: Any) -> None:
    """Refuse a grid that was not made from this base, or that stands for nothing."""
    from carnice_build.kernels.autoround import SYMMETRIC_ZEROS
    from carnice_build.kernels.autoround_merge import grid_residual

    found = grid_residual(base, dtype, 0, codes, zeros, scales, _NEAR)
    if found.non_finite >= 0:
        raise NonFiniteValue(found.non_finite, operand=1)
    if found.unusable_groups:
        raise BadInput(4, f"has {found.unusable_groups} scales that are zero or not finite")
    if (zeros != SYMMETRIC_ZEROS).any():
        raise BadInput(3, "has zero points other than 8", expected="a symmetric grid")
    if found.far:
        raise BadInput(
            1,
            f"is not what the grid was made from: {found.far} of its {base.size} weights are "
            f"further than a step from their codes, up to {found.largest:.2f} steps",
            expected="the checkpoint that the grid's source quantizes",
        )
