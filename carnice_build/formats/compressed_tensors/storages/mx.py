"""Storages `mxfp4-pack-quantized` and `mxfp8-quantized`: scales that are powers of two."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from carnice_build.dtypes import TensorSpec
from carnice_build.formats.compressed_tensors.schemes import Weights
from carnice_build.formats.compressed_tensors.storages import mx_ops
from carnice_build.formats.compressed_tensors.storages.base import NOT_SMOOTHED, Smoothing, Storage
from carnice_build.graph import ActionGraph, TensorRef

if TYPE_CHECKING:
    from carnice_build.formats.checks import QuantizedValues, Tensors
    from carnice_build.formats.values import Floats


class _Mx(Storage):
    """Floats in blocks of 32."""

    bits: ClassVar[int]

    @classmethod
    def takes(cls, weights: Weights, quantized_inputs: bool) -> bool:
        """See `Storage.takes`."""
        kind = (weights.type, weights.num_bits, weights.strategy, weights.group_size)
        scales = weights.scale_dtype == "torch.uint8"
        return kind == ("float", cls.bits, "group", mx_ops.BLOCK) and scales

    def unfit(self, spec: TensorSpec) -> str:
        """See `Storage.unfit`."""
        return mx_ops.unfit(spec)

    def add(
        self, graph: ActionGraph, refs: Sequence[TensorRef], smoothing: Smoothing = NOT_SMOOTHED
    ) -> list[Sequence[TensorRef]]:
        """See `Storage.add`."""
        params = {"bits": self.bits}
        return [graph.add_each(mx_ops.MxQuantize(), params, ref) for ref in refs]

    def values(self, tensors: Tensors, module: str) -> QuantizedValues:
        """See `Storage.values`."""
        from carnice_build.formats.compressed_tensors.storages.mx_values import MxValues

        return MxValues(tensors, module, self.bits)

    def rounded(self, weights: Sequence[Floats]) -> list[Floats]:
        """See `Storage.rounded`."""
        from carnice_build.formats.compressed_tensors.storages.mx_values import round_trip

        return [round_trip(weight, self.bits) for weight in weights]


class Mxfp4(_Mx):
    """E2M1, two in a byte."""

    name = "mxfp4-pack-quantized"
    ends = mx_ops.SUFFIXES[4]
    bits = 4


class Mxfp8(_Mx):
    """E4M3."""

    name = "mxfp8-quantized"
    ends = mx_ops.SUFFIXES[8]
    bits = 8
