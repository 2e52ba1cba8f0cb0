"""The ways in which compressed-tensors stores weights, and which of them a scheme takes."""

from __future__ import annotations

from carnice_build.formats.compressed_tensors.schemes import ConfigGroup, Weights
from carnice_build.formats.compressed_tensors.storages.base import Storage
from carnice_build.formats.compressed_tensors.storages.floats import BlockFloats, RowFloats
from carnice_build.formats.compressed_tensors.storages.mx import Mxfp4, Mxfp8
from carnice_build.formats.compressed_tensors.storages.nvfp4 import Nvfp4
from carnice_build.formats.compressed_tensors.storages.packed import Bytes, Packed

STORAGES: tuple[type[Storage], ...] = (
    RowFloats,
    BlockFloats,
    Bytes,
    Packed,
    Nvfp4,
    Mxfp4,
    Mxfp8,
)


def storage_of(weights: Weights, *, quantized_inputs: bool) -> Storage | None:
    """How the library stores weights of a scheme, which inputs decide too; None if not here."""
    for kind in STORAGES:
        if kind.takes(weights, quantized_inputs):
            return kind(weights)
    return None


def stored(group: ConfigGroup) -> Storage | None:
    """How weights of a group of a recipe are stored; see `storage_of`."""
    return storage_of(group.weights, quantized_inputs=group.input_activations is not None)


def known_storage(group: ConfigGroup) -> Storage:
    """The same of a group that was checked when its recipe was read."""
    found = stored(group)
    assert found is not None, "checked when the recipe was read"
    return found


def all_suffixes() -> tuple[str, ...]:
    """The ends of the names of a module's tensors in whatever storage."""
    return tuple(dict.fromkeys(end for kind in STORAGES for end in kind.ends))


INPUT_SUFFIXES = {8: "input_scale", 4: "input_global_scale"}
"""By the bits of inputs, the end of the name of a module's stored scale."""
