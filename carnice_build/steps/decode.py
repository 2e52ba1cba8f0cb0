"""Step `decode`: take quantized weights for the floats they stand for; moves no byte."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field

from carnice_build.checkpoint.quantized import (
    Weight,
    of_activations,
    quantized_weights,
    stated_quantization,
)
from carnice_build.dtypes import FLOAT_NAMES
from carnice_build.errors import PlanError
from carnice_build.graph import TensorRef, View
from carnice_build.recipe.patterns import Patterns
from carnice_build.recipe.schema import Expectation, PatternList
from carnice_build.steps.base import PlanContext, Step, require_match
from carnice_build.tensors import SourceTensor, stacks


class Decode(Step):
    """Read the weights of a quantized model as the floats they stand for.

    It says that a quantized model is meant to be quantized again, which is refused without it.
    Weights are decoded while they are read, and no copy of them is written.
    Scales of activations and of the KV cache are left out.
    """

    decodes: ClassVar[bool] = True

    match: PatternList | None = Field(
        None, description="Names of the weights to decode, as in `*.weight`; all without it."
    )
    dtype: Literal["bfloat16", "float16", "float32"] = Field(
        "bfloat16", description="Type of the floats."
    )
    expect: Expectation = Field(None, description="How many weights must be decoded.")

    def apply(self, view: View, context: PlanContext) -> View:
        """The view with each decoded weight in the place of its first tensor."""
        return self._decoded(view, self._chosen(self.weights(view, context), context))

    def weights(self, view: View, context: PlanContext) -> Mapping[str, Weight]:
        """The quantized weights of a view, by their plain names."""
        body = context.body
        stated = stated_quantization(body.config)
        if stated is None:
            raise PlanError(
                "there is nothing to decode: config.json states no quantization",
                where=body.where,
                expected="no step `decode`",
            )
        sources = {name: ref.origin for name, ref in view.items()}
        tensors = {name: item for name, item in sources.items() if isinstance(item, SourceTensor)}

        def columns(name: str) -> int | None:
            facts = context.architecture.tensors
            found = (facts[item] for item in (name, *stacks(name)) if item in facts)
            return next((fact.shape[-1] for fact in found), None)

        return quantized_weights(tensors, stated, columns, body.where)

    def _chosen(self, weights: Mapping[str, Weight], context: PlanContext) -> list[Weight]:
        patterns = Patterns(self.match or "*")
        names = require_match(patterns, list(weights), "quantized weight")
        context.check_count(self.expect, patterns, len(names), derive=False)
        return [weights[name] for name in names]

    def _decoded(self, view: View, weights: list[Weight]) -> View:
        dtype = FLOAT_NAMES[self.dtype]
        owners = {part: weight for weight in weights for part in weight.parts.values()}
        gone = of_activations(view)
        made: View = {}
        for name, ref in view.items():
            weight = owners.get(name)
            if weight is None:
                if name not in gone:
                    made[name] = ref
            elif weight.name not in made:
                tensor = weight.decode(dtype)
                made[weight.name] = TensorRef(tensor.spec, tensor)
        return made
