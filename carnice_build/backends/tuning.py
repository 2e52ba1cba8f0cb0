"""AutoRound on a decoder layer, from files to files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from carnice_build.backends.autoround import AutoRoundSettings, QuantizedLinear, tune_layer
from carnice_build.backends.layers import as_data, as_tensor
from carnice_build.checkpoint.dtypes import NUMPY_NAME
from carnice_build.checkpoint.tensor_file import TensorFile
from carnice_build.errors import CheckpointError
from carnice_build.graph import TensorData
from carnice_build.kernels.autoround import pack


def tune(
    params: Mapping[str, Any],
    samples: Sequence[Any],
    hidden: Sequence[TensorFile],
    weights: Sequence[TensorFile],
    outputs: Sequence[TensorFile],
    report: Callable[[], None],
) -> None:
    """Tune a layer; see `transforms.tune.Tune` for the parameters and the order of the files."""
    tensors = {
        name: as_tensor(TensorData(file.spec.dtype, file.read()))
        for name, file in zip(params["names"], weights, strict=True)
    }
    lengths = [len(tokens) for tokens in samples]
    inputs, quantized = (_read(file, lengths) for file in hidden)
    settings = AutoRoundSettings(**params["settings"])
    try:
        tuned = tune_layer(
            params["kind"],
            params["config"],
            tensors,
            inputs,
            quantized,
            settings,
            params["threads"],
        )
    except ValueError as error:
        layer_name = weights[0].name.removesuffix(params["names"][0])
        raise CheckpointError(f"{layer_name}: {error}") from None
    for file, states in zip(outputs, (tuned.outputs, tuned.quantized_outputs), strict=False):
        for index, state in enumerate(states):
            file.write_row(index, as_data(state[0]).array)
    outputs[2].write(np.array([tuned.nearest_loss, tuned.loss], np.float32))
    for index, name in enumerate(params["linears"]):
        _write_packed(tuned.linears[name], outputs[3 + 3 * index : 6 + 3 * index])
    report()


def _read(file: TensorFile, lengths: Sequence[int]) -> list[Tensor]:
    return [
        as_tensor(TensorData(file.spec.dtype, file.read_row(index)[:length])).unsqueeze(0)
        for index, length in enumerate(lengths)
    ]


def _write_packed(linear: QuantizedLinear, files: Sequence[TensorFile]) -> None:
    weight, scale = as_data(linear.weight), as_data(linear.scale)
    arrays = [np.empty(file.spec.shape, NUMPY_NAME[file.spec.dtype]) for file in files]
    bad_index = pack(weight.array, weight.dtype, scale.array, 0, *arrays)
    assert bad_index < 0, "a tuned weight lies beside its own grid"
    for file, array in zip(files, arrays, strict=True):
        file.write(array)
