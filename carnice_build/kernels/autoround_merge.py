"""Put a fine-tune's weights on the grid of a base that is already quantized.

The base is given in the format of ``autoround``: per group a scale s and a zero point z, and for
each weight a code that tuning chose. Scales and zero points stay; what is made are new codes.
Write u = w / s + z for the real position of a weight among the codes, with ``base`` and ``tuned``
for the two weights and q for codes. There are two ways, and they minimise different errors:

``merge_reround`` minimises |w_tuned - s (q - z)|, the error of each weight by itself:
q = clip(rint(u_tuned)). Nothing of what the base's tuning learned about rounding remains.

``merge_delta`` minimises |(w_tuned - w_base) - s (q - q_base)|, the error of the difference:
q = clip(q_base + rint((w_tuned - w_base) / s)). Every error of the base, q_base - u_base, stays as
it was learned, and half a step at most is added to it. **A difference below half a step moves no
code**: if all are, the result is the base itself. ``changed`` says how many were not.

Tuning makes the errors of a layer's weights cancel in its output, and rerounding undoes that. So
the second way gives the smaller error of the output while differences are far below a step, and
the first once they are near it.

Functions work on blocks of rows as those of ``autoround`` do, with the same demands on arrays.
A group whose scale is 0 or not finite has no positions: ``merge_delta`` keeps its codes, and
``merge_reround`` gives it its zero point.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from . import _autoround_loops
from . import _merge_loops as loops
from ._floats import Array, first_non_finite, float_format, require
from .autoround import Packed, Scales, _group_size, _grouped, _require_format, _wide


class Merge(NamedTuple):
    """What merging a block of rows met.

    ``non_finite`` is -1, or the flat index in the block of the first NaN or Inf; the rest and
    the codes are then unspecified. ``clipped`` counts codes that would have been outside 0..15,
    ``changed`` those that differ from the base's.
    """

    non_finite: int
    clipped: int
    changed: int


class GridResidual(NamedTuple):
    """How far a weight lies from the codes that claim to stand for it, in steps.

    ``non_finite`` is -1, or the flat index in the block of the first NaN or Inf; the rest is then
    unspecified. ``largest`` is the largest distance, ``far`` counts distances above the limit,
    and ``unusable_groups`` the groups that were left out, their scale being 0 or not finite.
    """

    non_finite: int
    largest: float
    far: int
    unusable_groups: int


def merge_reround(
    weight: Array,
    dtype: str,
    first: int,
    base_qweight: Packed,
    qzeros: Packed,
    scales: Scales,
    qweight: Packed,
) -> Merge:
    """Round a block of rows, [n, in], to the nearest codes of the base's grid.

    ``base_qweight``, ``qzeros`` and ``scales`` are the base's whole tensors; columns of
    ``qweight``, shaped as ``base_qweight``, are written.
    """
    rows = _rows(weight, dtype, first, base_qweight, qzeros, scales)
    require("qweight", qweight, np.int32, base_qweight.shape)
    kind = _autoround_loops.KINDS[dtype]
    grid = base_qweight, qzeros, _wide(scales, first, len(rows))
    tile, clipped, changed = loops.reround(rows, kind, first, *grid, qweight)
    return Merge(_place(tile, dtype, rows), clipped, changed)


def merge_delta(
    weight: Array,
    base: Array,
    dtype: str,
    first: int,
    base_qweight: Packed,
    qzeros: Packed,
    scales: Scales,
    qweight: Packed,
) -> Merge:
    """Move the base's codes by the whole steps between ``base`` and ``weight``, both [n, in] of
    ``dtype``. The rest as ``merge_reround``; ``non_finite`` is about either weight."""
    rows = _rows(weight, dtype, first, base_qweight, qzeros, scales)
    if base.shape != weight.shape:
        raise ValueError(f"base is {list(base.shape)}, expected {list(weight.shape)}")
    base_rows = _rows(base, dtype, first, base_qweight, qzeros, scales)
    require("qweight", qweight, np.int32, base_qweight.shape)
    kind = _autoround_loops.KINDS[dtype]
    grid = base_qweight, _wide(scales, first, len(rows))
    tile, clipped, changed = loops.delta(rows, base_rows, kind, first, *grid, qweight)
    return Merge(_place(tile, dtype, rows, base_rows), clipped, changed)


def grid_residual(
    base: Array,
    dtype: str,
    first: int,
    qweight: Packed,
    qzeros: Packed,
    scales: Scales,
    tolerance: float,
) -> GridResidual:
    """The distances |clip(w / s + z, 0, 15) - q| of a block of rows, [n, in], from their codes.

    Learned rounding takes one of the two codes beside a weight, so a grid that was learned from
    this weight lies within about one step; ``far`` counts distances above 1 + ``tolerance``.
    The clip is for learned ranges: a weight beyond the range of its group is at its end.
    """
    rows = _rows(base, dtype, first, qweight, qzeros, scales)
    kind = _autoround_loops.KINDS[dtype]
    grid = qweight, qzeros, _wide(scales, first, len(rows))
    limit = np.float32(1 + tolerance)
    tile, largest, far, unusable = loops.residual(rows, kind, first, limit, *grid)
    return GridResidual(_place(tile, dtype, rows), float(largest), far, unusable)


def _rows(
    weight: Array, dtype: str, first: int, qweight: Packed, qzeros: Packed, scales: Scales
) -> Array:
    """The bit patterns of a weight's rows by groups of the grid, [n, groups, group_size]."""
    _, rows = _grouped("weight", weight, dtype, _group_size(weight.shape, scales.shape[::-1]))
    _require_format(rows.shape, first, qweight, qzeros, scales)
    return rows


def _place(tile: int, dtype: str, *blocks: Array) -> int:
    """The flat index of the first NaN or Inf in any of the blocks, from row ``tile`` on."""
    if tile < 0:
        return -1
    columns = int(blocks[0][0].size)
    form = float_format(dtype)
    found = [first_non_finite(rows[tile:], form) for rows in blocks]
    return tile * columns + min(index for index in found if index >= 0)
