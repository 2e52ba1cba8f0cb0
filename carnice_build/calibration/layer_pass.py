"""One decoder layer over all samples of a calibration, from files to files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from carnice_build.backends.tensors import as_data
from carnice_build.calibration.driver import Arithmetic, LayerDriver, NonFiniteInput, input_amax
from carnice_build.calibration.layer_files import HiddenStates, layer_name, layer_tensors
from carnice_build.errors import BackendError, CheckpointError
from carnice_build.tensor_file import TensorFile


def run_layer(
    params: Mapping[str, Any],
    samples: Sequence[Any],
    hidden: TensorFile,
    weights: Sequence[TensorFile],
    out: TensorFile,
    progress: Callable[[], None],
) -> dict[str, float]:
    """Run each sample's hidden states through the layer into `out`; see `Forward` for `params`.

    Returns the largest magnitude of each linear's inputs, by its name within the layer.
    Raises CheckpointError when one is NaN or infinity, or when transformers refuses the config;
    BackendError when torch has no such device.
    """
    driver, layer = _load(params, weights)
    with input_amax(layer) as amax:
        for index, state in enumerate(HiddenStates(hidden, samples)):
            try:
                result = driver.run(layer, driver.arithmetic.place(state))
            except NonFiniteInput as error:
                name = layer_name(params, weights) + error.linear
                raise CheckpointError(
                    f"{name} was given NaN or infinity by sample {index + 1}",
                    expected="finite activations",
                ) from None
            out.write_row(index, as_data(result[0]).array)
            progress()
    return amax


def _load(
    params: Mapping[str, Any], weights: Sequence[TensorFile]
) -> tuple[LayerDriver, torch.nn.Module]:
    device = params["device"]
    try:
        torch.empty(0, device=device)
    except Exception as error:  # torch raises AssertionError, RuntimeError or what a driver raises
        raise BackendError(
            f"torch cannot use calibration.device {device}: {error}", expected="such as cpu or cuda"
        ) from None
    tensors = layer_tensors(params, weights)
    arithmetic = Arithmetic(params["dtype"], params["attention"], params["threads"], device)
    try:
        driver = LayerDriver(params["config"], params["kind"], arithmetic)
        return driver, driver.layer(tensors)
    except Exception as error:  # transformers raises KeyError and the like for what it cannot use
        raise CheckpointError(
            f"transformers makes no layer of it: {type(error).__name__}: {error}",
            where=f"{layer_name(params, weights)[:-1]}: config.json",
        ) from None
