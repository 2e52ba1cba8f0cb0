"""What mlx-lm makes of a checkpoint, as data: a trace.

A trace comes from mlx-lm itself (`backends.mlx_trace`, in a worker) or from a table of ours
(`table`), which say the same.  It names, for each tensor of the MLX folder, the tensors of the
checkpoint that it is made of, and by which steps:

    ["slice", [0], [0, 0, 0], [4, 384, 256], [1, 1, 1]]

is primitive `slice` of value 0, with its arguments.  Values count the sources first, then the
steps; the last one is the tensor, but for a cast to its type.  A name with a `*` is a stack: the
tensors of that name for each number, end to end.  Most tensors have no steps at all, and of those
that have, many only look at the same bytes: see `Traced.kind`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from carnice_build.dtypes import ITEM_SIZE, WIDE_FLOATS, TensorSpec
from carnice_build.tensors import STACK, members


@dataclass(frozen=True, slots=True)
class Step:
    """A primitive applied to values; see `PRIMITIVES`."""

    op: str
    operands: tuple[int, ...]
    arguments: tuple[Any, ...] = ()


Steps = tuple[Step, ...]

BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (16, 32, 64, 128)
"""What MLX has kernels for, in any of its modes."""


@dataclass(frozen=True, slots=True)
class TracedSource:
    """A tensor of the checkpoint, or a stack of them."""

    name: str
    spec: TensorSpec


class Kind(StrEnum):
    """What it takes to make a tensor, but for a cast."""

    SAME = "same"
    """Nothing, or another shape of the same bytes."""

    SHIFT = "shift"
    """A number added to each element."""

    PROGRAM = "program"
    """All of its steps."""


@dataclass(frozen=True, slots=True)
class Traced:
    """A tensor of the MLX folder: its name and spec, what it is made of, and how."""

    name: str
    spec: TensorSpec
    sources: tuple[TracedSource, ...]
    steps: Steps = ()

    @property
    def module(self) -> str:
        """The path of the module whose weight it is; its own name if it is none."""
        return self.name.removesuffix(".weight")

    @property
    def kind(self) -> Kind:
        """See `Kind`."""
        ops = [step.op for step in self.steps]
        if ops in ([], ["reshape"]):
            return Kind.SAME
        if ops == ["add_number"]:
            return Kind.SHIFT
        return Kind.PROGRAM


@dataclass(frozen=True)
class Trace:
    """What `mlx_lm.convert` makes of a checkpoint, before it quantizes.

    `modules` are those that it quantizes, by their MLX paths, with what the model's own code says
    of `bits` and `group_size`, if anything.
    `quantized` are those that the checkpoint holds quantized in a way that MLX takes as it is, and
    `stated` is what config.json then says of all of them.
    `entries` are what config.json lacks for mlx-lm; see `entries`.
    """

    tensors: tuple[Traced, ...]
    modules: Mapping[str, Mapping[str, Any]]
    quantized: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    stated: Mapping[str, Any] | None = None
    entries: Mapping[str, Any] = field(default_factory=dict)


class NotATrace(ValueError):
    """A text that is no trace: written by another version, or damaged."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why mlx-lm does not take the model, in its own words."""

    reason: str


def parsed(text: str) -> Trace | Refusal:
    """What `backends.mlx_trace.trace` wrote; NotATrace for anything else."""
    try:
        table = json.loads(text)
        if "refusal" in table:
            return Refusal(str(table["refusal"]))
        programs = [tuple(_step(item) for item in steps) for steps in table["programs"]]
        return Trace(
            tuple(_traced(row, programs) for row in table["tensors"]),
            {path: dict(own) for path, own in table["modules"].items()},
            {path: dict(own) for path, own in table["quantized"].items()},
            None if table["stated"] is None else dict(table["stated"]),
        )
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        raise NotATrace(f"no trace: {error}") from None


def answered(text: str, tensors: Mapping[str, TensorSpec]) -> Trace | Refusal:
    """`parsed`, of a text that is about a checkpoint of these `tensors`; else NotATrace."""
    found = parsed(text)
    if isinstance(found, Trace):
        for source in {source for item in found.tensors for source in item.sources}:
            _require_asked(source, tensors)
        for own in (*found.modules.values(), *found.quantized.values(), found.stated or {}):
            if own.get("bits", 4) not in BITS or own.get("group_size", 64) not in GROUP_SIZES:
                raise NotATrace(f"no trace: {own} is no quantization of MLX's")
        if not all({"bits", "group_size"} <= own.keys() for own in found.quantized.values()):
            raise NotATrace("no trace: does not say how modules are quantized")
    return found


