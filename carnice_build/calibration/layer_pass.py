"""One decoder layer over all samples of a calibration, from files to files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch

from carnice_build.backends.tensors import as_data
from carnice_build.calibration.beside_files import BesideFiles
from carnice_build.calibration.driver import Arithmetic, LayerDriver
from carnice_build.calibration.layer_files import HiddenStates, layer_name, layer_tensors
from carnice_build.calibration.watch import NonFiniteInput, Seen, seen_caches, seen_inputs
from carnice_build.calibration.weights import Owners
from carnice_build.errors import BackendError, CarniceError, CheckpointError
from carnice_build.tensor_file import TensorFile


def run_layer(
    params: Mapping[str, Any],
    samples: Sequence[Any],
    hidden: TensorFile,
    weights: Sequence[TensorFile],
    given: Sequence[TensorFile],
    out: Sequence[TensorFile],
    progress: Callable[[], None],
    first: int,
) -> Seen:
    """Run each sample's hidden states through the layer; see `Forward` for `params`.

    What comes out goes to `out`: hidden states, and what the layer makes for others.
    `first` is what number the first of `samples` has among all.
    Raises CheckpointError when one is NaN or infinity, or when transformers refuses the config;
    BackendError when torch has no such device, or keys and values are not seen where they must be.
    """
    loaded = load_layer(params, weights)
    beside = BesideFiles(params, samples, given, out[1:])
    caching = seen_caches(loaded.layer) if params.get("caches") else nullcontext()
    with seen_inputs(loaded.layer, loaded.owners) as seen, caching as caches:
        for index, result in enumerate(loaded.results(samples, hidden, beside, first)):
            if caches:
                seen.ranges.append(caches.of_sample(loaded.name))
            out[0].write_row(index, as_data(result[0]).array)
            beside.put(index)
            progress()
    return seen


class LoadedLayer(NamedTuple):
    """A layer, what runs it, whose weights its parameters are, and what their names begin with."""

    driver: LayerDriver
    layer: torch.nn.Module
    owners: Mapping[str, Owners]
    name: str

    def results(
        self, samples: Sequence[Any], hidden: TensorFile, beside: BesideFiles, first: int
    ) -> Iterator[torch.Tensor]:
        """What the layer makes of each sample's hidden states, [1, length, hidden].

        Raises CheckpointError when an input is NaN or infinity.
        """
        for index, state in enumerate(HiddenStates(hidden, samples, self.driver.enter)):
            try:
                yield self.driver.run(self.layer, state, beside.given(index))
            except NonFiniteInput as error:
                raise error.by_sample(first + index, self.name) from None


def load_layer(params: Mapping[str, Any], weights: Sequence[TensorFile]) -> LoadedLayer:
    """A layer of files.

    Raises CheckpointError when transformers refuses the config, BackendError when torch has no such
    device.
    """
    check_device(params["device"])
    tensors, name = layer_tensors(params, weights), layer_name(params, weights)
    try:
        driver = LayerDriver(params["config"], params["layer"], Arithmetic.of(params))
        return LoadedLayer(driver, driver.layer(tensors), driver.owners(tensors), name)
    except CarniceError:
        raise
    except Exception as error:  # transformers raises KeyError and the like for what it cannot use
        raise CheckpointError(
            f"transformers makes no layer of it: {type(error).__name__}: {error}",
            where=f"{name[:-1]}: config.json",
        ) from None


def check_device(device: str) -> None:
    """BackendError when torch has no such device."""
    try:
        torch.empty(0, device=device)
    except Exception as error:  # torch raises AssertionError, RuntimeError or what a driver raises
        raise BackendError(
            f"torch cannot use calibration.device {device}: {error}", expected="such as cpu or cuda"
        ) from None
