"""What vLLM on CPU lacks, put in as soon as the module that lacks it is imported.

This folder is on PYTHONPATH of an engine and so of every process that it starts; Python imports a
module of this name first of all, where a plugin of vLLM's would come too late.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any


def declare_operators(extension: Any) -> None:
    """Let torchvision be imported where its compiled half is for another build of torch.

    Its import asks for these two operators; no text model runs them.
    """
    if extension._has_ops():
        return
    from torch import library

    library.define("torchvision::nms", "(Tensor dets, Tensor scores, float iou) -> Tensor")
    library.define("torchvision::qnms", "(Tensor dets, Tensor scores, float iou) -> Tensor")


def register_kernels(linear: Any) -> None:
    """Have NVFP4 and MXFP8 computed as on cards that lack them: dequantized, inputs rounded too."""
    from vllm.platforms import PlatformEnum  # type: ignore[import-not-found]

    linear._POSSIBLE_NVFP4_KERNELS.setdefault(PlatformEnum.CPU, [linear.EmulationNvFp4LinearKernel])
    linear._POSSIBLE_MXFP8_KERNELS.setdefault(PlatformEnum.CPU, [linear.EmulationMxfp8LinearKernel])


def quantize_under_a_scale(operators: Any) -> None:
    """Let linears in FP8 be fused, whose weights are then put under one scale.

    The build for CPUs declares the operator for that without an argument.
    """
    compiled = operators.scaled_fp8_quant

    def scaled_fp8_quant(inputs: Any, scale: Any = None, *rest: Any, **more: Any) -> Any:
        if scale is None or scale.numel() != 1:
            return compiled(inputs, scale, *rest, **more)
        import torch

        largest = torch.finfo(torch.float8_e4m3fn).max
        codes = (inputs.float() / scale.float()).clamp(-largest, largest)
        return codes.to(torch.float8_e4m3fn), scale

    operators.scaled_fp8_quant = scaled_fp8_quant


AFTER: dict[str, Callable[[Any], None]] = {
    "torchvision.extension": declare_operators,
    "vllm.model_executor.kernels.linear": register_kernels,
    "vllm._custom_ops": quantize_under_a_scale,
}
"""What is called with a module when it has been imported."""


class Finder(MetaPathFinder):
    """Finds the modules of `AFTER` where they are, and has their functions called."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The module as it is found anyway, with more to do once it is executed."""
        after = AFTER.get(name)
        spec = PathFinder.find_spec(name, path, target) if after else None
        if after is None or spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_call(module: ModuleType) -> None:
            execute(module)
            after(module)

        spec.loader.exec_module = execute_and_call  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, Finder())
