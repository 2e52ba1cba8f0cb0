"""What an action on a decoder layer is given in files, as torch takes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from carnice_build.backends.tensors import as_tensor
from carnice_build.graph import TensorData
from carnice_build.tensor_file import TensorFile


def layer_tensors(params: Mapping[str, Any], weights: Sequence[TensorFile]) -> dict[str, Tensor]:
    """The layer's tensors by their names in it, which are `names` of the parameters."""
    return {
        name: as_tensor(TensorData(file.spec.dtype, file.read()))
        for name, file in zip(params["names"], weights, strict=True)
    }


def layer_name(params: Mapping[str, Any], weights: Sequence[TensorFile]) -> str:
    """What the names of the layer's tensors begin with in their source."""
    return weights[0].name.removesuffix(params["names"][0])


class HiddenStates(Sequence[Tensor]):
    """What a layer is called with for each sample, [1, length, hidden], read when asked for."""

    def __init__(
        self, file: TensorFile, samples: Sequence[Any], enter: Callable[[Tensor], Tensor]
    ) -> None:
        """`samples` are the tokens of each, without padding; `enter` is that of the driver."""
        self._file = file
        self._enter = enter
        self._lengths = [len(tokens) for tokens in samples]

    def __len__(self) -> int:
        return len(self._lengths)

    def __getitem__(self, index: Any) -> Any:
        if index >= len(self._lengths):
            raise IndexError
        rows = self._file.read_row(index)[: self._lengths[index]]
        return self._enter(as_tensor(TensorData(self._file.spec.dtype, rows)).unsqueeze(0))
