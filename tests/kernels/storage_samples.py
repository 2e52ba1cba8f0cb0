"""Weights as llm-compressor compresses them, and where ours and its bits are compared."""

from __future__ import annotations

import numpy as np
import torch
from compressed_tensors.compressors import compress_module
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationScheme,
    initialize_module_for_quantization,
    preset_name_to_scheme,
)
from int4_weights import (
    EXPONENT,
    Array,
    corners,
    finite,
    from_torch,
    ordinary,
    random_patterns,
    to_float,
    to_torch,
)
from llmcompressor.entrypoints.model_free.lifecycle import calibrate_weight
from torch import nn

Tensors = dict[str, torch.Tensor]


def preset(name: str) -> QuantizationScheme:
    """A scheme by the library's name."""
    scheme: QuantizationScheme = preset_name_to_scheme(name, ["Linear"])
    return scheme


def integers(
    bits: int, group_size: int | None, symmetric: bool, storage: str
) -> QuantizationScheme:
    """A scheme of integers; of channels without a `group_size`."""
    weights = QuantizationArgs(
        num_bits=bits,
        type="int",
        strategy="group" if group_size else "channel",
        group_size=group_size,
        symmetric=symmetric,
    )
    return QuantizationScheme(targets=["Linear"], weights=weights, format=storage)


def compressed(weight: Array, dtype: str, scheme: QuantizationScheme) -> Tensors:
    """The tensors of weights that `oneshot` of llm-compressor makes of a linear's.

    Its `model_free_ptq` gives no zero point where codes are symmetric, and so keeps the sign of
    negative zero in E4M3; there is no other difference.
    """
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(to_torch(weight, dtype), requires_grad=False)
    initialize_module_for_quantization(linear, scheme)
    calibrate_weight(linear)
    compress_module(linear)
    found: Tensors = linear.state_dict()
    return {name: tensor for name, tensor in found.items() if name.startswith("weight")}


def content(tensor: torch.Tensor) -> bytes:
    """The bytes of a tensor of whatever type."""
    if tensor.dtype == torch.float8_e4m3fn:
        tensor = tensor.view(torch.uint8)
    return from_torch(tensor.detach()).tobytes()


def assorted(dtype: str, largest: float = 50000) -> Array:
    """Ordinary weights, corners, and any patterns, none of larger magnitude; 128 columns."""
    parts = [ordinary(dtype, (35, 128)), corners(dtype), random_patterns(dtype, (38, 128))]
    weight = np.concatenate(parts)
    return np.where(np.abs(to_float(weight, dtype)) <= largest, weight, weight.dtype.type(0))


def every_pattern(dtype: str, exponent: int) -> Array:
    """Every 16-bit value (of F32, every upper half), larger exponents lowered to `exponent`."""
    every = np.arange(1 << 16, dtype=np.uint16)
    if dtype == "F32":
        every = (every.astype(np.uint32) << 16) | 0x8000
    step = EXPONENT[dtype] & -EXPONENT[dtype]
    return finite(every, dtype, (exponent + 1) * step).reshape(-1, 128).copy()


def exponents(dtype: str, count: int) -> list[int]:
    """Some of a type's exponents, the smallest and the second largest among them."""
    top = EXPONENT[dtype] // (EXPONENT[dtype] & -EXPONENT[dtype])
    return np.linspace(0, top - 2, count, dtype=int).tolist()
