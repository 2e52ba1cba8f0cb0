"""Weights in the pack-quantized format, through llm-compressor's observers and compressed-tensors.

Needs the `llmcompressor` extra; to be imported in worker processes alone.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from compressed_tensors.compressors import compress_module
from compressed_tensors.quantization import QuantizationScheme, initialize_module_for_quantization
from llmcompressor.modifiers.quantization.calibration import (
    initialize_observer,
    observe,
    update_qparams,
)
from loguru import logger
from torch import Tensor, nn

logger.disable("llmcompressor")
logger.disable("compressed_tensors")

Observer = Literal["mse", "memoryless_minmax"]


@dataclass(frozen=True, slots=True)
class WeightScheme:
    """How the integers of a weight are chosen, in the words of compressed-tensors."""

    num_bits: int = 4
    group_size: int | None = 128
    strategy: Literal["group", "channel"] = "group"
    symmetric: bool = False

    def group(self, targets: list[str], observer: Observer) -> dict[str, Any]:
        """The entry of `config_groups` that gives `targets` this scheme."""
        weights = {**asdict(self), "type": "int", "dynamic": False, "observer": observer}
        return {"targets": targets, "weights": weights}


def quantize_module(weight: Tensor, observer: Observer, scheme: WeightScheme) -> dict[str, Tensor]:
    """What stands on disk for a linear's `weight` [out, in]: tensors by the end of their name.

    For 4 bits: `weight_packed` I32 [out, in / 8], `weight_scale` [out, in / group_size] of the
    weight's type, `weight_zero_point` I32 [out / 8, in / group_size], `weight_shape` I64 [2].
    A symmetric scheme has no zero point.
    """
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    with quiet(), torch.no_grad():
        group = QuantizationScheme.model_validate(scheme.group(["Linear"], observer))
        initialize_module_for_quantization(linear, group)
        initialize_observer(linear, "weight")
        observe(linear, "weight")
        update_qparams(linear, "weight")
        del linear.weight_observer
        compress_module(linear)
    return {name: tensor.detach() for name, tensor in linear.state_dict().items()}


@contextmanager
def quiet() -> Iterator[None]:
    """Keep llm-compressor's bars and warnings from this process's output."""
    with redirect_stderr(io.StringIO()), warnings.catch_warnings(action="ignore"):
        yield
