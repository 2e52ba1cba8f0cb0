"""For which library a folder is made: mlx-lm runs text models, mlx-vlm those that see as well."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum


class Target(StrEnum):
    """The library that a folder is for, by its name on PyPI."""

    MLX_LM = "mlx-lm"
    MLX_VLM = "mlx-vlm"


@dataclass(frozen=True)
class Answerer:
    """Who says what a library makes of a checkpoint: a module, and the extra that installs it."""

    module: str
    extra: str


ANSWERERS: Mapping[Target, Answerer] = {
    Target.MLX_LM: Answerer("carnice_build.backends.mlx_trace", "mlx"),
    Target.MLX_VLM: Answerer("carnice_build.backends.mlx_vlm_trace", "mlxvlm"),
}
