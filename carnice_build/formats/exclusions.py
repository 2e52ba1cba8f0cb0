"""Which modules a variant leaves unquantized, under every name that a serving engine asks for.

An engine builds the modules of the model that config.json describes, and quantizes each that it
does not find listed: a head that is tied to the embedding and a vision tower without tensors too.
So what is listed follows from the config's architecture, and not from the tensors of the folder.
"""

from __future__ import annotations

from collections.abc import Collection, Container

from carnice_build.models.base import Architecture, Role


def unquantized_modules(
    architecture: Architecture, quantized: Container[str], roles: Collection[Role]
) -> list[str]:
    """Paths of the modules of `roles` that stay plain, and of those that an engine fuses from them.

    An engine that runs several linears as one looks up the fused name alone: without it an MTP
    head in BF16 is taken for a quantized one, and drafts nothing.
    """
    plain = plain_modules(architecture, quantized, roles)
    fused = [
        fusion.module
        for fusion in architecture.fusions
        if all(part in plain for part in fusion.parts)
    ]
    return sorted([*plain, *fused])


def plain_modules(
    architecture: Architecture, quantized: Container[str], roles: Collection[Role]
) -> dict[str, None]:
    """Paths of the modules of `roles` that stay plain, in the order of the model."""
    return {
        fact.module: None
        for fact in architecture.built.values()
        if fact.role in roles and fact.module not in quantized
    }
