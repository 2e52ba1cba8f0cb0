"""Storage `float-quantized` with a scale for each row: FP8 weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from carnice_build.formats.compressed_tensors.schemes import Weights
from carnice_build.formats.compressed_tensors.storages.base import NOT_SMOOTHED, Smoothing, Storage
from carnice_build.formats.compressed_tensors.storages.row_floats_ops import SUFFIXES, RowQuantize
from carnice_build.graph import ActionGraph, TensorRef

if TYPE_CHECKING:
    from carnice_build.formats.checks import QuantizedValues, Tensors
    from carnice_build.formats.values import Floats, Values


class RowFloats(Storage):
    """E4M3 weights with a scale for each row."""

    name = "float-quantized"
    ends = SUFFIXES

    @classmethod
    def takes(cls, weights: Weights, quantized_inputs: bool) -> bool:
        """See `Storage.takes`."""
        return (weights.type, weights.num_bits, weights.strategy) == ("float", 8, "channel")

    def add(
        self, graph: ActionGraph, refs: Sequence[TensorRef], smoothing: Smoothing = NOT_SMOOTHED
    ) -> list[Sequence[TensorRef]]:
        """See `Storage.add`."""
        return [graph.add_each(RowQuantize(), {}, ref) for ref in refs]

    def values(self, tensors: Tensors, module: str) -> Values:
        """See `Storage.values`."""
        from carnice_build.formats.compressed_tensors.storages.row_floats_values import RowValues

        return RowValues(tensors, module)

    def bounded(self, tensors: Tensors, module: str) -> QuantizedValues:
        """See `Storage.bounded`."""
        from carnice_build.formats.compressed_tensors.storages.row_floats_values import (
            BoundedValues,
        )

        return BoundedValues(tensors, module)

    def rounded(self, weights: Sequence[Floats]) -> list[Floats]:
        """See `Storage.rounded`."""
        from carnice_build.formats.compressed_tensors.storages.row_floats_values import round_trip

        return [round_trip(weight) for weight in weights]
