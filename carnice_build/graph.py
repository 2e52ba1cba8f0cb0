"""The nouns of a plan: tensors not yet read, views of them, and the actions that make new bytes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from carnice_build.dtypes import TensorSpec
from carnice_build.errors import PlanError
from carnice_build.keys import DigestSink, KeySink, write_key
from carnice_build.rates import Kind, Work
from carnice_build.tensor_file import TensorFile
from carnice_build.tensors import SourceTensor

if TYPE_CHECKING:
    import networkx
    import numpy as np


class NonFiniteValue(Exception):
    """An op met NaN or infinity at the flat `index` of its input number `operand`.

    Of no input, where it makes them of finite numbers.
    """

    def __init__(self, index: int, operand: int | None = 0) -> None:
        super().__init__(index, operand)
        self.index = index
        self.operand = operand


@dataclass(frozen=True, slots=True)
class TensorData:
    """Bytes in memory with their type: `array` is as `dtypes.NUMPY_NAME` carries `dtype`."""

    dtype: str
    array: np.ndarray[Any, Any]


def require_finite(bad_index: int) -> None:
    """Raise NonFiniteValue for what a kernel returns: -1, or the index of NaN or infinity."""
    if bad_index >= 0:
        raise NonFiniteValue(bad_index)


class BadInput(Exception):
    """An op cannot work on what its input number `operand` holds.

    `index` is that of an element of the part to blame, where the input is a stack.
    """

    def __init__(
        self, operand: int, what: str, expected: str | None = None, index: int = 0
    ) -> None:
        super().__init__(operand, what, expected, index)
        self.operand = operand
        self.what = what
        self.expected = expected
        self.index = index

    def at(self, index: int) -> BadInput:
        """The same of an input in which this one begins at element `index`."""
        return type(self)(self.operand, self.what, self.expected, self.index + index)


class BadElement(BadInput):
    """An op cannot work on the one number that `index` says."""


class Op(ABC):
    """A kind of action: what it makes of its inputs, on specs at plan time, on bytes later.

    `version` rises whenever the same inputs would give other bytes.
    `libraries` are the distributions whose code decides the bytes; their versions are in the key.
    The outputs named in `figures`, by their index, are a few numbers (F32 or I64) that people want
    to see; the cache remembers their values.
    """

    name: str
    version: int
    libraries: tuple[str, ...] = ()
    figures: frozenset[int] = frozenset()

    @abstractmethod
    def infer(
        self, params: Mapping[str, Any], inputs: Sequence[TensorSpec]
    ) -> tuple[TensorSpec, ...]:
        """Types and shapes of the outputs; PlanError when the op cannot work on these inputs."""

    def work(self, params: Mapping[str, Any], inputs: Sequence[TensorSpec]) -> Work:
        """How much there is to do, for estimates: all inputs through a loop, if nothing else."""
        return Work(Kind.KERNEL, sum(spec.nbytes for spec in inputs))


class ArrayOp(Op):
    """An op that computes on arrays, in a thread of the build.

    A `rowwise` op makes row *i* of every output from row *i* of each input alone, so it may be
    applied to any range of rows.
    A `transposed` op fills whole outputs from one range of rows of its only input after another,
    by `apply_rows`: for outputs in which a row of the input is a column, say.
    """

    rowwise: bool = False
    transposed: ClassVar[bool] = False

    def apply_rows(
        self,
        params: Mapping[str, Any],
        first: int,
        rows: TensorData,
        outputs: Sequence[TensorData],
    ) -> None:
        """Fill what follows from `rows`, number `first` and following; see `apply`."""
        raise NotImplementedError

    def workspace(self, params: Mapping[str, Any], inputs: Sequence[TensorSpec]) -> int:
        """Most bytes that `apply` holds at once beside its inputs and outputs, if they are many."""
        return 0

    def passes(self, digests: Sequence[str]) -> Sequence[int | None] | None:
        """For each output the input that it equals, None for zeros; None when it must be computed.

        `digests` are the contents of the inputs.  Where they alone tell what comes out (a merge
        of a weight that did not change, say), the bytes are copied and no action runs, once
        `check` has seen the inputs.
        """
        return None

    def check(self, params: Mapping[str, Any], inputs: Sequence[TensorData]) -> None:
        """Refuse what `apply` would refuse: of inputs that are passed on, nobody else looks at.

        Raises BadInput or NonFiniteValue.
        """
        return

    @abstractmethod
    def apply(
        self,
        params: Mapping[str, Any],
        inputs: Sequence[TensorData],
        outputs: Sequence[TensorData],
    ) -> None:
        """Fill `outputs` from `inputs`.

        Must release the GIL in any long loop.  Raises NonFiniteValue for NaN or infinity.
        """


class Stacked(ArrayOp):
    """An op applied to each index of the first axis of its inputs, which are stacks.

    What it makes of each lies in one tensor, in the same order.
    Inputs that are `shared`, by their number, are the same for all; the first never is.
    """

    name = "stack"
    version = 1
    """Rises whenever stacks are cut otherwise; that of the op comes on top."""

    def __init__(self, op: ArrayOp, shared: Collection[int] = ()) -> None:
        """Its name, and what else identifies an op, follow from those of `op` and from `shared`."""
        self.op = op
        self.shared = frozenset(shared)
        self.rowwise = not shared
        self.name = ".".join([op.name, "stack", *map(str, sorted(shared))])
        self.version = op.version + Stacked.version - 1
        self.libraries = op.libraries
        self.figures = op.figures

    def infer(
        self, params: Mapping[str, Any], inputs: Sequence[TensorSpec]
    ) -> tuple[TensorSpec, ...]:
        """What the op infers of one index, with the first axis before it."""
        counts = {spec.shape[:1] for number, spec in enumerate(inputs) if number not in self.shared}
        if len(counts) != 1 or () in counts:
            shapes = " and ".join(str(list(spec.shape)) for spec in inputs)
            raise PlanError(f"{self.name} cannot take {shapes}", expected="stacks of one length")
        (count,) = counts
        each = self.op.infer(params, self._one(inputs))
        return tuple(TensorSpec(spec.dtype, (*count, *spec.shape)) for spec in each)

    def work(self, params: Mapping[str, Any], inputs: Sequence[TensorSpec]) -> Work:
        """That of one index, for each of them."""
        each = self.op.work(params, self._one(inputs))
        return Work(each.kind, each.amount * inputs[0].shape[0])

    def workspace(self, params: Mapping[str, Any], inputs: Sequence[TensorSpec]) -> int:
        """That of one index."""
        return self.op.workspace(params, self._one(inputs))

    def _one(self, inputs: Sequence[TensorSpec]) -> list[TensorSpec]:
        return [
            spec if number in self.shared else TensorSpec(spec.dtype, spec.shape[1:])
            for number, spec in enumerate(inputs)
        ]

    def apply(
        self,
        params: Mapping[str, Any],
        inputs: Sequence[TensorData],
        outputs: Sequence[TensorData],
    ) -> None:
        """Apply the op to one index after another; what it raises says which it was."""
        for index in range(len(inputs[0].array)):
            with self._placed(inputs, index):
                made = [_slab(item, index) for item in outputs]
                self.op.apply(params, self._each(inputs, index), made)

    def _each(self, inputs: Sequence[TensorData], index: int) -> list[TensorData]:
        return [
            item if number in self.shared else _slab(item, index)
            for number, item in enumerate(inputs)
        ]

    @contextmanager
    def _placed(self, inputs: Sequence[TensorData], index: int) -> Iterator[None]:
        """Tell what the op raises about index `index` of stacks as a thing of the stacks."""

        def start(operand: int) -> int:
            array = inputs[operand].array
            return 0 if operand in self.shared else index * (array.size // len(array))

        try:
            yield
        except NonFiniteValue as error:
            if error.operand is None:
                raise
            raise NonFiniteValue(start(error.operand) + error.index, error.operand) from None
        except BadInput as error:
            raise error.at(start(error.operand)) from None


def _slab(stack: TensorData, index: int) -> TensorData:
    """A view of one index of the first axis; of no axis where the stack has one."""
    array = stack.array
    return TensorData(stack.dtype, array[index : index + 1].reshape(array.shape[1:]))


class ProcessOp(Op):
    """An op that works on files, in a process of its own: it brings a large library, most often.

    It reads of its inputs what it needs when it needs it, and again if it must, so none has to fit
    in memory.
    The outputs named in `transient`, by their index, are not kept longer than the build needs them.
    """

    transient: frozenset[int] = frozenset()

    def steps(self, params: Mapping[str, Any], inputs: Sequence[TensorSpec]) -> int:
        """How often `run` calls `progress`: its share of a build's long work."""
        return 0

    @abstractmethod
    def memory(self, params: Mapping[str, Any], inputs: Sequence[TensorSpec]) -> int:
        """Most bytes that `run` holds at once, beyond what its libraries take."""

    @abstractmethod
    def run(
        self,
        params: Mapping[str, Any],
        inputs: Sequence[TensorFile],
        outputs: Sequence[TensorFile],
        progress: Callable[[], None],
    ) -> None:
        """Write every byte of `outputs` but zeros, which are there; call `progress` after a step.

        Raises NonFiniteValue for NaN or infinity in the first input, or a CarniceError.
        """


