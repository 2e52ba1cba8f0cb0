"""What the linears of a decoder layer are given while samples run through it.

Needs the `torch` extra; to be imported in worker processes alone.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from carnice_build.calibration.weights import Owners


class NonFiniteInput(Exception):
    """The input of `linear`, a module's name relative to its layer, held NaN or infinity."""

    def __init__(self, linear: str) -> None:
        super().__init__(linear)
        self.linear = linear


_PRODUCTS: Mapping[Any, tuple[int, int]] = {
    functional.linear: (0, 1),
    torch.matmul: (0, 1),
    torch.mm: (0, 1),
    torch.addmm: (1, 2),
    Tensor.matmul: (0, 1),
    Tensor.__matmul__: (0, 1),
    Tensor.mm: (0, 1),
    Tensor.addmm: (1, 2),
}
"""Where torch's functions that multiply by a matrix have what is multiplied, and the matrix."""


@dataclass(frozen=True)
class Seen:
    """What linears were given, by their names within the layer; those given nothing are not there.

    `amax` is the largest magnitude, as modelopt's max calibrator has it, per tensor; `tokens` how
    many vectors there were.
    """

    amax: dict[str, float] = field(default_factory=dict)
    tokens: Counter[str] = field(default_factory=Counter)


@contextmanager
def seen_inputs(layer: nn.Module, owners: Mapping[str, Owners]) -> Iterator[Seen]:
    """While this is open, collect what the linears of `layer` are given.

    `owners` are as `LayerDriver.owners` has them.
    A pass raises NonFiniteInput on NaN or infinity.
    """
    seen = Seen()

    def watch(linears: Sequence[str], given: Tensor) -> Tensor:
        if given.numel():
            low, high = (end.item() for end in torch.aminmax(given))
            amax = max(-low, high)
            if not amax < float("inf"):
                raise NonFiniteInput(linears[0])
            for linear in linears:
                seen.amax[linear] = max(amax, seen.amax.get(linear, 0.0))
                seen.tokens[linear] += given.shape[:-1].numel()
        return given

    with Watch(WeightPlaces(layer, owners), watch):
        yield seen


@dataclass(frozen=True)
class _Place:
    """Memory from address `start` on that holds the weights of linears, `step` bytes for each."""

    start: int
    step: int
    owners: Owners


class WeightPlaces:
    """Finds whose weights a matrix is, by where it lies."""

    def __init__(self, module: nn.Module, owners: Mapping[str, Owners]) -> None:
        """`owners` are by the parameters of `module`, which must stay where they are."""
        parameters = ((module.get_parameter(name), linears) for name, linears in owners.items())
        places = [
            _Place(weight.data_ptr(), weight.nbytes // len(linears), linears)
            for weight, linears in parameters
        ]
        self._places = sorted(places, key=lambda place: place.start)
        self._starts = [place.start for place in self._places]

    def owners(self, matrix: Tensor) -> Sequence[str]:
        """The linears that `matrix` is the weight of, none for another."""
        address = matrix.data_ptr()
        found = bisect_right(self._starts, address) - 1
        if found < 0:
            return ()
        place = self._places[found]
        index = (address - place.start) // place.step
        return place.owners[index] if index < len(place.owners) else ()


class Watch(TorchFunctionMode):
    """While this is open, every weight is multiplied by what `watch` makes of its input.

    Experts that are fused are no modules, so it is the products that tell.
    """

    def __init__(
        self, places: WeightPlaces, watch: Callable[[Sequence[str], Tensor], Tensor]
    ) -> None:
        """`watch` gets the linears that the weight is of, and their input [..., in]."""
        super().__init__()
        self._places = places
        self._watch = watch

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Calls `func`."""
        operands = _PRODUCTS.get(func)
        if operands is not None and len(args) > max(operands):
            place, matrix = operands
            linears = self._places.owners(args[matrix])
            if linears:
                args = (*args[:place], self._watch(linears, args[place]), *args[place + 1 :])
        return func(*args, **(kwargs or {}))
