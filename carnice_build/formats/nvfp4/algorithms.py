"""What modelopt's `quant_algo` may be: how each stores a weight, and what its configs say of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from carnice_build.formats.blame import blocks_unfit
from carnice_build.formats.nvfp4.fp8_ops import MX_BLOCK
from carnice_build.formats.nvfp4.ops import BLOCK
from carnice_build.formats.scheme import Scheme

QuantAlgo = Literal["NVFP4", "FP8", "W4A16_NVFP4", "MXFP8"]

MIXED = "MIXED_PRECISION"
"""What the configs state of a folder whose modules have several."""


@dataclass(frozen=True, slots=True)
class Algorithm:
    """One way to store linears.

    `suffixes` end the names of a module's tensors, `activations` says how engines round its inputs,
    nothing where they do not; `calibrated` that they do so under a scale from a calibration.
    `grouped` says that a folder of this alone states `config_groups`, as all do but MXFP8.
    """

    name: QuantAlgo
    title: str
    scheme: Scheme
    suffixes: tuple[str, ...]
    activations: str
    calibrated: bool
    grouped: bool = True

    def unfit(self, columns: int) -> str:
        """Why rows of so many weights do not fit, nothing where they do."""
        size = self.scheme.group_size
        return "" if size is None else blocks_unfit(columns, size)

    @property
    def of_layer(self) -> dict[str, Any]:
        """What is stated of a module, or of all."""
        return {"quant_algo": self.name, **self._blocks}

    @property
    def group(self) -> dict[str, Any]:
        """A config group, without its targets."""
        numbers = {
            "dynamic": False,
            "num_bits": self.scheme.bits,
            "type": "float",
            **self._blocks,
        }
        parts = ("input_activations", "weights") if self.activations else ("weights",)
        return dict.fromkeys(parts, numbers)

    @property
    def _blocks(self) -> dict[str, int]:
        size = self.scheme.group_size
        return {} if size is None else {"group_size": size}


_PACKED = ("weight", "weight_scale", "weight_scale_2")

ALGORITHMS: Mapping[str, Algorithm] = {
    item.name: item
    for item in (
        Algorithm(
            "NVFP4",
            "E2M1 weights in blocks of 16, E4M3 block scales, float32 tensor scales",
            Scheme(4, BLOCK, "float"),
            (*_PACKED, "input_scale"),
            "NVFP4",
            calibrated=True,
        ),
        Algorithm(
            "FP8",
            "E4M3 weights, a float32 scale a tensor",
            Scheme(8, None, "float"),
            ("weight", "weight_scale", "input_scale"),
            "FP8",
            calibrated=True,
        ),
        Algorithm(
            "W4A16_NVFP4",
            "E2M1 weights in blocks of 16, E4M3 block scales, float32 tensor scales",
            Scheme(4, BLOCK, "float"),
            _PACKED,
            "",
            calibrated=False,
        ),
        Algorithm(
            "MXFP8",
            "E4M3 weights in blocks of 32 under powers of two",
            Scheme(8, MX_BLOCK, "float"),
            ("weight", "weight_scale"),
            "MXFP8",
            calibrated=False,
            grouped=False,
        ),
    )
}
