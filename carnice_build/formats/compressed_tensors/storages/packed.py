"""Storages of integers: `pack-quantized`, several in a word of 32 bits, and `int-quantized`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from carnice_build.dtypes import TensorSpec
from carnice_build.formats.blame import uneven
from carnice_build.formats.compressed_tensors import ops
from carnice_build.formats.compressed_tensors.schemes import Weights
from carnice_build.formats.compressed_tensors.storages import ints_ops
from carnice_build.formats.compressed_tensors.storages.base import NOT_SMOOTHED, Smoothing, Storage
from carnice_build.graph import ActionGraph, TensorRef

if TYPE_CHECKING:
    from carnice_build.formats.checks import QuantizedValues, Tensors
    from carnice_build.formats.compressed_tensors.storages.integers_values import Integers
    from carnice_build.formats.values import Floats


class _Integers(Storage):
    """Integers of 2 to 8 bits, in groups or with a scale for each row."""

    knobs: ClassVar[Mapping[str, str]] = {
        "bits": "num_bits",
        "group_size": "group_size",
        "symmetric": "symmetric",
    }
    packed: ClassVar[bool]
    quantized_inputs: ClassVar[bool]
    """Integers whose inputs are quantized too are stored otherwise than others."""

    @classmethod
    def takes(cls, weights: Weights, quantized_inputs: bool) -> bool:
        """See `Storage.takes`."""
        kind = weights.type == "int" and weights.strategy in ("group", "channel")
        return kind and quantized_inputs == cls.quantized_inputs

    @property
    def suffixes(self) -> tuple[str, ...]:
        """See `Storage.suffixes`."""
        found = self.ends
        if self.weights.symmetric:
            found = tuple(end for end in found if end != "weight_zero_point")
        return found

    def unfit(self, spec: TensorSpec) -> str:
        """See `Storage.unfit`."""
        group = self.weights.group_size
        return "" if group is None else uneven(spec.shape[-1], group)

    def values(self, tensors: Tensors, module: str) -> QuantizedValues:
        """See `Storage.values`."""
        from carnice_build.formats.compressed_tensors.storages.integers_values import IntegerValues

        return IntegerValues(tensors, module, self._scheme(), packed=self.packed)

    def rounded(self, weights: Sequence[Floats]) -> list[Floats]:
        """See `Storage.rounded`: by the recipe's observer, not smoothed."""
        from carnice_build.formats.compressed_tensors.storages.integers_values import round_trip

        return [round_trip(weight, self._scheme()) for weight in weights]

    def _scheme(self) -> Integers:
        from carnice_build.formats.compressed_tensors.storages.integers_values import Integers

        known = self.weights
        return Integers(known.num_bits, known.group_size, known.symmetric, known.observer)


class Packed(_Integers):
    """Codes that share words of 32 bits."""

    name = ops.STORAGE
    ends = ops.SUFFIXES
    knobs: ClassVar[Mapping[str, str]] = {**_Integers.knobs, "observer": "observer"}
    packed = True
    quantized_inputs = False
    smooths = True

    def add(
        self, graph: ActionGraph, refs: Sequence[TensorRef], smoothing: Smoothing = NOT_SMOOTHED
    ) -> list[Sequence[TensorRef]]:
        """See `Storage.add`."""
        known = self.weights
        params = {
            **smoothing.used,
            "observer": known.observer,
            "group_size": known.group_size,
            **({} if known.num_bits == 4 else {"bits": known.num_bits}),
            **({"symmetric": True} if known.symmetric else {}),
        }
        op = smoothing.of_each(ops.GroupQuantize())
        return [graph.add(op, params, ref, *smoothing.vectors) for ref in refs]


class Bytes(_Integers):
    """Codes of a byte each."""

    name = "int-quantized"
    ends = ints_ops.SUFFIXES
    packed = False
    quantized_inputs = True

    @classmethod
    def takes(cls, weights: Weights, quantized_inputs: bool) -> bool:
        """See `Storage.takes`."""
        return super().takes(weights, quantized_inputs) and weights.observer != "mse"

    def add(
        self, graph: ActionGraph, refs: Sequence[TensorRef], smoothing: Smoothing = NOT_SMOOTHED
    ) -> list[Sequence[TensorRef]]:
        """See `Storage.add`."""
        known = self.weights
        params = {
            "bits": known.num_bits,
            "group_size": known.group_size,
            "symmetric": known.symmetric,
        }
        return [graph.add_each(ints_ops.IntQuantize(), params, ref) for ref in refs]
