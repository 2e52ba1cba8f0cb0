"""What a variant is made from: the sources' tensors by canonical name, before any is quantized."""

from __future__ import annotations

from carnice_build.planning.planner import VariantPlan
from carnice_build.tensors import SourceTensor


def source_tensors(variant: VariantPlan) -> dict[str, SourceTensor]:
    """The source tensor behind each tensor of the variant, by canonical name."""
    names = dict.fromkeys(tensor.fact.name for tensor in variant.conversion.tensors)
    found = {}
    for name in names:
        origin = variant.view[name].origin
        while not isinstance(origin, SourceTensor):
            origin = origin.action.inputs[0].origin
        found[name] = origin
    return found
