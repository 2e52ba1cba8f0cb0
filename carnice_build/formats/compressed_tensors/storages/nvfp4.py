"""Storage `nvfp4-pack-quantized`: E2M1 in blocks of 16 under E4M3 scales and a global scale."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from carnice_build.dtypes import TensorSpec
from carnice_build.formats.compressed_tensors.schemes import Weights
from carnice_build.formats.compressed_tensors.storages.base import NOT_SMOOTHED, Smoothing, Storage
from carnice_build.formats.compressed_tensors.storages.nvfp4_ops import (
    SUFFIXES,
    GlobalQuantize,
    InverseScale,
)
from carnice_build.formats.nvfp4.ops import BLOCK, BlockQuantize, unfit
from carnice_build.graph import ActionGraph, Stacked, TensorRef

if TYPE_CHECKING:
    from carnice_build.formats.checks import QuantizedValues, Tensors
    from carnice_build.formats.values import Floats


class Nvfp4(Storage):
    """NVFP4 weights; linears that engines fuse share their global scale."""

    name = "nvfp4-pack-quantized"
    ends = SUFFIXES
    shares = True

    @classmethod
    def takes(cls, weights: Weights, quantized_inputs: bool) -> bool:
        """See `Storage.takes`."""
        kind = (weights.type, weights.num_bits, weights.strategy, weights.group_size)
        scales = weights.scale_dtype == "torch.float8_e4m3fn"
        return kind == ("float", 4, "tensor_group", BLOCK) and scales

    def unfit(self, spec: TensorSpec) -> str:
        """See `Storage.unfit`."""
        return unfit(spec)

    def add(
        self, graph: ActionGraph, refs: Sequence[TensorRef], smoothing: Smoothing = NOT_SMOOTHED
    ) -> list[Sequence[TensorRef]]:
        """See `Storage.add`."""
        if self.weights.arithmetic == "modelopt":
            *made, scale_2 = graph.add_each(BlockQuantize(), {}, *refs)
            inverse = InverseScale() if len(scale_2.spec.shape) == 0 else Stacked(InverseScale())
            (scale,) = graph.add(inverse, {}, scale_2)
        else:
            *made, scale = graph.add_each(GlobalQuantize(), {}, *refs)
        return [(*made[2 * index : 2 * index + 2], scale) for index in range(len(refs))]

    def values(self, tensors: Tensors, module: str) -> QuantizedValues:
        """See `Storage.values`."""
        from carnice_build.formats.compressed_tensors.storages.nvfp4_values import GlobalValues

        return GlobalValues(tensors, module)

    def rounded(self, weights: Sequence[Floats]) -> list[Floats]:
        """See `Storage.rounded`."""
        from carnice_build.formats.compressed_tensors.storages.nvfp4_values import round_trip

        return round_trip(weights)
