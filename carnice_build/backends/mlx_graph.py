"""The graph of what mlx-lm does to a checkpoint's tensors, made small and written as JSON.

A node is a tensor of the checkpoint, a number, or one primitive applied to nodes.
What only looks at the same bytes in another shape becomes `reshape`, or nothing; one program
applied to all experts alike becomes `each`, on stacks whose names have a `*` for the number.
`formats.mlx.trace` reads what `written` writes; the primitives are explained there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from carnice_build.dtypes import WIDE_FLOATS
from carnice_build.errors import BackendError
from carnice_build.tensors import STACK

Shape = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Node:
    """A value of the graph: `op` applied to `inputs`; `source` and `number` have none.

    `shape` is that of the value, `dtype` its type as safetensors call it.
    """

    op: str
    arguments: tuple[Any, ...]
    inputs: tuple[Node, ...]
    dtype: str
    shape: Shape


def source(name: str, dtype: str, shape: Shape) -> Node:
    """The tensor `name` of the checkpoint; a `*` in it stands for each of shape[0] numbers."""
    return Node("source", (name,), (), dtype, shape)


def number(value: float, dtype: str) -> Node:
    """A scalar."""
    return Node("number", (value,), (), dtype, ())


def reshape(node: Node, shape: Shape) -> Node:
    """The same bytes in another shape."""
    while node.op == "reshape":
        (node,) = node.inputs
    return node if node.shape == shape else Node("reshape", (shape,), (node,), node.dtype, shape)


def transpose(node: Node, axes: Sequence[int]) -> Node:
    """Axis number i of the result is axis number axes[i] of `node`."""
    shape = tuple(node.shape[axis] for axis in axes)
    moved = [axis for axis in axes if node.shape[axis] != 1]
    if moved == sorted(moved):
        return reshape(node, shape)
    return Node("transpose", (tuple(axes),), (node,), node.dtype, shape)


def cut(node: Node, starts: Shape, stops: Shape, strides: Shape) -> Node:
    """A slice along every axis."""
    if any(stride < 1 for stride in strides):
        raise BackendError("mlx-lm reverses a tensor of this model", expected="a slice forwards")
    shape = tuple(len(range(*span)) for span in zip(starts, stops, strides, strict=True))
    if shape == node.shape:
        return node
    return Node("slice", (starts, stops, strides), (node,), node.dtype, shape)


def concatenate(parts: Sequence[Node], axis: int) -> Node:
    """The parts end to end along `axis`."""
    if len(parts) == 1:
        return parts[0]
    if axis == 0 and (stack := _stacked(parts)) is not None:
        return stack
    length = sum(part.shape[axis] for part in parts)
    shape = (*parts[0].shape[:axis], length, *parts[0].shape[axis + 1 :])
    return Node("concatenate", (axis,), tuple(parts), parts[0].dtype, shape)


def _stacked(parts: Sequence[Node]) -> Node | None:
    """The parts as one program on stacks, if they differ in the number of their sources alone."""
    shape = parts[0].shape
    inner = [_without_reshape(part) for part in parts]
    if any(part.shape != shape for part in parts) or len({part.shape for part in inner}) > 1:
        return None
    programs = [linearized(part) for part in inner]
    first = programs[0]
    if any(_form(program) != _form(first) for program in programs[1:]):
        return None
    stacks = []
    for place, leaf in enumerate(first.sources):
        name = _numbered([program.sources[place].arguments[0] for program in programs])
        if name is None:
            return None
        stacks.append(source(name, leaf.dtype, (len(parts), *leaf.shape)))
    if not stacks:
        return None
    (kept,) = {part.shape for part in inner}
    whole = stacks[0]
    if first.steps:
        full = (len(parts), *kept)
        whole = Node("each", (first.steps,), tuple(stacks), parts[0].dtype, full)
    return reshape(whole, (len(parts) * shape[0], *shape[1:]))


def _without_reshape(node: Node) -> Node:
    return node.inputs[0] if node.op == "reshape" else node


def _form(program: Program) -> tuple[object, ...]:
    return program.steps, tuple((leaf.dtype, leaf.shape) for leaf in program.sources)


def _numbered(names: Sequence[str]) -> str | None:
    """The names with a `*` for the one part that counts them from 0; None when there is none."""
    split = [name.split(".") for name in names]
    if len({len(parts) for parts in split}) > 1:
        return None
    columns = list(zip(*split, strict=True))
    changing = [place for place, column in enumerate(columns) if len(set(column)) > 1]
    if len(changing) != 1 or list(columns[changing[0]]) != [str(i) for i in range(len(names))]:
        return None
    pattern = split[0]
    pattern[changing[0]] = STACK
    return ".".join(pattern)


def converted(node: Node, dtype: str) -> Node:
    """The numbers of `node` in another type; of bytes seen as BOOL, as E4M3 (see `mlx_trace`)."""
    if node.op == "view" and node.dtype == "BOOL":
        return Node("from_fp8", (dtype,), (_bytes(node),), dtype, node.shape)
    if node.op == "number":
        return number(node.arguments[0], dtype)
    if node.dtype == dtype:
        return node
    if dtype not in WIDE_FLOATS:
        raise BackendError(f"mlx-lm casts a tensor of this model to {dtype}")
    return Node("astype", (dtype,), (node,), dtype, node.shape)


def _bytes(node: Node) -> Node:
    while node.op == "view":
        (node,) = node.inputs
    return node


def viewed(node: Node, dtype: str, shape: Shape) -> Node:
    """The bytes of `node` as numbers of another type."""
    return node if node.dtype == dtype else Node("view", (dtype,), (node,), dtype, shape)


def padded(node: Node, axes: Sequence[int], low: Shape, high: Shape, value: Node) -> Node:
    """`node` with numbers around it."""
    if not any((*low, *high)):
        return node
    before, after = [0] * len(node.shape), [0] * len(node.shape)
    for axis, first, last in zip(axes, low, high, strict=True):
        before[axis], after[axis] = first, last
    shape = tuple(
        size + first + last for size, first, last in zip(node.shape, before, after, strict=True)
    )
    if value.op != "number" or value.arguments[0] != 0:
        raise BackendError("mlx-lm pads a tensor of this model with a number that is not 0")
    return Node("pad", (tuple(before), tuple(after)), (node,), node.dtype, shape)


def broadcast(node: Node, shape: Shape) -> Node:
    """`node` repeated along axes, by numpy's rules."""
    if node.shape == shape:
        return node
    return Node("broadcast", (shape,), (node,), node.dtype, shape)


