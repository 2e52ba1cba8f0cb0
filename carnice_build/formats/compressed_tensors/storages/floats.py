"""Storage `float-quantized`: E4M3 weights, with a scale for each row, for each block or for all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from carnice_build.formats.compressed_tensors.schemes import Weights
from carnice_build.formats.compressed_tensors.storages.base import NOT_SMOOTHED, Smoothing, Storage
from carnice_build.formats.compressed_tensors.storages.floats_ops import SUFFIXES, FloatQuantize
from carnice_build.formats.compressed_tensors.storages.row_floats_ops import RowQuantize
from carnice_build.graph import ActionGraph, TensorRef

if TYPE_CHECKING:
    from carnice_build.formats.checks import QuantizedValues, Tensors
    from carnice_build.formats.values import Floats

_NAME = "float-quantized"


def _is_fp8(weights: Weights) -> bool:
    return (weights.type, weights.num_bits, weights.scale_dtype) == ("float", 8, None)


class RowFloats(Storage):
    """E4M3 weights with a scale for each row."""

    name = _NAME
    ends = SUFFIXES

    @classmethod
    def takes(cls, weights: Weights, quantized_inputs: bool) -> bool:
        """See `Storage.takes`."""
        return _is_fp8(weights) and weights.strategy == "channel"

    def add(
        self, graph: ActionGraph, refs: Sequence[TensorRef], smoothing: Smoothing = NOT_SMOOTHED
    ) -> list[Sequence[TensorRef]]:
        """See `Storage.add`."""
        return [graph.add_each(RowQuantize(), {}, ref) for ref in refs]

    def values(self, tensors: Tensors, module: str) -> QuantizedValues:
        """See `Storage.values`."""
        from carnice_build.formats.compressed_tensors.storages.row_floats_values import RowValues

        return RowValues(tensors, module)

    def rounded(self, weights: Sequence[Floats]) -> list[Floats]:
        """See `Storage.rounded`."""
        from carnice_build.formats.compressed_tensors.storages.row_floats_values import round_trip

        return [round_trip(weight) for weight in weights]


class BlockFloats(Storage):
    """E4M3 weights with a scale for each block, or one for all."""

    name = _NAME
    ends = SUFFIXES
    knobs: ClassVar[Mapping[str, str]] = {"block": "block_structure"}

    @classmethod
    def takes(cls, weights: Weights, quantized_inputs: bool) -> bool:
        """See `Storage.takes`."""
        return _is_fp8(weights) and weights.strategy in ("block", "tensor")

    def add(
        self, graph: ActionGraph, refs: Sequence[TensorRef], smoothing: Smoothing = NOT_SMOOTHED
    ) -> list[Sequence[TensorRef]]:
        """See `Storage.add`."""
        params = {"block": self.weights.block_structure}
        return [graph.add_each(FloatQuantize(), params, ref) for ref in refs]

    def values(self, tensors: Tensors, module: str) -> QuantizedValues:
        """See `Storage.values`."""
        from carnice_build.formats.compressed_tensors.storages.floats_values import BlockValues

        return BlockValues(tensors, module, self.weights.block_structure)

    def rounded(self, weights: Sequence[Floats]) -> list[Floats]:
        """See `Storage.rounded`."""
        from carnice_build.formats.compressed_tensors.storages.floats_values import round_trip

        return [round_trip(weight, self.weights.block_structure) for weight in weights]
