"""Weights of a quantized checkpoint that are to be published with the codes that they have."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from carnice_build.graph import View
from carnice_build.planning.gather import part_of
from carnice_build.steps.base import Codes, PlanContext
from carnice_build.steps.decode import Decode


def coded(view: View, context: PlanContext) -> tuple[View, Mapping[str, Codes]]:
    """The view with floats for its quantized weights, and the codes by the names of their facts.

    So the weights are checked as any others are, and what is published can be compared with them.
    """
    decode = Decode.model_validate({})
    weights = decode.weights(view, context)
    codes: dict[str, Codes] = {}
    for fact in context.architecture.tensors.values():
        weight = weights.get(fact.fused.name if fact.fused else fact.name)
        if weight is None:
            continue
        codes[fact.name] = Codes(
            {weight.parts[end]: item.spec for end, item in weight.kept.items()},
            {end: part_of(fact, item) for end, item in weight.kept.items()},
        )
    return decode.apply(view, context), codes


def kept_as_they_are(codes: Mapping[str, Codes]) -> Iterator[str]:
    """What a plan says of them, if there are any."""
    if not codes:
        return
    first, *more = codes
    others = f" and {len(more)} more" if more else ""
    yield f"{first}{others} stay quantized as they are; a step `decode` would quantize them anew"