ANY_GPU = "cuda"
"""What the parameter `device` of an action is that may run on any GPU of one kind."""


@dataclass(frozen=True, slots=True, eq=False)
class Action:
    """One unit of work that makes new bytes: an op, its parameters and its inputs.

    `identity` covers what the action key covers, with file identities for unread content, so
    it is known before anything is read; equal identities are one action.
    """

    op: Op
    params: Mapping[str, Any]
    inputs: tuple[TensorRef, ...]
    outputs: tuple[TensorSpec, ...]
    identity: str

    def key(self, digests: Iterable[str]) -> str:
        """The action key, given the content digests of the inputs."""
        sink = DigestSink()
        self.describe(sink, digests)
        return sink.digest()

    @property
    def wants_gpu(self) -> bool:
        """True when it is to have a GPU to itself, whichever is free."""
        return self.params.get("device") == ANY_GPU

    def describe(self, sink: KeySink, digests: Iterable[str]) -> None:
        """Tell `sink` everything that the action key covers."""
        _describe(sink, self.op, self.params, self.inputs, digests)


@dataclass(frozen=True)
class ActionOutput:
    """Output number `index` of an action."""

    action: Action
    index: int

    @cached_property
    def identity(self) -> str:
        """Names the output's bytes before they exist."""
        return f"{self.action.identity}|{self.index}"

    @property
    def is_transient(self) -> bool:
        """Whether it is not kept longer than a build needs it."""
        op = self.action.op
        return isinstance(op, ProcessOp) and self.index in op.transient


