"""Which modules a folder leaves unquantized, under every name that a serving engine asks for."""

from __future__ import annotations

from carnice_build.architectures.base import Role
from carnice_build.package.base import Variant

_MODULES = (Role.LINEAR, Role.EMBEDDING, Role.CONV)


def unquantized_modules(variant: Variant) -> list[str]:
    """Paths of all modules with a plain weight, and of those that an engine fuses from them.

    An engine that runs several linears as one looks up the fused name alone: without it an MTP
    head in BF16 is taken for a quantized one, and drafts nothing.
    """
    published = {name for shard in variant.shards for name, _, _ in shard.tensors}
    plain = {
        fact.module
        for fact in variant.architecture.tensors.values()
        if fact.role in _MODULES and fact.name in published and fact.module not in variant.quantized
    }
    fused = {
        fusion.module
        for fusion in variant.architecture.fusions
        if all(part in plain for part in fusion.parts)
    }
    return sorted(plain | fused)
