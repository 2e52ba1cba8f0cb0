"""Work in numbers, and how much of it machines do in a second.

What the rates are of, and where they were measured, is in docs/scaling.md; a `carnice.toml` may
have others.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field


class Kind(StrEnum):
    """What work is done alike, and so at one rate."""

    KERNEL = "kernel"
    """Bytes that go into a loop over weights: quantizing, packing, casting."""
    MSE = "mse"
    """Bytes that go into a search of the range with the least error, group by group."""
    FORWARD = "forward"
    """Operations of a pass through a decoder layer."""
    RECURRENT = "recurrent"
    """The same where the layer has linear attention, in plain torch."""
    AWQ = "awq"
    """Operations of AWQ's search in a layer."""
    AUTOROUND = "autoround"
    """Operations of AutoRound's tuning of a layer, there and back."""


PASSES = frozenset({Kind.FORWARD, Kind.RECURRENT, Kind.AWQ, Kind.AUTOROUND})
"""What is done in operations, by a GPU or by some cores; all else is in bytes, by any core."""


@dataclass(frozen=True, slots=True)
class Work:
    """So many operations on floats, a product and its sum being two, or so many bytes."""

    kind: Kind
    amount: float


Rate = Annotated[float, Field(ge=1, allow_inf_nan=False)]
"""One at least, so that no time is infinite."""


class Rates(BaseModel):
    """What machines do in a second: operations (`*_forward` and the like), or else bytes.

    Those of a GPU were measured on an NVIDIA H100, those of a core and of a disk on two cores of
    shared machines.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    gpu_forward: Rate = 113e12
    gpu_recurrent: Rate = 51e12
    gpu_awq: Rate = 204e12
    gpu_autoround: Rate = 114e12
    gpu_load: Rate = 7.4e9
    """Bytes of a layer, on their way to the GPU."""

    core_forward: Rate = 0.26e12
    core_recurrent: Rate = 0.22e12
    core_awq: Rate = 0.26e12
    core_autoround: Rate = 0.26e12
    core_read: Rate = 3.3e9
    """Bytes of sources that are read and digested."""
    core_receive: Rate = 20e9
    """Bytes that come over the wire; on top of reading them."""
    core_decode: Rate = 2.3e9
    """Bytes of floats that quantized sources stand for."""
    core_kernel: Rate = 3.3e9
    core_mse: Rate = 0.06e9

    disk_read: Rate = 1.2e9
    disk_write: Rate = 1.6e9

    def gpu(self, kind: Kind) -> float:
        """Operations of a pass that a GPU does."""
        return float(getattr(self, f"gpu_{kind}"))

    def core(self, kind: Kind) -> float:
        """Operations or bytes that one core does."""
        return float(getattr(self, f"core_{kind}"))
