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

from carnice_build.dtypes import ITEM_SIZE, NUMPY_NAME, WIDE_FLOATS, TensorSpec


@dataclass(frozen=True, slots=True)
class Step:
    """A primitive applied to values; see `PRIMITIVES`."""

    op: str
    operands: tuple[int, ...]
    arguments: tuple[Any, ...] = ()


Steps = tuple[Step, ...]


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
    `dropped` are the tensors of the checkpoint of which nothing is made, where somebody was asked.
    """

    tensors: tuple[Traced, ...]
    modules: Mapping[str, Mapping[str, Any]]
    quantized: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    stated: Mapping[str, Any] | None = None
    entries: Mapping[str, Any] = field(default_factory=dict)
    dropped: frozenset[str] = field(default=frozenset(), compare=False)


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
            dropped=frozenset(table["dropped"]),
        )
    except _DAMAGED as error:
        raise NotATrace(f"no trace: {error}") from None


_DAMAGED = (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError)
"""What reading a text raises that is no trace."""


def _traced(row: Sequence[Any], programs: Sequence[Steps]) -> Traced:
    name, dtype, shape, sources, program = row
    found = tuple(TracedSource(_text(key), _spec(kind, size)) for key, kind, size in sources)
    steps = programs[program]
    traced = Traced(_text(name), _spec(dtype, shape), found, steps)
    _require_used(traced)
    made = infer(steps, [item.spec for item in found])
    cast = made.dtype == dtype or {made.dtype, dtype} <= set(WIDE_FLOATS)
    if made.shape != traced.spec.shape or not cast:
        raise ValueError(f"{name} is {made.dtype} {made.shape} after its steps")
    return traced


def _require_used(item: Traced) -> None:
    """Raise ValueError unless each source is another tensor, and what is made of them is used."""
    places = len(item.sources) + len(item.steps)
    used = {index for step in item.steps for index in step.operands} | {places - 1}
    if len({source.name for source in item.sources}) != len(item.sources) or len(used) != places:
        raise ValueError(f"{item.name} is not made of its sources")


def _text(value: Any) -> str:
    if type(value) is not str:
        raise TypeError(f"{value!r} is no name")
    return value


def _spec(dtype: Any, shape: Any) -> TensorSpec:
    if _text(dtype) not in ITEM_SIZE or not all(_sizes(shape)):
        raise ValueError(f"{dtype} {shape} is no tensor")
    return TensorSpec(dtype, _sizes(shape))


MOST_AXES = 16
"""Of a tensor; no model comes near it."""


def _sizes(value: Any) -> tuple[int, ...]:
    """Sizes, or places along axes: numbers from 0 on, of a list."""
    good = isinstance(value, list | tuple) and len(value) <= MOST_AXES
    if not good or not all(type(size) is int and 0 <= size < 2**48 for size in value):
        raise ValueError(f"{value!r} are no sizes")
    return tuple(value)


def _axis(value: Any) -> int:
    return _sizes([value])[0]


def _dtype(value: Any) -> str:
    if _text(value) not in ITEM_SIZE:
        raise ValueError(f"{value!r} is no type")
    return str(value)


def _number(value: Any) -> float:
    if type(value) not in (int, float) or not abs(value) <= LARGEST:
        raise ValueError(f"{value!r} is no number")
    return float(value)


LARGEST = (2 - 2**-23) * 2.0**127
"""The largest number of F32."""

MOST_NESTED = 4
"""How deep steps may be inside of `each`."""


def _step(item: Sequence[Any], depth: int = 0) -> Step:
    op, operands, *arguments = item
    if op == "each":
        if depth == MOST_NESTED:
            raise ValueError("the steps are nested too deep")
        (inner,) = arguments
        read: tuple[Any, ...] = (
            tuple(
                (step.op, step.operands, *step.arguments)
                for step in (_step(one, depth + 1) for one in inner)
            ),
        )
    else:
        kinds = PRIMITIVES[op].arguments
        read = tuple(kind(value) for kind, value in zip(kinds, arguments, strict=True))
    places = tuple(_axis(index) for index in operands)
    if not PRIMITIVES[op].takes(len(places)):
        raise ValueError(f"{op} of {operands} is no step")
    return Step(op, places, read)


def as_params(steps: Steps) -> list[Any]:
    """The steps as parameters of an action: lists, as JSON has them."""
    return [[step.op, list(step.operands), *map(_lists, step.arguments)] for step in steps]


def _lists(value: Any) -> Any:
    return [_lists(item) for item in value] if isinstance(value, tuple | list) else value


def from_params(steps: Sequence[Any]) -> Steps:
    """What `as_params` made; ValueError for anything else."""
    return tuple(_step(item) for item in steps)


Read = Callable[[Any], Any]
"""Reads an argument; TypeError or ValueError for anything else."""


@dataclass(frozen=True, slots=True)
class Primitive:
    """What a step does, how its arguments are read, and how many operands it has, if not any."""

    about: str
    arguments: tuple[Read, ...] = ()
    operands: int | None = 1

    def takes(self, count: int) -> bool:
        """Whether it may have so many operands."""
        return count > 0 if self.operands is None else count == self.operands


PRIMITIVES: Mapping[str, Primitive] = {
    "reshape": Primitive("the same elements in another shape", (_sizes,)),
    "transpose": Primitive("axis i of the result is axis axes[i]", (_sizes,)),
    "slice": Primitive("starts, stops and strides along every axis", (_sizes, _sizes, _sizes)),
    "concatenate": Primitive("values end to end along an axis", (_axis,), operands=None),
    "broadcast": Primitive("repeated to a shape, by numpy's rules", (_sizes,)),
    "pad": Primitive("zeros before and after, along every axis", (_sizes, _sizes)),
    "astype": Primitive("the numbers in another type", (_dtype,)),
    "view": Primitive("the bytes as another type", (_dtype,)),
    "from_fp8": Primitive("the numbers of F8_E4M3 in another type", (_dtype,)),
    "add": Primitive("sum of two values", operands=2),
    "subtract": Primitive("difference of two values", operands=2),
    "multiply": Primitive("product of two values", operands=2),
    "add_number": Primitive("a number added", (_number,)),
    "subtract_number": Primitive("a number subtracted", (_number,)),
    "multiply_number": Primitive("multiplied by a number", (_number,)),
    "negative": Primitive("the sign changed"),
    "each": Primitive(
        "steps of their own, for each index of the first axis of all operands", operands=None
    ),
}
"""What a step may do.  Numbers have the type of the value that they meet."""

GROWTH = 64
"""How many elements all values of a program may have for one of its sources.

