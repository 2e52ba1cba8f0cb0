"""A decoder layer as auto-round tunes it: every expert's linears are modules of their own.

Importing auto-round changes some functions of transformers: to be imported in worker processes
alone.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from copy import deepcopy
from typing import Any

from auto_round.modeling.fused_moe.moe_experts_interface import LINEAR_LOOP_IMPL
from auto_round.modeling.fused_moe.replace_modules import apply_replacements, materialize_model_
from torch import Tensor, nn

from carnice_build.backends.layer import LayerRunner
from carnice_build.errors import BackendError


def linear_layer(runner: LayerRunner, tensors: Mapping[str, Tensor]) -> nn.Module:
    """The layer as the library tunes it: every expert's linears modules of their own.

    BackendError for experts that the library cannot run so.
    """
    layer = runner.layer(tensors)
    holder: Any = nn.Module()
    holder.layer, holder.config = layer, deepcopy(runner.config)
    with without_log(), redirect_stderr(io.StringIO()):
        # Of some models the library has blocks of its own.
        apply_replacements(holder)
        materialize_model_(holder)
    for module in layer.modules():
        if hasattr(module, "is_concatenated"):
            if not (module.is_concatenated and module.has_gate):
                # It would fail, or take rows of both for those of one.
                raise BackendError(
                    "auto-round runs no experts without a gate, or whose gate takes turns with up",
                    expected="method: nearest",
                )
            # The layer's own: what transformers' experts look up their forward by.
            config: Any = module.config
            config._experts_implementation = LINEAR_LOOP_IMPL
    return layer


@contextmanager
def without_log() -> Iterator[None]:
    """The library says nothing while this is open."""
    logger = logging.getLogger("autoround")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def named_linears(layer: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """The linears of a layer, by their paths in it."""
    for path, module in layer.named_modules():
        if isinstance(module, nn.Linear):
            yield path, module
