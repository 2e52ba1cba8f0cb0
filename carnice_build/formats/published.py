"""Folders of models that are published in FP8 or MXFP4 alone, as transformers spells them.

No format here makes them; what their weights stand for is told as a step `decode` reads it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from carnice_build.checkpoint.quantized import quantized_weights, stated_quantization
from carnice_build.formats.checks import FolderReader, Tensors
from carnice_build.formats.scheme import Scheme
from carnice_build.formats.values import PlainValues, Values
from carnice_build.models.base import Architecture
from carnice_build.tensors import stacks

_METHODS: Mapping[str, Scheme] = {
    "fp8": Scheme(8, kind="float"),
    "mxfp4": Scheme(4, kind="float", name="MXFP4"),
}


class PublishedReader(FolderReader):
    """Folders whose weights are codes and scales, each decoded as a whole."""

    suffixes = ()

    @classmethod
    def reads(cls, config: Mapping[str, Any]) -> bool:
        """By transformers' own methods."""
        return (stated_quantization(config) or {}).get("quant_method") in list(_METHODS)

    def parts(self, tensors: Tensors, architecture: Architecture) -> Mapping[str, Tensors]:
        """The floats that a weight's codes stand for, which its scales are a part of."""

        def columns(name: str) -> int | None:
            facts = architecture.tensors
            found = (facts[item] for item in (name, *stacks(name)) if item in facts)
            return next((fact.shape[-1] for fact in found), None)

        stated = stated_quantization(self.config) or {}
        found: dict[str, Tensors] = {}
        for weight in quantized_weights(tensors, stated, columns, "config.json").values():
            decoded = {weight.name: weight.decode("F32")}
            found |= dict.fromkeys(weight.parts.values(), decoded)
        return found

    def scheme(self, module: str) -> Scheme | None:
        """That of all that is quantized."""
        stated = stated_quantization(self.config) or {}
        return _METHODS[stated["quant_method"]]

    def values(self, tensors: Tensors, module: str) -> Values:
        """See `FolderReader.values`."""
        return PlainValues(tensors[f"{module}.weight"])
