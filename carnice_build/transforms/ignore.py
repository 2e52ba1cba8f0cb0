"""Which modules a variant leaves unquantized, under every name that a serving engine asks for."""

from __future__ import annotations

from collections.abc import Collection, Container

from carnice_build.architectures.base import Architecture, Role
from carnice_build.graph import View


def unquantized_modules(
    view: View, quantized: Container[str], architecture: Architecture, roles: Collection[Role]
) -> list[str]:
    """Paths of the modules of `roles` that stay plain, and of those that an engine fuses from them.

    An engine that runs several linears as one looks up the fused name alone: without it an MTP
    head in BF16 is taken for a quantized one, and drafts nothing.
    """
    plain = plain_modules(view, quantized, architecture, roles)
    fused = [
        fusion.module
        for fusion in architecture.fusions
        if all(part in plain for part in fusion.parts)
    ]
    return sorted([*plain, *fused])


def plain_modules(
    view: View, quantized: Container[str], architecture: Architecture, roles: Collection[Role]
) -> dict[str, None]:
    """Paths of the modules of `roles` that stay plain, in the order of the model."""
    return {
        fact.module: None
        for fact in architecture.tensors.values()
        if fact.role in roles and fact.name in view and fact.module not in quantized
    }
