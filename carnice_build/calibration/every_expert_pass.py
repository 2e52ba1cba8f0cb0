"""One decoder layer over all samples of a calibration, every expert for every token."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from carnice_build.calibration.beside_files import BesideFiles
from carnice_build.calibration.layer_pass import load_layer
from carnice_build.calibration.passes import linear_counts
from carnice_build.calibration.watch import seen_by_everyone
from carnice_build.tensor_file import TensorFile
from carnice_build.tensors import numbered


def largest_of_everyone(
    params: Mapping[str, Any],
    samples: Sequence[Any],
    hidden: TensorFile,
    weights: Sequence[TensorFile],
    given: Sequence[TensorFile],
    progress: Callable[[], None],
    first: int,
) -> list[float]:
    """The largest inputs of the experts of `linears`; see `every_expert.EveryExpert`.

    `first` is what number the first of `samples` has among all.
    """
    loaded = load_layer(params, weights)
    # What the layer makes for others, and nobody is to have, needs no place.
    beside = BesideFiles({**params, "made": ()}, samples, given, ())
    with seen_by_everyone(loaded.layer, loaded.owners) as seen:
        for _ in loaded.results(samples, hidden, beside, first):
            progress()
    counts = linear_counts(params, [file.spec for file in weights])
    return seen.largest(map(numbered, params["linears"], counts), loaded.name)