def arithmetic(op: str, left: Node, right: Node) -> Node:
    """Sum, difference or product of two values of one type and shape."""
    for one, other, swapped in ((left, right, False), (right, left, True)):
        scalar = other
        while scalar.op in ("broadcast", "reshape"):
            (scalar,) = scalar.inputs
        if scalar.op != "number" or (swapped and op == "subtract"):
            continue
        return Node(f"{op}_number", scalar.arguments, (one,), one.dtype, one.shape)
    return Node(op, (), (left, right), left.dtype, left.shape)


@dataclass(frozen=True)
class Program:
    """A value as steps on its sources: (op, numbers of the operands, *arguments).

    Operands count the sources first, then the steps before.
    """

    sources: tuple[Node, ...]
    steps: tuple[tuple[Any, ...], ...]


def linearized(root: Node) -> Program:
    """The program that makes `root`, each step after those that it needs."""
    order: list[Node] = []
    sources: dict[str, Node] = {}
    seen: set[Node] = set()
    waiting = [(root, False)]
    while waiting:
        node, ready = waiting.pop()
        if ready:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            if node.op == "source":
                sources.setdefault(node.arguments[0], node)
                continue
            waiting.append((node, True))
            waiting += [(operand, False) for operand in reversed(node.inputs)]
    place = {node: index for index, node in enumerate(order)}
    leaf = {name: index for index, name in enumerate(sources)}

    def operand(node: Node) -> int:
        if node.op == "source":
            return leaf[node.arguments[0]]
        return len(sources) + place[node]

    steps = tuple(
        (node.op, tuple(operand(item) for item in node.inputs), *node.arguments) for node in order
    )
    return Program(tuple(sources.values()), steps)


def written(outputs: Iterable[tuple[str, Node]]) -> dict[str, Any]:
    """The outputs, by their names, as JSON: `programs`, and `tensors` that say which they are of.

    A cast at the end is left to whoever makes the tensor: its type says so.
    """
    programs: dict[tuple[Any, ...], int] = {(): 0}
    tensors = []
    for name, node in outputs:
        bare = node.inputs[0] if node.op == "astype" else node
        program = linearized(bare)
        if not program.sources or any(step[0] == "number" for step in program.steps):
            raise BackendError(f"mlx-lm makes {name} of numbers of its own")
        number_of = programs.setdefault(program.steps, len(programs))
        sources = [[leaf.arguments[0], leaf.dtype, list(leaf.shape)] for leaf in program.sources]
        tensors.append([name, node.dtype, list(node.shape), sources, number_of])
    return {"programs": [_listed(steps) for steps in programs], "tensors": tensors}


def _listed(value: Any) -> Any:
    return [_listed(item) for item in value] if isinstance(value, list | tuple) else value


def build(
    messages: Sequence[Mapping[str, Any]],
    names: Sequence[str],
    dtypes: Mapping[str, str],
    types: Callable[[Any], str],
) -> list[Node]:
    """The outputs of a graph that `mlx.core.export_function` told.

    `names` are those of the inputs, in order, and `dtypes` their types, which mlx may not have
    (FP8 is bytes to it); `types` gives the name of one of mlx's types.
    """
    return _Reader(names, dtypes, types).read(messages)


