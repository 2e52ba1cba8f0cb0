"""A decoder layer as llm-compressor wants it: what its algorithms on layers have in common.

Needs the `llmcompressor` extra; to be imported in worker processes alone.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import count, takewhile
from typing import Any

from compressed_tensors.registry import standardize_lookup_name
from llmcompressor.modeling.moe.context import moe_calibration_context
from llmcompressor.modeling.moe.linearize import linearize_moe
from llmcompressor.modeling.offset_norm import NormCalibrationModule, norm_calibration_context
from torch import Tensor, nn

from carnice_build.backends.compressed import quiet
from carnice_build.backends.layer import LayerRunner
from carnice_build.tensors import STACK


def linear_layer(runner: LayerRunner, tensors: Mapping[str, Tensor]) -> Any:
    """The layer as the library wants it: every expert's linears modules of their own."""
    layer: Any = runner.layer(tensors)
    # The library asks its model for a config, and passes it on unread.
    layer.config = runner.config
    with quiet():
        return linearize_moe(layer)


def of_each_expert(names: Iterable[str], modules: Collection[str]) -> Iterator[str]:
    """`names`, stacks of experts replaced by what each expert has."""
    for name in names:
        if STACK in name:
            numbered = (name.replace(STACK, str(number)) for number in count())
            yield from takewhile(modules.__contains__, numbered)
        else:
            yield name


def offset_norms(layer: nn.Module) -> list[str]:
    """The norms of a layer that store w for a gain of 1 + w, as far as the library knows."""
    known = {
        *NormCalibrationModule.registered_names(),
        *NormCalibrationModule.registered_aliases(),
    }
    return [
        name
        for name, module in layer.named_modules()
        if standardize_lookup_name(type(module).__name__) in known
    ]


def hold_exactly(layer: nn.Module) -> None:
    """Hold the layer's gains 1 + w in float32, where the library rounds them to its type."""
    for name in offset_norms(layer):
        layer.get_submodule(name).float()


@contextmanager
def calibrating(layer: Any) -> Iterator[None]:
    """Compute as the library does while it calibrates: with gains, and every token to all experts.

    Gains 1 + w are held as such, and experts are given what is sent to others, too, though it
    goes nowhere but into their own statistics.
    """
    with norm_calibration_context(layer), moe_calibration_context():
        yield


def put_outputs(
    runner: LayerRunner,
    layer: nn.Module,
    inputs: Iterable[Tensor],
    beside: Callable[[int], Mapping[str, Any]],
    put_output: Callable[[int, Tensor], None],
) -> None:
    """Run each sample through the layer, and give what comes out to `put_output`."""
    for index, hidden in enumerate(inputs):
        put_output(index, runner.run(layer, hidden, beside(index)))
