"""How the weight of a quantized module is stored, in the terms that all formats have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Scheme:
    """`bits` a weight, and a scale for each `group_size` inputs; None for one for each output.

    `name` is what people call a way to store floats that bits and groups alone do not tell.
    """

    bits: int
    group_size: int | None = None
    kind: Literal["int", "float"] = "int"
    name: str | None = None

    def __str__(self) -> str:
        width = f"FP{self.bits}" if self.kind == "float" else f"{self.bits}-bit"
        width = self.name or width
        return width if self.group_size is None else f"{width} g{self.group_size}"
