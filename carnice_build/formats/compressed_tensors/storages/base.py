"""What a storage of compressed-tensors is: all that planning and checking ask of one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from carnice_build.dtypes import TensorSpec
from carnice_build.formats.compressed_tensors.schemes import Weights
from carnice_build.graph import ActionGraph, ArrayOp, Stacked, TensorRef

if TYPE_CHECKING:
    # These bring numpy.
    from carnice_build.formats.checks import QuantizedValues, Tensors
    from carnice_build.formats.values import Floats


@dataclass(frozen=True)
class Smoothing:
    """What AWQ found for a weight: scales of its columns, of its rows, or of both."""

    columns: TensorRef | None = None
    rows: TensorRef | None = None
    stacked: bool = False

    @property
    def vectors(self) -> Sequence[TensorRef]:
        """The scales that there are."""
        return [ref for ref in (self.columns, self.rows) if ref is not None]

    @property
    def used(self) -> Mapping[str, bool]:
        """Which there are, as ops are told."""
        return {"columns": self.columns is not None, "rows": self.rows is not None}

    def of_each(self, op: ArrayOp) -> ArrayOp:
        """`op` on a tensor and its scales; on each expert of a stack, who may share some."""
        if not self.stacked:
            return op
        vectors = enumerate(self.vectors, 1)
        return Stacked(op, [number for number, ref in vectors if len(ref.spec.shape) < 2])


NOT_SMOOTHED = Smoothing()


class Storage(ABC):
    """How the weights of modules of one scheme are stored."""

    name: ClassVar[str]
    """The library's name of it."""

    ends: ClassVar[tuple[str, ...]]
    """All ends that the names of a module's tensors may have."""

    knobs: ClassVar[Mapping[str, str]] = {}
    """By the parameters of its op, the knobs of `weights` that they are."""

    shares: ClassVar[bool] = False
    """Whether there is a scale that linears which engines fuse share."""

    smooths: ClassVar[bool] = False
    """Whether its op can smooth a weight as it quantizes it."""

    def __init__(self, weights: Weights) -> None:
        self.weights = weights

    @classmethod
    @abstractmethod
    def takes(cls, weights: Weights, quantized_inputs: bool) -> bool:
        """Whether the library stores weights of this scheme so, and this can do it."""

    @property
    def suffixes(self) -> tuple[str, ...]:
        """The ends of the names of a module's tensors, in the order of `add`."""
        return self.ends

    def unfit(self, spec: TensorSpec) -> str:
        """What of the shape of a weight does not fit, if anything; of a stack, of each."""
        return ""

    @abstractmethod
    def add(
        self, graph: ActionGraph, refs: Sequence[TensorRef], smoothing: Smoothing = NOT_SMOOTHED
    ) -> list[Sequence[TensorRef]]:
        """The tensors of each of `refs`, which share what is to be shared; each may be a stack."""

    @abstractmethod
    def values(self, tensors: Tensors, module: str) -> QuantizedValues:
        """A module of a folder; Incomparable when its numbers cannot be told.

        The bounds of its weights hold where its scales are what the scheme makes of the source.
        """

    @abstractmethod
    def rounded(self, weights: Sequence[Floats]) -> list[Floats]:
        """Weights that engines fuse, quantized and dequantized."""
