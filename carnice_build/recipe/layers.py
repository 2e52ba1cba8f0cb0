"""Sets of decoder layers by position, as fractions of however many there are."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    WithJsonSchema,
)


def _check_position(value: Any) -> str:
    text = str(value)
    match = re.fullmatch(r"(\d{1,4})(?:/(\d{1,4}))?", text)
    if not match or match[2] == "0" * len(match[2] or "x"):
        raise ValueError(f"{text!r} is not a layer number or a fraction such as 7/8")
    return text


Position = Annotated[
    str, BeforeValidator(_check_position), WithJsonSchema({"type": ["integer", "string"]})
]


class LayerSpan(BaseModel):
    """A run of layers: from `from` up to but without `to`, every `every`-th from `start` on.

    A position is a layer number, or a fraction of the layer count rounded down: with 64 layers,
    `1/8` is 8.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    begin: Position = Field("0", alias="from", description="First layer, or a fraction of all.")
    end: Position = Field("1/1", alias="to", description="Layer after the last, or a fraction.")
    every: int = Field(1, ge=1, description="Take one layer in this many.")
    start: int = Field(0, ge=0, description="Layers to pass over before the first one taken.")

    def layers(self, count: int) -> range:
        """The layers of the run in a model of `count` layers."""
        begin, end = _resolve(self.begin, count), _resolve(self.end, count)
        return range(begin + self.start, min(end, count), self.every)


def _resolve(position: str, count: int) -> int:
    numerator, _, denominator = position.partition("/")
    return int(numerator) * count // int(denominator) if denominator else int(numerator)


MAX_SPANS = 100


def _check_set(spans: list[LayerSpan]) -> list[LayerSpan]:
    if not spans:
        raise ValueError("an empty set of layers")
    if len(spans) > MAX_SPANS:
        raise ValueError(f"more than {MAX_SPANS} runs of layers")
    return spans


LayerSet = Annotated[list[LayerSpan], AfterValidator(_check_set)]


def layers_in(spans: list[LayerSpan], count: int) -> frozenset[int]:
    """The union of `spans` in a model of `count` layers."""
    return frozenset(layer for span in spans for layer in span.layers(count))
