"""Storage `pack-quantized`: integers, several of them in a word of 32 bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from carnice_build.dtypes import TensorSpec
from carnice_build.formats.blame import uneven
from carnice_build.formats.compressed_tensors.ops import STORAGE, SUFFIXES, GroupQuantize
from carnice_build.formats.compressed_tensors.schemes import Weights
from carnice_build.formats.compressed_tensors.storages.base import NOT_SMOOTHED, Smoothing, Storage
from carnice_build.graph import ActionGraph, TensorRef

if TYPE_CHECKING:
    from carnice_build.formats.checks import QuantizedValues, Tensors
    from carnice_build.formats.values import Floats, Values


class Packed(Storage):
    """Asymmetric INT4 in groups."""

    name = STORAGE
    ends = SUFFIXES
    knobs: ClassVar[Mapping[str, str]] = {"observer": "observer", "group_size": "group_size"}
    smooths = True

    @classmethod
    def takes(cls, weights: Weights, quantized_inputs: bool) -> bool:
        """See `Storage.takes`."""
        kind = (weights.type, weights.num_bits, weights.strategy, weights.symmetric)
        return kind == ("int", 4, "group", False) and not quantized_inputs

    @property
    def _group(self) -> int:
        assert self.weights.group_size is not None
        return self.weights.group_size

    def unfit(self, spec: TensorSpec) -> str:
        """See `Storage.unfit`."""
        return uneven(spec.shape[-1], self._group)

    def add(
        self, graph: ActionGraph, refs: Sequence[TensorRef], smoothing: Smoothing = NOT_SMOOTHED
    ) -> list[Sequence[TensorRef]]:
        """See `Storage.add`."""
        params = {
            **smoothing.used,
            "observer": self.weights.observer,
            "group_size": self._group,
        }
        op = smoothing.of_each(GroupQuantize())
        return [graph.add(op, params, ref, *smoothing.vectors) for ref in refs]

    def values(self, tensors: Tensors, module: str) -> Values:
        """See `Storage.values`."""
        from carnice_build.formats.compressed_tensors.storages.packed_values import PackedValues

        return PackedValues(tensors, module, self._group)

    def bounded(self, tensors: Tensors, module: str) -> QuantizedValues:
        """See `Storage.bounded`."""
        from carnice_build.formats.compressed_tensors.storages.packed_values import BoundedValues

        return BoundedValues(tensors, module, self._group, self.weights.observer)

    def rounded(self, weights: Sequence[Floats]) -> list[Floats]:
        """See `Storage.rounded`: in BF16, by the recipe's observer, not smoothed."""
        from carnice_build.formats.compressed_tensors.storages.packed_values import round_trip

        return [round_trip(weight, self._group, self.weights.observer) for weight in weights]
