"""Check `round trip`: what the folder's numbers have lost against the source's.

A tensor that is not quantized must have the very bytes that the plan's own small ops (a cast,
norm + 1) give.
A quantized one is dequantized, and every weight is held against the most that its bits allow,
as the format's `checks` derive it: a weight further off cannot come from the quantizer.
The relative error of a module is ||dequantized - source|| / ||source||; the bound on it is that of
its weights in root mean square.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from math import prod

import numpy as np

from carnice_build.dtypes import TensorSpec
from carnice_build.errors import CheckpointError
from carnice_build.formats.base import OutputTensor
from carnice_build.formats.checks import FormatChecks, QuantizedValues
from carnice_build.formats.folder import ModelFolder
from carnice_build.formats.values import (
    Floats,
    Incomparable,
    as_float32,
    blocks,
    matrix,
    read_rows,
    ref_rows,
    square_sum,
)
from carnice_build.graph import NonFiniteValue
from carnice_build.planning.planner import VariantPlan
from carnice_build.tensors import STACK, SourceTensor, numbered
from carnice_build.units import plural
from carnice_build.verification.result import Check, judged, skipped

NAME = "round trip"
WORST = 10


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
class KindErrors:
    """The modules of one kind together: `error` in root mean square, and that of the worst."""

    kind: str
    modules: int
    error: float | None
    largest: float | None


_REASONS = 2
"""Of modules that are not compared, so many say why."""


@dataclass(frozen=True)
class _Finding:
    problem: str | None = None
    module: ModuleError | None = None
    skipped: str = ""
    """Why it was not compared, if it was not."""


def check_roundtrip(
    variant: VariantPlan, folder: ModelFolder, checks: FormatChecks, jobs: int
) -> Check:
    """Compare every tensor of the folder with the source, module by module."""
    comparison = _Comparison(variant, folder, checks)
    modules: dict[tuple[str, str], list[OutputTensor]] = {}
    for tensor in variant.conversion.tensors:
        # One source may become two modules, each with its own scales.
        path = tensor.name.rpartition(".")[0]
        modules.setdefault((tensor.fact.name, path), []).append(tensor)
    paths = {path for _, path in modules}
    joined = {f"{module}.weight": module for module in comparison.quantized if module not in paths}
    groups = [tensors for (name, _), tensors in modules.items() if name not in joined]
    with ThreadPoolExecutor(jobs) as pool:
        found = list(pool.map(comparison.module, groups))
        found += pool.map(comparison.joined, joined.values())
    errors = [item.module for item in found if item.module]
    plain = sum(1 for item in found if not item.module and not item.skipped)
    reasons = [item.skipped for item in found if item.skipped]
    left_out = len(reasons)
    if left_out == len(found):
        return skipped(NAME, "nothing in the folder can be compared with its source")
    worst = sorted(errors, key=_rank, reverse=True)[:WORST]
    summary = f"{len(errors)} quantized modules, {plain} tensors equal to their source"
    if worst:
        summary += f", largest relative error {_format(worst[0].error)} in {worst[0].module}"
    if left_out:
        why = ", ".join([*dict.fromkeys(reasons)][:_REASONS])
        summary += f"; {plural(left_out, 'module')} not compared: {why}"
    problems = [item.problem for item in found if item.problem]
    details = {
        "worst": [asdict(item) for item in worst],
        "kinds": [asdict(item) for item in _by_kind(errors, variant)],
        "modules": {item.module: item.error for item in errors},
        "equal": plain,
        "not_compared": left_out,
    }
    return judged(NAME, problems, summary, details)


def _by_kind(errors: Sequence[ModuleError], variant: VariantPlan) -> list[KindErrors]:
    kinds: dict[str, list[float | None]] = {}
    for item in errors:
        kinds.setdefault(variant.architecture.module_kind(item.module), []).append(item.error)
    found = []
    for kind, values in kinds.items():
        finite = [value for value in values if value is not None]
        mean = math.hypot(*finite) / len(finite) ** 0.5 if len(finite) == len(values) else None
        largest = max(finite) if len(finite) == len(values) else None
        found.append(KindErrors(kind, len(values), mean, largest))
    return found


class _Comparison:
    """A folder beside what it was made from."""

    def __init__(self, variant: VariantPlan, folder: ModelFolder, checks: FormatChecks) -> None:
        self._folder = folder
        self._checks = checks
        self._tensors = checks.by_module(folder.tensors, variant.architecture)
        self.quantized = variant.conversion.quantized
        self._view = variant.view

    def module(self, tensors: Sequence[OutputTensor]) -> _Finding:
        """Compare the tensors that stand for one source tensor."""
        for name, spec in (member for tensor in tensors for member in tensor.members):
            found = self._folder.tensors.get(name)
            if found is None or found.spec != spec:
                # The structure check names it.
                stored = "is missing" if found is None else f"is {_shape(found.spec)}"
                why = f"{name} {stored}, but {_shape(spec)} as recipe and family's table are now"
                return _Finding(skipped=why)
        module = tensors[0].name.rpartition(".")[0]
        packed = module in self.quantized and len(tensors) > 1
        with_source = partial(self._packed, module) if packed else self._equal
        return _tried(tensors[0].name, partial(with_source, tensors))

    def joined(self, module: str) -> _Finding:
        """Compare a quantized module that is published with others, as one tensor."""
        return _tried(module, partial(self._rounded, module, f"{module}.weight"))

    def _equal(self, tensors: Sequence[OutputTensor]) -> _Finding:
        for tensor in tensors:
            if STACK in tensor.name:
                for index, (name, spec) in enumerate(tensor.members):
                    wanted = ref_rows(tensor.ref, index, index + 1).array
                    found = read_rows(self._folder.tensors[name], spec, 0, matrix(spec)[0])
                    if wanted.tobytes() != found.array.tobytes():
                        return _Finding(f"tensor {name} is not equal to its source")
                continue
            spec, stored = tensor.ref.spec, self._folder.tensors[tensor.name]
            for start, stop in blocks(matrix(spec)):
                wanted = ref_rows(tensor.ref, start, stop).array
                if wanted.tobytes() != read_rows(stored, spec, start, stop).array.tobytes():
                    return _Finding(f"tensor {tensor.name} is not equal to its source")
        return _Finding()

    def _packed(self, module: str, tensors: Sequence[OutputTensor]) -> _Finding:
        self._checks.compared(tensors)
        taken_over = [item for item in tensors if isinstance(item.ref.origin, SourceTensor)]
        if (found := self._equal(taken_over)).problem:
            return found
        return self._rounded(module, tensors[0].fact.name)

    def _rounded(self, module: str, name: str) -> _Finding:
        """Compare the numbers of a quantized module with the source tensor `name`."""
        source, scheme = self._view[name], self.quantized[module]
        total, allowed = _Sums(), 0.0
        if STACK in module:
            for index, one in enumerate(numbered(module, source.spec.shape[0])):
                values = self._checks.values(self._tensors, one, scheme)
                data = self._checks.prepared(ref_rows(source, index, index + 1))
                total.add(as_float32(data).reshape(values.shape), values, 0)
                allowed += values.tolerated * prod(values.shape)
        else:
            values = self._checks.values(self._tensors, module, scheme)
            allowed = values.tolerated * prod(values.shape)
            for start, stop in blocks(values.shape):
                data = self._checks.prepared(ref_rows(source, start, stop))
                total.add(as_float32(data), values, start)
        error = total.result(module, scheme.bits)
        return _Finding(_problem(error) if error.outside > allowed else None, error)


def _shape(spec: TensorSpec) -> str:
    return f"{spec.dtype} {list(spec.shape)}"


def _tried(name: str, compare: Callable[[], _Finding]) -> _Finding:
    """What comes of comparing `name`."""
    try:
        return compare()
    except Incomparable as error:
        return _Finding(skipped=str(error))
    except NonFiniteValue:
        return _Finding(f"the source of {name} holds NaN or infinity")
    except CheckpointError as error:
        return _Finding(f"{name} cannot be read: {error}")


def _rank(item: ModuleError) -> float:
    return math.inf if item.error is None else item.error


def _format(error: float | None) -> str:
    return "not finite" if error is None else f"{error:.4f}"


def _problem(error: ModuleError) -> str:
    return (
        f"module {error.module}: {error.outside} weights are further from their source than "
        f"{error.bits} bits allow; relative error {_format(error.error)}, "
        f"bound {error.bound:.4f}"
    )


class _Sums:
    """Sums of squares over the blocks of a module."""

    def __init__(self) -> None:
        self._error = self._norm = self._bound = 0.0
        self._outside = 0

    def add(self, source: Floats, values: QuantizedValues, start: int) -> None:
        # What is beyond all numbers is found so, and told in our words.
        with np.errstate(over="ignore", invalid="ignore"):
            off = np.abs(values.rows(start, start + len(source)) - source)
            allowed = values.allowance(source, start)
            # Written so that NaN counts as outside.
            self._outside += int(source.size - np.count_nonzero(off <= allowed))
            self._error += square_sum(off)
            self._norm += square_sum(source)
            self._bound += square_sum(allowed)

    def result(self, module: str, bits: int) -> ModuleError:
        def relative(squares: float) -> float:
            return float((squares / self._norm) ** 0.5) if self._norm else float(squares > 0)

        error = relative(self._error) if math.isfinite(self._error) else None
        return ModuleError(module, bits, error, relative(self._bound), self._outside)
