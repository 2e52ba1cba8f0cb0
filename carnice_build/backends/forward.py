"""One decoder layer over all samples of a calibration, from files to files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from carnice_build.backends.layers import (
    Arithmetic,
    LayerwiseModel,
    NonFiniteInput,
    as_data,
    as_tensor,
    input_amax,
)
from carnice_build.checkpoint.tensor_file import TensorFile
from carnice_build.errors import CheckpointError
from carnice_build.graph import TensorData


def run_layer(
    params: Mapping[str, Any],
    samples: Sequence[Any],
    hidden: TensorFile,
    weights: Sequence[TensorFile],
    out: TensorFile,
    report: Callable[[], None],
) -> dict[str, float]:
    """Run each sample's hidden states through the layer into `out`; see `Forward` for `params`.

    Returns the largest magnitude of each linear's inputs, by its name within the layer.
    Raises CheckpointError when one is NaN or infinity.
    """
    arithmetic = Arithmetic(
        params["dtype"], params["attention"], params["threads"], params["device"]
    )
    model = LayerwiseModel(params["config"], arithmetic)
    tensors = {
        name: as_tensor(TensorData(file.spec.dtype, file.read()))
        for name, file in zip(params["names"], weights, strict=True)
    }
    layer = model.layer(params["kind"], tensors)
    with input_amax(layer) as amax:
        for index, tokens in enumerate(samples):
            data = TensorData(hidden.spec.dtype, hidden.read_row(index)[: len(tokens)])
            try:
                result = model.run(layer, model.embed(as_tensor(data)))
            except NonFiniteInput as error:
                layer_name = weights[0].name.removesuffix(params["names"][0])
                raise CheckpointError(
                    f"{layer_name}{error.linear} was given NaN or infinity by sample {index + 1}",
                    expected="finite activations",
                ) from None
            out.write_row(index, as_data(result[0]).array)
            report()
    return amax