class _Reader:
    """Turns mlx's messages into nodes."""

    def __init__(
        self, names: Sequence[str], dtypes: Mapping[str, str], types: Callable[[Any], str]
    ) -> None:
        self._names = names
        self._dtypes = dtypes
        self._types = types
        self._nodes: dict[str, Node] = {}

    def read(self, messages: Sequence[Mapping[str, Any]]) -> list[Node]:
        """See `build`."""
        outputs: list[str] = []
        for message in messages:
            match message["type"]:
                case "inputs":
                    for name, (key, shape, _) in zip(self._names, message["inputs"], strict=True):
                        leaf = source(name, self._dtypes[name], tuple(shape))
                        self._nodes[key] = viewed(leaf, self._loaded(leaf.dtype), leaf.shape)
                case "outputs":
                    outputs = [key for key, *_ in message["outputs"]]
                case "constants":
                    for key, value in message["constants"]:
                        self._nodes[key] = self._constant(value)
                case "primitive":
                    self._primitive(message)
        return [self._nodes[key] for key in outputs]

    @staticmethod
    def _loaded(dtype: str) -> str:
        """The type that mlx loads: FP8 is bytes to it."""
        return "U8" if dtype.startswith("F8_") else dtype

    def _constant(self, value: Any) -> Node:
        dtype = self._types(value.dtype)
        if value.size == 1:
            return reshape(number(value.item(), dtype), tuple(value.shape))
        raise BackendError("mlx-lm puts numbers of its own into a tensor of this model")

    def _primitive(self, message: Mapping[str, Any]) -> None:
        made = message["outputs"]
        call = _Call(
            tuple(self._nodes[key] for key, *_ in message["inputs"]),
            message["arguments"],
            tuple(made[0][1]),
            self._types(made[0][2]),
        )
        name = message["name"]
        if name not in _PRIMITIVES:
            raise BackendError(
                f"mlx-lm makes a tensor of this model by {name}, which is not replayed"
            )
        for (key, *_), node in zip(made, _PRIMITIVES[name](call), strict=True):
            self._nodes[key] = node


@dataclass(frozen=True)
class _Call:
    """A primitive of mlx: its operands and arguments, and the spec of its first output."""

    inputs: tuple[Node, ...]
    arguments: Sequence[Any]
    shape: Shape
    dtype: str

    @property
    def first(self) -> Node:
        return self.inputs[0]


def _reshaped(call: _Call) -> list[Node]:
    return [reshape(call.first, call.shape)]


def _same(call: _Call) -> list[Node]:
    return [call.first]


def _repeated(call: _Call) -> list[Node]:
    return [broadcast(call.first, call.shape)]


def _sliced(call: _Call) -> list[Node]:
    starts, stops, strides = (tuple(item) for item in call.arguments)
    return [cut(call.first, starts, stops, strides)]


def _padded(call: _Call) -> list[Node]:
    axes, low, high = call.arguments
    return [padded(call.first, axes, tuple(low), tuple(high), call.inputs[1])]


def _split(call: _Call) -> list[Node]:
    node, (indices, axis) = call.first, call.arguments
    parts = []
    for start, stop in pairwise([0, *indices, node.shape[axis]]):
        starts, stops = [0] * len(node.shape), list(node.shape)
        starts[axis], stops[axis] = start, stop
        parts.append(cut(node, tuple(starts), tuple(stops), (1,) * len(node.shape)))
    return parts


def _computed(op: str) -> Callable[[_Call], list[Node]]:
    return lambda call: [arithmetic(op, *call.inputs)]


_PRIMITIVES: Mapping[str, Callable[[_Call], list[Node]]] = {
    **dict.fromkeys(("ExpandDims", "Squeeze", "Flatten", "Unflatten", "Reshape"), _reshaped),
    **dict.fromkeys(("Copy", "Contiguous", "StopGradient"), _same),
    **dict.fromkeys(("Broadcast", "Full"), _repeated),
    "Transpose": lambda call: [transpose(call.first, call.arguments[0])],
    "Slice": _sliced,
    "Split": _split,
    "Concatenate": lambda call: [concatenate(call.inputs, call.arguments[0])],
    "Pad": _padded,
    "AsType": lambda call: [converted(call.first, call.dtype)],
    "View": lambda call: [viewed(call.first, call.dtype, call.shape)],
    "Add": _computed("add"),
    "Subtract": _computed("subtract"),
    "Multiply": _computed("multiply"),
    "Negative": lambda call: [Node("negative", (), (call.first,), call.dtype, call.shape)],
}
"""The primitives of mlx that are replayed, by mlx's names."""
