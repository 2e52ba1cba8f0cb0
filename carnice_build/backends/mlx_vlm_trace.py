"""What mlx-vlm does to a checkpoint, found as `mlx_trace` finds it of mlx-lm."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from carnice_build.backends.mlx_trace import Library, module, traced
from carnice_build.dtypes import TensorSpec
from carnice_build.errors import BackendError
from carnice_build.extras import pip_install


def answer(config: Mapping[str, Any], tensors: Mapping[str, Sequence[Any]]) -> str:
    """See `trace`; each of `tensors` as its type and a list of sizes."""
    return trace(config, {name: TensorSpec(row[0], tuple(row[1])) for name, row in tensors.items()})


def trace(config: Mapping[str, Any], tensors: Mapping[str, TensorSpec]) -> str:
    """What `mlx_vlm.convert -q` makes of a checkpoint of these tensors; see `mlx_trace.trace`."""
    return traced(MlxVlm(), config, tensors)


class MlxVlm(Library):
    """mlx-vlm, which keeps towers and leaves them unquantized."""

    name = "mlx-vlm"

    def __init__(self) -> None:
        if find_spec("mlx_vlm") is None:
            raise BackendError("mlx-vlm is not installed", expected=pip_install("mlxvlm"))
        self.utils = module("mlx_vlm.utils")

    def load(self, folder: Path) -> tuple[Any, Mapping[str, Any]]:
        """The model, and its config as it is converted."""
        return self.utils.load_model(folder, lazy=True), self.utils.load_config(folder)

    def predicate(self, model: Any) -> Callable[[str, Any], Any]:
        """As `mlx_vlm.convert` asks the model."""
        own = getattr(model, "quant_predicate", None)

        def verdict(path: str, item: Any) -> Any:
            if self.utils.skip_multimodal_module(path):
                return False
            return own(path, item) if own else True

        return verdict