def _require_asked(source: TracedSource, tensors: Mapping[str, TensorSpec]) -> None:
    # A stack has no more members than there are tensors, and there may be no room for their names.
    stacked = STACK in source.name
    if stacked and not (source.spec.shape and source.spec.shape[0] <= len(tensors)):
        raise NotATrace(f"no trace: {source.name} is no stack")
    if any(tensors.get(name) != spec for name, spec in members(source.name, source.spec)):
        raise NotATrace(f"no trace: {source.name} is not what was asked about")


def _traced(row: Sequence[Any], programs: Sequence[Steps]) -> Traced:
    name, dtype, shape, sources, program = row
    found = tuple(TracedSource(key, _spec(kind, size)) for key, kind, size in sources)
    steps = programs[program]
    traced = Traced(str(name), _spec(dtype, shape), found, steps)
    made = infer(steps, [item.spec for item in found])
    if made.size != traced.spec.size:
        raise ValueError(f"{name} is {made.shape} after its steps")
    return traced


def _spec(dtype: str, shape: Sequence[int]) -> TensorSpec:
    if dtype not in ITEM_SIZE or not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError(f"{dtype} {shape} is no tensor")
    return TensorSpec(dtype, tuple(shape))


def _step(item: Sequence[Any]) -> Step:
    op, operands, *arguments = item
    if op not in PRIMITIVES or not all(type(index) is int and index >= 0 for index in operands):
        raise ValueError(f"{op} of {operands} is no step")
    return Step(op, tuple(operands), tuple(_tuples(arguments)))


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def as_params(steps: Steps) -> list[Any]:
    """The steps as parameters of an action: lists, as JSON has them."""
    return [[step.op, list(step.operands), *map(_lists, step.arguments)] for step in steps]


def _lists(value: Any) -> Any:
    return [_lists(item) for item in value] if isinstance(value, tuple | list) else value


def from_params(steps: Sequence[Any]) -> Steps:
    """What `as_params` made; ValueError for anything else."""
    return tuple(_step(item) for item in steps)


PRIMITIVES: Mapping[str, str] = {
    "reshape": "the same elements in another shape",
    "transpose": "axis i of the result is axis axes[i]",
    "slice": "starts, stops and strides along every axis",
    "concatenate": "values end to end along an axis",
    "broadcast": "repeated to a shape, by numpy's rules",
    "pad": "zeros before and after, along every axis",
    "astype": "the numbers in another type",
    "view": "the bytes as another type",
    "from_fp8": "the numbers of F8_E4M3 in another type",
    "add": "sum of two values",
    "subtract": "difference of two values",
    "multiply": "product of two values",
    "add_number": "a number added",
    "subtract_number": "a number subtracted",
    "multiply_number": "multiplied by a number",
    "negative": "the sign changed",
    "each": "steps of their own, for each index of the first axis of all operands",
}
"""What a step may do.  Numbers have the type of the value that they meet."""


def infer(steps: Steps, sources: Sequence[TensorSpec]) -> TensorSpec:
    """The spec of what `steps` make of tensors of these specs; ValueError when they do not fit."""
    values = list(sources)
    for step in steps:
        values.append(_inferred(step, [values[index] for index in step.operands]))
    return values[-1] if steps else values[0]


def replay_bytes(steps: Steps, sources: Sequence[TensorSpec]) -> int:
    """Most bytes that the values of `steps` take: all are kept, and floats are widened to compute.

    Views count as copies, for a later step may need one.
    """
    values, widened = list(sources), 0
    for step in steps:
        inputs = [values[index] for index in step.operands]
        values.append(_inferred(step, inputs))
        if step.op == "each":
            inner = [TensorSpec(item.dtype, item.shape[1:]) for item in inputs]
            once = replay_bytes(from_params(step.arguments[0]), inner)
            # What each index made, which is then put together.
            widened = max(widened, once + values[-1].nbytes)
        else:
            widened = max(widened, 4 * values[-1].size * (len(inputs) + 1))
    return widened + sum(value.nbytes for value in values[len(sources) :])


