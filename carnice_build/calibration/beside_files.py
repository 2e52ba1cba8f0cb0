"""What decoder layers are given beside hidden states, from files and to files.

Needs the `torch` extra; to be imported in worker processes alone.
"""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from carnice_build.backends.tensors import as_data, as_tensor
from carnice_build.calibration.beginning import Beginning
from carnice_build.calibration.driver import Arithmetic
from carnice_build.calibration.layer_files import layer_tensors
from carnice_build.calibration.samples import table_rows
from carnice_build.calibration.watch import NonFiniteInput, seen_inputs
from carnice_build.errors import BackendError
from carnice_build.graph import TensorData
from carnice_build.tensor_file import TensorFile


class BesideFiles:
    """What one layer is given of each sample, and makes of it for layers behind it."""

    def __init__(
        self,
        params: Mapping[str, Any],
        samples: Sequence[Any],
        given: Sequence[TensorFile],
        made: Sequence[TensorFile],
    ) -> None:
        """`params` are those of `passes.Forward`; `given` and `made` are as these tell of them."""
        self._given = _paired(params.get("given", ()), given)
        self._made = _paired(params.get("made", ()), made)
        self._device = params["device"]
        self._lengths = [len(tokens) for tokens in samples]
        self._layer = params["layer"]
        self._beside: dict[str, Any] = {}

    def given(self, index: int) -> dict[str, Any]:
        """What the layer is called with for sample `index`, beside hidden states."""
        beside: dict[str, Any] = {
            argument: UserDict() for (argument, key, _), _ in self._made if key is not None
        }
        for (argument, key, shapes), files in self._given:
            tensors = tuple(
                self._read(file, index, shape) for file, shape in zip(files, shapes, strict=True)
            )
            if key is None:
                (beside[argument],) = tensors
            else:
                beside.setdefault(argument, UserDict())[key] = tensors
        self._beside = beside
        return beside

    def put(self, index: int) -> None:
        """Write what the layer has put into the mappings that were last given, for sample `index`.

        BackendError when it has not put there what it should.
        """
        for (argument, key, shapes), files in self._made:
            made = tuple(self._beside[argument].get(key, ()))
            wanted = [[1, *_filled(shape, self._lengths[index])] for shape in shapes]
            found = [list(tensor.shape) for tensor in made]
            if wanted != found:
                raise BackendError(
                    f"layer {self._layer} leaves {found} under {key!r} in {argument}",
                    expected=f"{wanted}, as its family's table has it",
                )
            for tensor, file, shape in zip(made, files, shapes, strict=True):
                rows = tensor[0].movedim(shape.index(None), 0)
                file.write_row(index, as_data(rows).array)

    def _read(self, file: TensorFile, index: int, shape: Sequence[int | None]) -> Tensor:
        """Token by token it lies there, as a layer makes it, whatever the order of its axes."""
        length = self._lengths[index]
        rows = as_tensor(TensorData(file.spec.dtype, file.read_row(index)[:length]))
        others = [size for size in shape if size is not None]
        tensor = rows.view(length, *others).movedim(0, shape.index(None))
        return tensor.unsqueeze(0).to(self._device)


def _paired(
    passed: Sequence[Sequence[Any]], files: Sequence[TensorFile]
) -> list[tuple[Sequence[Any], Sequence[TensorFile]]]:
    """Each of `passed`, as parameters have it, with its files."""
    rest = iter(files)
    return [(item, [next(rest) for _ in item[2]]) for item in passed]


def _filled(shape: Sequence[int | None], length: int) -> list[int]:
    return [length if size is None else size for size in shape]


def make_of_tokens(
    params: Mapping[str, Any],
    samples: Sequence[Any],
    tensors: Sequence[TensorFile],
    outputs: Sequence[TensorFile],
    progress: Callable[[], None],
    first: int,
) -> None:
    """Write what layers are given of the tokens of each sample; see `beside.Beside`.

    Raises CheckpointError when a linear before the layers is given NaN or infinity, BackendError
    when nothing is known of its inputs.
    """
    named = dict(zip(params["names"], tensors, strict=True))
    tables = {name: named.pop(name) for name in params["tables"]}
    beginning = Beginning(
        params["config"],
        Arithmetic.of(params),
        layer_tensors({"names": list(named)}, list(named.values())),
    )
    wanted = [(layer, argument) for layer, (argument, *_) in params["given"]]
    *files, amax = outputs
    with seen_inputs(beginning.model, beginning.owners) as seen:
        for index, tokens in enumerate(samples):
            rows = {
                name: as_tensor(TensorData(file.spec.dtype, table_rows(file, tokens))).unsqueeze(0)
                for name, file in tables.items()
            }
            try:
                given = beginning.given(rows, wanted)
            except NonFiniteInput as error:
                raise error.by_sample(first + index) from None
            for file, tensor in zip(files, given, strict=True):
                assert tensor.shape[1:].numel() == len(tokens) * file.spec.shape[-1]
                file.write_row(index, as_data(tensor[0]).array)
            progress()
    amax.write(np.array(seen.largest([name] for name in params["linears"]), np.float32))
