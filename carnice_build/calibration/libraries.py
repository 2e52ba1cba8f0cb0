"""The libraries that decide what a decoder layer computes."""

from __future__ import annotations

LAYER_LIBRARIES = (
    "torch",
    "transformers",
    "flash-linear-attention",
    "causal-conv1d",
    "mamba-ssm",
)
"""Of every op that runs `driver.LayerDriver`.

transformers takes the last three in place of its own code when they are there.
"""
