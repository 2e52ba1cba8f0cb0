"""What a recipe can do about tensors that its model does not have."""

from __future__ import annotations

from collections.abc import Sequence

from carnice_build.errors import PlanError, nearest, together
from carnice_build.models.base import Architecture
from carnice_build.tensors import stacks

BUFFERS = frozenset(
    {
        "_extra_state",
        "cos_cached",
        "inv_freq",
        "masked_bias",
        "num_batches_tracked",
        "original_inv_freq",
        "position_ids",
        "sin_cached",
    }
)
"""Ends of the names of what is no weight: a model computes it, or a training library left it."""

_ADAPTER = "an adapter"
_ADAPTER_PARTS = ("lora_A", "lora_B", "lora_magnitude_vector", "base_layer")
"""What peft calls the tensors of an adapter, and those that it wraps."""


def unknown_tensors(names: Sequence[str], architecture: Architecture, where: str) -> PlanError:
    """The error for the tensors `names`, of which the model has none.

    Those that one step helps against are told as one.
    """
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(_kind(name), []).append(name)

    def error(kind: str) -> PlanError:
        first, *more = kinds[kind]
        others = f" and {len(more)} more like it are" if more else " is"
        hint = _hint(kind, kinds[kind], architecture)
        return PlanError(
            f"tensor {first!r}{others} not one of {architecture.name}",
            where=where,
            expected=hint,
            nearest=None if hint else nearest(first, architecture.tensors),
        )

    what = f"{len(names)} tensors are not of {architecture.name}"
    return together(list(kinds), error, what, where)


def _kind(name: str) -> str:
    """What a tensor has in common with others of its kind; its name when it is one of its own."""
    parts = name.split(".")
    if parts[-1] in BUFFERS:
        return parts[-1]
    return name if set(_ADAPTER_PARTS).isdisjoint(parts) else _ADAPTER


def _hint(kind: str, names: Sequence[str], architecture: Architecture) -> str | None:
    if kind in BUFFERS:
        # A glob covers the whole name, so that of a bare one has no dot.
        dot = "" if kind in names else "."
        return f"a step that leaves them out: `- drop: {{match: '*{dot}{kind}'}}`"
    if kind == _ADAPTER:
        return "the weights with the adapter merged into them, by peft's `merge_and_unload`"
    if stack := _stack(kind, architecture):
        return f"experts 0 to {stack - 1} by its config"
    canonical = architecture.canonical_name(kind)
    return f"rename it to {canonical!r} in a `rename` step" if canonical else None


def _stack(name: str, architecture: Architecture) -> int | None:
    """How many experts there are of the stack that `name` would be one of."""
    found = (architecture.tensors.get(stack) for stack in stacks(name))
    return next((fact.shape[0] for fact in found if fact), None)
