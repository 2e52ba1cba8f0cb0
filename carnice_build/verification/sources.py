"""What a variant is made from: the sources' tensors by canonical name, before any is quantized."""

from __future__ import annotations

from carnice_build.planning.planner import VariantPlan
from carnice_build.tensors import SourceTensor
from carnice_build.verification.torch_worker import StoredModel


def source_tensors(variant: VariantPlan) -> dict[str, SourceTensor]:
    """The source tensor behind each tensor of the variant, by canonical name."""
    published = {tensor.fact.module for tensor in variant.conversion.tensors}
    # Several may be published as one tensor, which is told of the first.
    modules = published | set(variant.conversion.quantized)
    found = {}
    for name, ref in variant.view.items():
        if name.rpartition(".")[0] not in modules:
            continue
        origin = ref.origin
        while not isinstance(origin, SourceTensor):
            origin = origin.action.inputs[0].origin
        found[name] = origin
    return found


def local_source(variant: VariantPlan) -> StoredModel | None:
    """The unquantized model in torch, or nothing where a file of it is not on this machine."""
    tensors = source_tensors(variant)
    if all(tensor.file and tensor.file.local for tensor in tensors.values()):
        return StoredModel(variant.architecture, tensors)
    return None
