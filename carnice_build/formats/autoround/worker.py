"""AutoRound on a decoder layer, and passes through what it made, from files to files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from carnice_build.backends.autoround import (
    WHOLE,
    AutoRoundSettings,
    QuantizedLinear,
    run_in_batches,
    tune_layer,
)
from carnice_build.backends.autoround_layer import linear_layer
from carnice_build.backends.tensors import as_data
from carnice_build.calibration.driver import Arithmetic, LayerDriver
from carnice_build.calibration.layer_files import HiddenStates, layer_name, layer_tensors
from carnice_build.dtypes import NUMPY_NAME
from carnice_build.errors import CheckpointError
from carnice_build.kernels.autoround import dequantize_rows, pack
from carnice_build.tensor_file import TensorFile
from carnice_build.tensors import STACK, stacks


def tune(
    params: Mapping[str, Any],
    samples: Sequence[Any],
    hidden: Sequence[TensorFile],
    weights: Sequence[TensorFile],
    outputs: Sequence[TensorFile],
    progress: Callable[[], None],
) -> None:
    """Tune a layer; see `tune.Tune` for the parameters and the order of the files."""
    tensors = layer_tensors(params, weights)
    modules = (n.removesuffix(".weight") for n in params["names"] if n.endswith(".weight"))
    kept = {module: WHOLE for module in modules if module not in params["linears"]}
    settings = AutoRoundSettings(**params["settings"], layer_bits=kept)
    driver = _driver(params, settings)
    inputs, quantized = (list(HiddenStates(file, samples, driver.enter)) for file in hidden)
    try:
        tuned = tune_layer(driver, tensors, inputs, quantized, settings)
    except ValueError as error:
        raise CheckpointError(f"{layer_name(params, weights)}: {error}") from None
    outputs[0].write(np.array([tuned.nearest_loss, tuned.loss], np.float32))
    for index, name in enumerate(params["linears"]):
        files = outputs[1 + 3 * index : 4 + 3 * index]
        if STACK in name:
            parts = [item for key, item in tuned.linears.items() if name in stacks(key)]
            _write_packed(parts, files)
        else:
            _write_packed([tuned.linears[name]], files)
    progress()


def advance(
    params: Mapping[str, Any],
    samples: Sequence[Any],
    hidden: Sequence[TensorFile],
    weights: Sequence[TensorFile],
    packed: Sequence[TensorFile],
    outputs: Sequence[TensorFile],
    progress: Callable[[], None],
) -> None:
    """Run samples through a layer as it was and as it is packed; see `tune.Advance`."""
    settings = AutoRoundSettings(amp=params["amp"], batch_size=params["batch_size"])
    driver = _driver(params, settings)
    given = layer_tensors(params, weights)
    quantized = {
        f"{name}.weight": _dequantized(packed[3 * index : 3 * index + 3])
        for index, name in enumerate(params["linears"])
    }
    for source, target, changed in zip(hidden, outputs, ({}, quantized), strict=True):
        layer = linear_layer(driver, given | changed)
        states = list(HiddenStates(source, samples, driver.enter))
        for index, state in enumerate(run_in_batches(driver, layer, states, settings)):
            target.write_row(index, as_data(state[0]).array)
        progress()


def _driver(params: Mapping[str, Any], settings: AutoRoundSettings) -> LayerDriver:
    device = params.get("device", "cpu")
    arithmetic = Arithmetic(settings.dtype, "sdpa", params["threads"], device)
    return LayerDriver(params["config"], params["layer"], arithmetic)


def _dequantized(files: Sequence[TensorFile]) -> Tensor:
    """Float32 [..., out, in] of qweight, qzeros and scales."""
    qweight, qzeros, scales = (file.read() for file in files)
    *experts, rows, columns = qweight.shape
    weight = np.empty((*experts, columns, 8 * rows), np.float32)
    for index in np.ndindex(*experts):
        dequantize_rows(qweight[index], qzeros[index], scales[index], 0, weight[index])
    return torch.from_numpy(weight)


def _write_packed(linears: Sequence[QuantizedLinear], files: Sequence[TensorFile]) -> None:
    arrays = [np.empty(file.spec.shape, NUMPY_NAME[file.spec.dtype]) for file in files]
    for linear, index in zip(linears, np.ndindex(*files[0].spec.shape[:-2]), strict=True):
        weight, scale = as_data(linear.weight), as_data(linear.scale)
        packed = [array[index] for array in arrays]
        bad_index = pack(weight.array, weight.dtype, scale.array, 0, *packed)
        assert bad_index < 0, "a tuned weight lies beside its own grid"
    for file, array in zip(files, arrays, strict=True):
        file.write(array)
