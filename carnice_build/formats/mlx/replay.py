"""The steps of a trace on arrays, bit for bit as mlx computes them.

mlx rounds every sum and product to its type at once: BF16 and F16 are computed in float32 and
rounded to nearest, ties to even.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from carnice_build.dtypes import NUMPY_NAME, WIDE_FLOATS
from carnice_build.formats.mlx.trace import Step, Steps, from_params
from carnice_build.graph import TensorData
from carnice_build.kernels.elementwise import narrow, widen

Array = NDArray[Any]


def replay(steps: Steps, sources: Sequence[TensorData]) -> TensorData:
    """What `steps` make of the sources; no copy where views will do."""
    values = list(sources)
    for step in steps:
        values.append(_apply(step, [values[index] for index in step.operands]))
    return values[-1] if steps else values[0]


def _apply(step: Step, inputs: Sequence[TensorData]) -> TensorData:
    if step.op in _MOVES:
        array = _MOVES[step.op]([item.array for item in inputs], *step.arguments)
        return TensorData(inputs[0].dtype, array)
    return _COMPUTED[step.op](inputs, *step.arguments)


def _slice(arrays: Sequence[Array], starts: Any, stops: Any, strides: Any) -> Array:
    return arrays[0][tuple(map(slice, starts, stops, strides))]


def _pad(arrays: Sequence[Array], low: Any, high: Any) -> Array:
    return np.pad(arrays[0], list(zip(low, high, strict=True)))


_MOVES: Mapping[str, Callable[..., Array]] = {
    "reshape": lambda arrays, shape: arrays[0].reshape(shape),
    "transpose": lambda arrays, axes: arrays[0].transpose(axes),
    "slice": _slice,
    "concatenate": lambda arrays, axis: np.concatenate(arrays, axis),
    "broadcast": lambda arrays, shape: np.broadcast_to(arrays[0], shape),
    "pad": _pad,
}
"""What leaves every element as it is."""


def _view(inputs: Sequence[TensorData], dtype: str) -> TensorData:
    array = np.ascontiguousarray(inputs[0].array)
    return TensorData(dtype, array.view(NUMPY_NAME[dtype]))


def _astype(inputs: Sequence[TensorData], dtype: str) -> TensorData:
    (source,) = inputs
    if dtype in WIDE_FLOATS:
        with np.errstate(over="ignore"):
            return TensorData(dtype, narrow(_wide(source), dtype))
    return TensorData(dtype, source.array.astype(NUMPY_NAME[dtype]))


def _wide(source: TensorData) -> NDArray[np.float32]:
    if source.dtype in WIDE_FLOATS:
        return widen(source.array, source.dtype)
    return source.array.astype(np.float32)


def _from_fp8(inputs: Sequence[TensorData], dtype: str) -> TensorData:
    return TensorData(dtype, _fp8_table(dtype)[inputs[0].array])


@cache
def _fp8_table(dtype: str) -> Array:
    """What each byte is as E4M3: a sign, four bits of exponent with bias 7, three of mantissa.

    There is no infinity; all bits of exponent and mantissa set is NaN.
    """
    codes = np.arange(256)
    exponent, mantissa = (codes >> 3) & 15, codes & 7
    values = np.where(
        exponent == 0, mantissa * 2.0**-9, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0)
    ).astype(np.float32)
    values[(codes & 127) == 127] = np.nan
    values = np.copysign(values, np.where(codes < 128, 1, -1).astype(np.float32))
    return narrow(values, dtype)


def _arithmetic(operation: Callable[..., Array]) -> Callable[..., TensorData]:
    def apply(inputs: Sequence[TensorData]) -> TensorData:
        dtype = inputs[0].dtype
        with np.errstate(all="ignore"):
            result = operation(*(_wide(item) for item in inputs))
            return TensorData(dtype, narrow(result, dtype))

    return apply


def _with_number(operation: Callable[..., Array]) -> Callable[..., TensorData]:
    def apply(inputs: Sequence[TensorData], value: float) -> TensorData:
        (source,) = inputs
        one = TensorData(source.dtype, narrow(np.full(1, value, np.float32), source.dtype))
        with np.errstate(all="ignore"):
            result = operation(_wide(source), _wide(one))
            return TensorData(source.dtype, narrow(result, source.dtype))

    return apply


def _negative(inputs: Sequence[TensorData]) -> TensorData:
    (source,) = inputs
    return TensorData(source.dtype, narrow(-_wide(source), source.dtype))


def _each(inputs: Sequence[TensorData], steps: Sequence[Any]) -> TensorData:
    inner = from_params(steps)
    made = [
        replay(inner, [TensorData(item.dtype, item.array[index]) for item in inputs])
        for index in range(inputs[0].array.shape[0])
    ]
    return TensorData(made[0].dtype, np.stack([item.array for item in made]))


_COMPUTED: Mapping[str, Callable[..., TensorData]] = {
    "view": _view,
    "astype": _astype,
    "from_fp8": _from_fp8,
    "add": _arithmetic(np.add),
    "subtract": _arithmetic(np.subtract),
    "multiply": _arithmetic(np.multiply),
    "add_number": _with_number(np.add),
    "subtract_number": _with_number(np.subtract),
    "multiply_number": _with_number(np.multiply),
    "negative": _negative,
    "each": _each,
}
