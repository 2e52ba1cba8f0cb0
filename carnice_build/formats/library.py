"""The libraries that run folders."""

from __future__ import annotations

from enum import StrEnum


class Library(StrEnum):
    """What computes a model's forward pass."""

    MLX_LM = "mlx-lm"
    MLX_VLM = "mlx-vlm"
    MLX_VLM_DRAFTER = "mlx-vlm drafter"
    TRANSFORMERS = "transformers"
    LLAMA_CPP = "llama.cpp"
    """Here, torch on the dequantized weights stands in for it."""