def _inferred(step: Step, inputs: Sequence[TensorSpec]) -> TensorSpec:
    found = _INFERRED[step.op](inputs, *step.arguments)
    if found is None:
        shapes = ", ".join(f"{item.dtype} {list(item.shape)}" for item in inputs)
        raise ValueError(f"{step.op} {list(step.arguments)} does not fit {shapes}")
    return found


Inputs = Sequence[TensorSpec]
Shape = tuple[int, ...]


def _reshape(inputs: Inputs, shape: Shape) -> TensorSpec | None:
    found = TensorSpec(inputs[0].dtype, shape)
    return found if found.size == inputs[0].size else None


def _broadcast(inputs: Inputs, shape: Shape) -> TensorSpec | None:
    own = inputs[0].shape
    ends = zip(reversed(own), reversed(shape), strict=False)
    fits = len(own) <= len(shape) and all(size in (1, other) for size, other in ends)
    return TensorSpec(inputs[0].dtype, shape) if fits else None


def _transpose(inputs: Inputs, axes: Shape) -> TensorSpec | None:
    dtype, shape = inputs[0].dtype, inputs[0].shape
    fits = sorted(axes) == list(range(len(shape)))
    return TensorSpec(dtype, tuple(shape[axis] for axis in axes)) if fits else None


def _slice(inputs: Inputs, starts: Shape, stops: Shape, strides: Shape) -> TensorSpec | None:
    spans = list(zip(starts, stops, strides, inputs[0].shape, strict=True))
    if not all(0 <= start <= stop <= size and stride > 0 for start, stop, stride, size in spans):
        return None
    sizes = (len(range(start, stop, stride)) for start, stop, stride, _ in spans)
    return TensorSpec(inputs[0].dtype, tuple(sizes))


def _concatenate(inputs: Inputs, axis: int) -> TensorSpec | None:
    rests = {(item.dtype, item.shape[:axis], item.shape[axis + 1 :]) for item in inputs}
    if len(rests) > 1:
        return None
    dtype, before, after = rests.pop()
    return TensorSpec(dtype, (*before, sum(item.shape[axis] for item in inputs), *after))


def _pad(inputs: Inputs, low: Shape, high: Shape) -> TensorSpec | None:
    sizes = zip(inputs[0].shape, low, high, strict=True)
    return TensorSpec(inputs[0].dtype, tuple(size + one + other for size, one, other in sizes))


def _astype(inputs: Inputs, dtype: str) -> TensorSpec | None:
    known = dtype in WIDE_FLOATS and not inputs[0].dtype.startswith("F8_")
    return TensorSpec(dtype, inputs[0].shape) if known else None


def _from_fp8(inputs: Inputs, dtype: str) -> TensorSpec | None:
    known = dtype in WIDE_FLOATS and ITEM_SIZE[inputs[0].dtype] == 1
    return TensorSpec(dtype, inputs[0].shape) if known else None


def _view(inputs: Inputs, dtype: str) -> TensorSpec | None:
    *rest, last = inputs[0].shape
    count, left = divmod(last * ITEM_SIZE[inputs[0].dtype], ITEM_SIZE[dtype])
    return None if left else TensorSpec(dtype, (*rest, count))


def _each(inputs: Inputs, steps: Any) -> TensorSpec | None:
    counts = {item.shape[0] for item in inputs}
    if len(counts) > 1:
        return None
    inner = [TensorSpec(item.dtype, item.shape[1:]) for item in inputs]
    made = infer(from_params(steps), inner)
    return TensorSpec(made.dtype, (*counts, *made.shape))


def _arithmetic(inputs: Inputs, *_: float) -> TensorSpec | None:
    fits = all(item == inputs[0] for item in inputs) and inputs[0].dtype in WIDE_FLOATS
    return inputs[0] if fits else None


_INFERRED: Mapping[str, Callable[..., TensorSpec | None]] = {
    "reshape": _reshape,
    "transpose": _transpose,
    "slice": _slice,
    "concatenate": _concatenate,
    "broadcast": _broadcast,
    "pad": _pad,
    "astype": _astype,
    "view": _view,
    "from_fp8": _from_fp8,
    "each": _each,
    **dict.fromkeys(("add", "subtract", "multiply", "negative"), _arithmetic),
    **dict.fromkeys(("add_number", "subtract_number", "multiply_number"), _arithmetic),
}