Decoding a small matrix that is padded to blocks of 128 x 128 takes most of it.
"""


def infer(steps: Steps, sources: Sequence[TensorSpec]) -> TensorSpec:
    """The spec of what `steps` make of tensors of these specs; ValueError when they do not fit."""
    values = list(sources)
    left = GROWTH * sum(spec.size for spec in sources) + 2**20
    for step in steps:
        values.append(_inferred(step, [values[index] for index in step.operands]))
        left -= values[-1].size
        if left < 0 or len(values[-1].shape) > MOST_AXES:
            raise ValueError(f"{step.op} makes more than there is: {list(values[-1].shape)}")
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
    known = dtype in WIDE_FLOATS and NUMPY_NAME[inputs[0].dtype] == "uint8"
    return TensorSpec(dtype, inputs[0].shape) if known else None


def _view(inputs: Inputs, dtype: str) -> TensorSpec | None:
    *rest, last = inputs[0].shape
    count, left = divmod(last * ITEM_SIZE[inputs[0].dtype], ITEM_SIZE[dtype])
    return None if left else TensorSpec(dtype, (*rest, count))


def _each(inputs: Inputs, steps: Any) -> TensorSpec | None:
    counts = {item.shape[0] for item in inputs}
    if len(counts) > 1 or counts == {0}:
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
