"""The numbers that tensors stand for, read a block of rows at a time so that memory stays bounded.

A tensor counts as a matrix of its first axis against all others.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from carnice_build.dtypes import NUMPY_NAME, WIDE_FLOATS, TensorSpec
from carnice_build.graph import ArrayOp, NonFiniteValue, TensorData, TensorRef
from carnice_build.kernels import elementwise
from carnice_build.tensors import SourceTensor

_BLOCK_ELEMENTS = 1 << 18
"""A megabyte of float32: the arrays of a block stay in the second-level cache."""

Floats = NDArray[np.float32]

HALF_PLACE = {"BF16": 2.0**-8, "F16": 2.0**-11, "F32": 2.0**-24}
"""By the type of a float, the most that rounding to it moves a number, as a share of the number."""

HALF_SMALLEST = {"BF16": 2.0**-134, "F16": 2.0**-25, "F32": 2.0**-150}
"""The same for numbers too small for that: half of the smallest that the type holds."""


class Incomparable(Exception):
    """The bytes cannot be had row by row, or are no floats."""


class Values(Protocol):
    """A matrix of numbers, however it is stored."""

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""

    def rows(self, start: int, stop: int) -> Floats:
        """The rows from `start` to `stop`, in float32."""


def matrix(spec: TensorSpec) -> tuple[int, int]:
    """Rows and columns of a tensor seen as a matrix."""
    rows = spec.shape[0] if spec.shape else 1
    return rows, prod(spec.shape[1:])


def blocks(shape: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """Ranges of rows that cover the matrix, each small enough to work on in cache."""
    rows, columns = shape
    step = max(1, _BLOCK_ELEMENTS // max(1, columns))
    return ((start, min(start + step, rows)) for start in range(0, rows, step))


def read_rows(tensor: SourceTensor, spec: TensorSpec, start: int, stop: int) -> TensorData:
    """Rows of a tensor on disk, seen in the shape of `spec`, as a matrix."""
    assert tensor.file is not None
    _, columns = matrix(spec)
    buffer = np.empty((stop - start, columns), NUMPY_NAME[spec.dtype])
    offset = tensor.offset + start * spec.row_bytes
    tensor.file.read_into(offset, buffer.view(np.uint8).reshape(-1).data)
    return TensorData(spec.dtype, buffer)


def ref_rows(ref: TensorRef, start: int, stop: int) -> TensorData:
    """Rows of a planned tensor, made from the source by the plan's own row-wise ops."""
    origin = ref.origin
    if isinstance(origin, SourceTensor):
        return read_rows(origin, ref.spec, start, stop)
    action = origin.action
    made = action.outputs[origin.index]
    op = action.op
    if not isinstance(op, ArrayOp) or not op.rowwise or matrix(made) != matrix(ref.spec):
        raise Incomparable(f"{op.name} does not work row by row")
    inputs = [
        _shaped(ref_rows(item, start, stop), (stop - start, *item.spec.shape[1:]))
        for item in action.inputs
    ]
    outputs = [
        TensorData(spec.dtype, np.empty((stop - start, *spec.shape[1:]), NUMPY_NAME[spec.dtype]))
        for spec in action.outputs
    ]
    op.apply(action.params, inputs, outputs)
    return _shaped(outputs[origin.index], (stop - start, matrix(made)[1]))


def _shaped(data: TensorData, shape: tuple[int, ...]) -> TensorData:
    return TensorData(data.dtype, data.array.reshape(shape))


def as_float32(data: TensorData) -> Floats:
    """The same values in float32; Incomparable for other types, NonFiniteValue for NaN or Inf."""
    if data.dtype not in WIDE_FLOATS:
        raise Incomparable(f"{data.dtype} is not a float of 16 or 32 bits")
    out = np.empty(data.array.shape, np.float32)
    bad_index = elementwise.cast(data.array, data.dtype, "F32", out)
    if bad_index >= 0:
        raise NonFiniteValue(bad_index)
    return out


class PlainValues:
    """A tensor of floats."""

    def __init__(self, tensor: SourceTensor) -> None:
        """`tensor` may be of any dtype; `rows` raises Incomparable when it is not a float."""
        self._tensor = tensor
        self.shape = matrix(tensor.spec)

    def rows(self, start: int, stop: int) -> Floats:
        """The rows from `start` to `stop`."""
        return as_float32(read_rows(self._tensor, self._tensor.spec, start, stop))


class Joined:
    """The rows of several matrices end to end."""

    def __init__(self, parts: Sequence[Values]) -> None:
        """`parts` are one at least; Incomparable unless all are of one shape."""
        if len({part.shape for part in parts}) > 1:
            raise Incomparable("matrices of several shapes")
        self._parts = parts
        self._rows, columns = parts[0].shape
        self.shape = len(parts) * self._rows, columns

    def rows(self, start: int, stop: int) -> Floats:
        """The rows from `start` to `stop`, of as many of the matrices as they lie in."""
        found = []
        while start < stop:
            index, first = divmod(start, self._rows)
            count = min(stop - start, self._rows - first)
            found.append(self._parts[index].rows(first, first + count))
            start += count
        return found[0] if len(found) == 1 else np.concatenate(found)


def squared_sums(a: Values, b: Values) -> tuple[float, float]:
    """Sums of squares of b - a and of a; Incomparable when their shapes differ."""
    if a.shape != b.shape:
        raise Incomparable(f"{a.shape} against {b.shape}")
    difference = norm = 0.0
    for start, stop in blocks(a.shape):
        first = a.rows(start, stop)
        difference += square_sum(b.rows(start, stop) - first)
        norm += square_sum(first)
    return difference, norm


def square_sum(values: Floats) -> float:
    """The sum of squares of a block, short enough to be taken in float32."""
    flat = values.reshape(-1)
    return float(np.dot(flat, flat))


def read_scale(tensors: Mapping[str, SourceTensor], name: str) -> float:
    """A stored scale; Incomparable when there is none, or it is no positive number."""
    tensor = tensors.get(name)
    if tensor is None or tensor.spec.size != 1 or tensor.spec.dtype not in WIDE_FLOATS:
        raise Incomparable(f"{name} is no number")
    data = read_rows(tensor, TensorSpec(tensor.spec.dtype, (1, 1)), 0, 1)
    value = float(as_float32(data)[0, 0])
    if not 0 < value < math.inf:
        raise Incomparable(f"{name} is no positive number")
    return value
