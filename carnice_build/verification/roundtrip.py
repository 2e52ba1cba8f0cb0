"""Check `round trip`: what the folder's numbers have lost against the source's.

A tensor that is not quantized must have the very bytes that the plan's own small ops (a cast,
norm + 1) give.  A quantized one is dequantized and every weight is held against the most that
its bits allow:

- A group spans R = max - min in top = 2^bits - 1 steps.  mlx then moves zero onto a step: with x
  steps between zero and the end of larger magnitude (x >= top/2), each becomes x / rint(x) as
  long, at most top / (top - 1).  Rounding to a step leaves at most half of one.
- Where that made steps shorter, the grid ends up to one step before the end of smaller magnitude:
  a weight at distance d from that end may be off by one step less d.
- Scale and bias are stored in 16 bits, and a weight of another type is cast first: for r, half a
  unit in the last place, that is at most 4 r max|w| (2 r max|w| for code times scale, r max|w|
  each for bias and cast).

A single weight further off cannot come from the quantizer.  The relative error of a module is
||dequantized - source|| / ||source||, about 0.3 steps in practice; the bound on it is that of its
weights in root mean square.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from carnice_build.checkpoint.dtypes import WIDE_FLOATS
from carnice_build.errors import CheckpointError
from carnice_build.graph import ActionOutput, NonFiniteValue, OutputTensor
from carnice_build.kernels.elementwise import zero_non_finite
from carnice_build.planning.planner import VariantPlan
from carnice_build.transforms.mlx import AffineQuantize
from carnice_build.verification.folder import ModelFolder
from carnice_build.verification.result import Check, judged, skipped
from carnice_build.verification.values import (
    AffineValues,
    Floats,
    Incomparable,
    as_float32,
    blocks,
    matrix,
    read_rows,
    ref_rows,
    square_sum,
)

NAME = "round trip"
WORST = 10

_HALF_PLACE = {"BF16": 2.0**-8, "F16": 2.0**-11, "F32": 2.0**-24}
_HALF_SMALLEST = {"BF16": 2.0**-134, "F16": 2.0**-25, "F32": 2.0**-150}
_SMALLEST_STEP = 1.5e-7
"""mlx takes no step below 1e-7; moving zero onto one makes it at most half as long again."""

_FLOAT32_SLACK = 1.001
"""The quantizer computes in float32, so a weight halfway between steps may go either way."""


@dataclass
class ModuleError:
    """How far a quantized module is from its source; `outside` counts weights beyond the bound.

    `error` is None when a dequantized weight is NaN or infinite.
    """

    module: str
    bits: int
    error: float | None
    bound: float
    outside: int


@dataclass(frozen=True)
class _Finding:
    problem: str | None = None
    module: ModuleError | None = None
    skipped: bool = False


def check_roundtrip(variant: VariantPlan, folder: ModelFolder, jobs: int) -> Check:
    """Compare every tensor of the folder with the source, module by module."""
    modules: dict[str, list[OutputTensor]] = {}
    for tensor in variant.conversion.tensors:
        modules.setdefault(tensor.fact.name, []).append(tensor)
    with ThreadPoolExecutor(jobs) as pool:
        found = list(pool.map(lambda tensors: _module(tensors, folder), modules.values()))
    errors = [item.module for item in found if item.module]
    plain = sum(1 for item in found if not item.module and not item.skipped)
    left_out = sum(item.skipped for item in found)
    if left_out == len(found):
        return skipped(NAME, "nothing in the folder can be compared with its source")
    worst = sorted(errors, key=_rank, reverse=True)[:WORST]
    summary = f"{len(errors)} quantized modules, {plain} tensors equal to their source"
    if worst:
        summary += f", largest relative error {_format(worst[0].error)} in {worst[0].module}"
    if left_out:
        summary += f"; {left_out} modules not compared"
    problems = [item.problem for item in found if item.problem]
    details = {
        "worst": [asdict(item) for item in worst],
        "modules": {item.module: item.error for item in errors},
        "equal": plain,
        "not_compared": left_out,
    }
    return judged(NAME, problems, summary, details)


def _module(tensors: Sequence[OutputTensor], folder: ModelFolder) -> _Finding:
    """Compare the tensors that stand for one source tensor."""
    for tensor in tensors:
        found = folder.tensors.get(tensor.name)
        if found is None or found.spec != tensor.ref.spec:
            # The structure check names it.
            return _Finding(skipped=True)
    origin = tensors[0].ref.origin
    try:
        if isinstance(origin, ActionOutput) and isinstance(origin.action.op, AffineQuantize):
            return _quantized(tensors, origin, folder)
        return _equal(tensors[0], folder)
    except Incomparable:
        return _Finding(skipped=True)
    except NonFiniteValue:
        return _Finding(f"the source of {tensors[0].name} holds NaN or infinity")
    except CheckpointError as error:
        return _Finding(f"{tensors[0].name} cannot be read: {error}")


def _equal(tensor: OutputTensor, folder: ModelFolder) -> _Finding:
    spec, found = tensor.ref.spec, folder.tensors[tensor.name]
    for start, stop in blocks(matrix(spec)):
        wanted = ref_rows(tensor.ref, start, stop).array
        if wanted.tobytes() != read_rows(found, spec, start, stop).array.tobytes():
            return _Finding(f"tensor {tensor.name} is not equal to its source")
    return _Finding()


def _quantized(
    tensors: Sequence[OutputTensor], origin: ActionOutput, folder: ModelFolder
) -> _Finding:
    module = tensors[0].name.rpartition(".")[0]
    params = origin.action.params
    (source,) = origin.action.inputs
    values = AffineValues(folder.tensors, module, params)
    total = _Sums()
    for start, stop in blocks(values.shape):
        data = ref_rows(source, start, stop)
        if params["nonfinite"] == "zero" and data.dtype in WIDE_FLOATS:
            data = type(data)(data.dtype, zero_non_finite(data.array, data.dtype))
        total.add(as_float32(data), values.rows(start, stop), params)
    error = total.result(module, params["bits"])
    return _Finding(_problem(error), error)


def _rank(item: ModuleError) -> float:
    return math.inf if item.error is None else item.error


def _format(error: float | None) -> str:
    return "not finite" if error is None else f"{error:.4f}"


def _problem(error: ModuleError) -> str | None:
    if error.outside:
        return (
            f"module {error.module}: {error.outside} weights are further from their source than "
            f"{error.bits} bits allow; relative error {_format(error.error)}, "
            f"bound {error.bound:.4f}"
        )
    return None


class _Sums:
    """Sums of squares over the blocks of a module."""

    def __init__(self) -> None:
        self._error = self._norm = self._bound = 0.0
        self._outside = 0

    def add(self, source: Floats, values: Floats, params: Any) -> None:
        groups = source.reshape(-1, params["group_size"])
        off = np.abs(values.reshape(groups.shape) - groups)
        allowed = allowance(groups, params["bits"], params["dtype"])
        # Written so that NaN counts as outside.
        self._outside += int(groups.size - np.count_nonzero(off <= allowed))
        self._error += square_sum(off)
        self._norm += square_sum(groups)
        self._bound += square_sum(allowed)

    def result(self, module: str, bits: int) -> ModuleError:
        def relative(squares: float) -> float:
            return float((squares / self._norm) ** 0.5) if self._norm else float(squares > 0)

        error = relative(self._error) if math.isfinite(self._error) else None
        return ModuleError(module, bits, error, relative(self._bound), self._outside)


def allowance(groups: Floats, bits: int, dtype: str) -> Floats:
    """The most that each weight of `groups` [n, group size] may be off; see the module's text."""
    top = float(2**bits - 1)
    low, high = groups.min(axis=1), groups.max(axis=1)
    low_is_edge = np.abs(low) > np.abs(high)
    far = np.where(low_is_edge, high, low)
    largest = np.where(low_is_edge, -low, np.abs(high))
    step = np.maximum((high - low) / (top - 1), _SMALLEST_STEP) * _FLOAT32_SLACK
    rounding = 4 * _HALF_PLACE[dtype] * largest + (top + 1) * _HALF_SMALLEST[dtype]
    allowed: Floats = np.abs(groups - far[:, None])
    np.subtract(step[:, None], allowed, out=allowed)
    np.maximum(allowed, step[:, None] / 2, out=allowed)
    allowed += rounding[:, None]
    return allowed
