"""The AWQ search on a decoder layer, from files to files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from carnice_build.backends.awq import AwqSettings, smooth_layer
from carnice_build.backends.compressed import WeightScheme
from carnice_build.backends.tensors import as_data
from carnice_build.calibration.beside_files import BesideFiles
from carnice_build.calibration.driver import Arithmetic, LayerDriver
from carnice_build.calibration.layer_files import HiddenStates, layer_tensors
from carnice_build.models.base import SmoothingMapping
from carnice_build.tensor_file import TensorFile


def smooth(
    params: Mapping[str, Any],
    samples: Sequence[Any],
    hidden: TensorFile,
    weights: Sequence[TensorFile],
    given: Sequence[TensorFile],
    outputs: Sequence[TensorFile],
    progress: Callable[[], None],
) -> None:
    """Smooth a layer; see `awq.Smooth` for the parameters and the files."""
    settings = AwqSettings(
        scheme=WeightScheme(**params["scheme"]),
        mappings=tuple(
            SmoothingMapping(name, tuple(balance)) for name, balance in params["mappings"]
        ),
        n_grid=params["n_grid"],
        duo_scaling=params["duo_scaling"],
        norms=params["norms"],
    )

    driver = LayerDriver(params["config"], params["layer"], Arithmetic.of(params))

    end = 1 + len(settings.mappings)
    beside = BesideFiles(params, samples, given, outputs[end:])

    def put_output(index: int, state: Tensor) -> None:
        outputs[0].write_row(index, as_data(state[0]).array)
        beside.put(index)
        progress()

    scales = smooth_layer(
        driver,
        layer_tensors(params, weights),
        params["quantized"],
        HiddenStates(hidden, samples, driver.enter),
        settings,
        put_output,
        Path(outputs[0].path).parent,
        beside.given,
    )
    for (name, _), file in zip(params["mappings"], outputs[1:end], strict=True):
        file.write(as_data(scales[name]).array)
