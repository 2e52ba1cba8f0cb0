"""What engines make of the inputs of linears, of schemes that quantize these too."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from carnice_build.formats.checks import Rounding
from carnice_build.formats.compressed_tensors.schemes import Activations, Weights
from carnice_build.formats.compressed_tensors.storages import storage_of
from carnice_build.formats.nvfp4.stored import nvfp4_rounded


def rounding(inputs: Activations | None, scale_2: float | None = None) -> Rounding | None:
    """What is made of rows of inputs, each of which is a token; None where they stay.

    A scale that is found for a token is found as that of a row of a weight is.
    Under a stored global scale NVFP4 is rounded as modelopt's `scale_2`, its inverse, has it; what
    is under one stored scale in FP8 counts as it is.
    """
    if inputs is None or inputs.dynamic is False:
        return None
    if inputs.dynamic == "local":
        return None if scale_2 is None else partial(nvfp4_rounded, scale=scale_2)
    strategy = "channel" if inputs.strategy == "token" else inputs.strategy
    alike = Weights.model_validate(
        {
            "num_bits": inputs.num_bits,
            "type": inputs.type,
            "symmetric": inputs.symmetric,
            "group_size": inputs.group_size,
            "scale_dtype": inputs.scale_dtype,
            "strategy": strategy,
        }
    )
    storage = storage_of(alike, quantized_inputs=True)
    return None if storage is None else (lambda rows: storage.rounded([rows])[0])


def rounds(groups: Sequence[Activations | None]) -> str:
    """What tables call a model whose inputs are rounded; nothing where none are."""
    kinds = {
        f"{'FP' if inputs.type == 'float' else 'INT'}{inputs.num_bits}"
        for inputs in groups
        if inputs and rounding(inputs, 1.0)
    }
    return f"activations in {' and '.join(sorted(kinds))}" if kinds else ""