@dataclass(frozen=True, slots=True)
class TensorRef:
    """A tensor that is known but not read: type, shape, and where its bytes will come from."""

    spec: TensorSpec
    origin: SourceTensor | ActionOutput

    @property
    def identity(self) -> str:
        """Names the tensor's bytes; two refs of one identity may differ in shape only."""
        return self.origin.identity

    def reshaped(self, *shape: int) -> TensorRef:
        """The same bytes under another shape of the same size."""
        spec = TensorSpec(self.spec.dtype, shape)
        if spec.size != self.spec.size:
            raise ValueError(f"cannot see {self.spec.shape} as {shape}")
        return TensorRef(spec, self.origin)


_LITTLE = 1 << 16
"""So many bytes are little, whatever an action reads."""

_LITTLE_OF = 512
"""And so is this part of what it reads.

What gated experts are given has sums of squares of one part in 1.5 times their width, which is 512
or more in the models that we know; a Hessian of hidden states would be one part in ten or a
hundred.
"""


def kept_unasked(action: Action) -> int:
    """So many bytes of an output of a process that nobody asked for are kept all the same.

    What is little beside what would be read to make it again, hidden states apart: a recipe that
    asks for it one day, for the ranges of keys as one with scales of a cache does, or for sums of
    squares as one with an importance matrix does, takes no pass for it.
    """
    read = sum(
        ref.spec.nbytes
        for ref in action.inputs
        if not (isinstance(ref.origin, ActionOutput) and ref.origin.is_transient)
    )
    return max(_LITTLE, read // _LITTLE_OF)


View = dict[str, TensorRef]
"""An ordered map from names to tensors; steps turn views into views."""


_MATRIX = 2
"""Axes of a weight; that of a stack of experts has one more."""


class ActionGraph:
    """All actions of one plan; adding an equal action twice gives the one that is there."""

    def __init__(self) -> None:
        self._actions: dict[str, Action] = {}

    def __iter__(self) -> Iterator[Action]:
        """Actions in the order they were added, which is a topological order."""
        return iter(self._actions.values())

    def __len__(self) -> int:
        return len(self._actions)

    def add(self, op: Op, params: Mapping[str, Any], *inputs: TensorRef) -> tuple[TensorRef, ...]:
        """Refs to the outputs of `op` applied to `inputs`."""
        outputs = op.infer(params, [ref.spec for ref in inputs])
        sink = DigestSink()
        _describe(sink, op, params, inputs, (ref.identity for ref in inputs))
        identity = sink.digest()
        action = self._actions.get(identity)
        if action is None:
            action = Action(op, params, inputs, outputs, identity)
            self._actions[identity] = action
        return tuple(
            TensorRef(spec, ActionOutput(action, index)) for index, spec in enumerate(outputs)
        )

    def add_each(
        self, op: ArrayOp, params: Mapping[str, Any], *inputs: TensorRef
    ) -> tuple[TensorRef, ...]:
        """Refs to the outputs of `op` applied to weights, or to each expert's of stacks of them."""
        stacked = len(inputs[0].spec.shape) > _MATRIX
        return self.add(Stacked(op) if stacked else op, params, *inputs)

    def network(self) -> networkx.DiGraph:
        """The graph for networkx: nodes are source tensors and actions, edges carry bytes."""
        import networkx

        graph = networkx.DiGraph()
        for action in self:
            graph.add_node(action.identity, action=action)
            for ref in action.inputs:
                origin = ref.origin
                if isinstance(origin, ActionOutput):
                    graph.add_edge(origin.action.identity, action.identity)
                else:
                    graph.add_node(origin.identity, source=origin)
                    graph.add_edge(origin.identity, action.identity)
        return graph


def _describe(
    sink: KeySink,
    op: Op,
    params: Mapping[str, Any],
    inputs: Iterable[TensorRef],
    contents: Iterable[str],
) -> None:
    write_key(
        sink,
        op=op.name,
        op_version=op.version,
        libraries=op.libraries,
        params=params,
        inputs=((ref.spec, content) for ref, content in zip(inputs, contents, strict=True)),
    )
