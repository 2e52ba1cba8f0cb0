"""What a recipe says of GPTQ."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from carnice_build.recipe.schema import Strict

Norms = Literal["library", "exact"]

NORMS: Any = Field(
    "library",
    description="Hold gains 1 + w in the model's type, as llm-compressor does, which alters "
    "norms that nothing smoothed; or in float32, which leaves those alone.",
)


class GptqSpec(Strict):
    """How GPTQ works; names and defaults are the library's, but for `norms` and `keep_hessians`."""

    block_size: int = Field(128, ge=1, description="Columns that are quantized in one go.")
    dampening_frac: float = Field(
        0.01, ge=0, description="What is added to a Hessian's diagonal, of the mean of it."
    )
    actorder: Literal["static", "weight"] | None = Field(
        "static",
        description="Quantize the columns of the largest activations first (`weight` is another "
        "name for it); or, with null, in their order.",
    )
    propagate_error: bool = Field(
        True,
        description="Calibrate a layer with what the quantized layers before it make; or with what "
        "these made before they were quantized.",
    )
    norms: Norms = NORMS
    keep_hessians: bool = Field(
        False,
        description="Leave Hessians in the cache, which changes no bytes.  Without "
        "`propagate_error` other knobs then take no forward pass.",
    )

    @field_validator("actorder", mode="before")
    @classmethod
    def _offered(cls, value: Any) -> Any:
        if value in ("group", "dynamic", True):
            raise ValueError(
                f"llm-compressor has removed actorder {value}, which needed `weight_g_idx`; "
                "expected static, or null for none"
            )
        return None if value is False else value
