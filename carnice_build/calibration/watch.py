"""What the linears of a decoder layer, and its cache, are given while samples run through it.

Needs the `torch` extra; to be imported in worker processes alone.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from carnice_build.calibration.weights import Owners
from carnice_build.errors import BackendError, CheckpointError


class NonFiniteInput(Exception):
    """The input of `linear`, a module's name relative to its layer, held NaN or infinity."""

    def __init__(self, linear: str) -> None:
        super().__init__(linear)
        self.linear = linear

    def by_sample(self, index: int, prefix: str = "") -> CheckpointError:
        """What a person is told of it; `prefix` goes before the linear's name."""
        return CheckpointError(
            f"{prefix}{self.linear} was given NaN or infinity by sample {index + 1}",
            expected="finite activations",
        )


_Place = tuple[int, str]
"""Where a function has an operand: its number, and its name where it is given by that."""

_PRODUCTS: Mapping[Any, tuple[_Place, _Place]] = {
    functional.linear: ((0, "input"), (1, "weight")),
    torch.matmul: ((0, "input"), (1, "other")),
    torch.mm: ((0, "input"), (1, "mat2")),
    torch.addmm: ((1, "mat1"), (2, "mat2")),
    Tensor.matmul: ((0, "self"), (1, "other")),
    Tensor.__matmul__: ((0, "self"), (1, "other")),
    Tensor.mm: ((0, "self"), (1, "mat2")),
    Tensor.addmm: ((1, "mat1"), (2, "mat2")),
}
"""Where torch's functions that multiply by a matrix have what is multiplied, and the matrix.

A weight that another function reads is not watched, which `Seen.largest` then tells.
"""


@dataclass(frozen=True)
class Seen:
    """What linears were given, by their names within the layer; those given nothing are not there.

    `amax` is the largest magnitude, as modelopt's max calibrator has it, per tensor; `tokens` how
    many vectors there were; `squares`, F64 [columns], the sum over these of each element's square.
    `ranges` are those of keys and values, by sample; see `Caches`.
    """

    amax: dict[str, float] = field(default_factory=dict)
    tokens: Counter[str] = field(default_factory=Counter)
    squares: dict[str, Tensor] = field(default_factory=dict)
    ranges: list[tuple[float, float, float, float]] = field(default_factory=list)

    def see(self, linears: Sequence[str], given: Tensor) -> None:
        """Take what `linears` are given into `amax`; NonFiniteInput for NaN or infinity."""
        low, high = (end.item() for end in torch.aminmax(given))
        amax = max(-low, high)
        if not amax < float("inf"):
            raise NonFiniteInput(linears[0])
        for linear in linears:
            self.amax[linear] = max(amax, self.amax.get(linear, 0.0))

    def largest(self, linears: Iterable[Sequence[str]], prefix: str = "") -> list[float]:
        """The amax of all `linears` in turn, those of one stack of experts, or one, in one entry.

        `prefix` goes before their names in messages.
        0 for an expert that no token was sent to.
        BackendError where nothing was seen of a whole entry: the layer multiplies by its weights
        in a way that is not watched, for some expert gets each token.
        """
        found: list[float] = []
        for entry in linears:
            if not any(name in self.amax for name in entry):
                raise BackendError(
                    f"transformers gave {prefix}{entry[0]} no input that is watched",
                    expected="weights that are multiplied by linear, matmul, mm or addmm",
                )
            found += [self.amax.get(name, 0.0) for name in entry]
        return found


@contextmanager
def seen_inputs(layer: nn.Module, owners: Mapping[str, Owners]) -> Iterator[Seen]:
    """While this is open, collect what the linears of `layer` are given.

    `owners` are as `LayerDriver.owners` has them.
    A pass raises NonFiniteInput on NaN or infinity.
    """
    seen = Seen()

    def watch(linears: Sequence[str], given: Tensor) -> Tensor:
        if given.numel():
            seen.see(linears, given)
            squares = sum_of_squares(given)
            for linear in linears:
                seen.tokens[linear] += given.shape[:-1].numel()
                seen.squares[linear] = seen.squares.get(linear, 0) + squares
        return given

    with Watch(WeightPlaces(layer, owners), watch):
        yield seen


@contextmanager
def seen_by_everyone(layer: nn.Module, owners: Mapping[str, Owners]) -> Iterator[Seen]:
    """While this is open, collect the largest inputs of experts, each given every token.

    `owners` are as `LayerDriver.owners` has them.
    What an expert makes of tokens that the router sends elsewhere goes nowhere else.
    A pass raises NonFiniteInput on NaN or infinity.
    """
    seen = Seen()

    def watch(linears: Sequence[str], given: Tensor) -> Tensor:
        seen.see(linears, given)
        return given

    watching = Watch(WeightPlaces(layer, owners), watch)

    def send(experts: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def before(module: nn.Module, given: tuple[Tensor, ...]) -> None:
            # What experts of transformers are called with: tokens, and for each of these the
            # experts that it is sent to, and how much they weigh.
            hidden = given[0]
            everyone = (len(hidden), 1)
            weights = hidden.new_ones(everyone)
            with watching:
                for expert in range(experts):
                    # One at a time, as they are masked by tokens times those that each is sent to.
                    chosen = torch.full(everyone, expert, device=hidden.device)
                    module.forward(hidden, chosen, weights)

        return before

    stacks = {name.rpartition(".")[0]: len(items) for name, items in owners.items() if items[1:]}
    hooks = [
        layer.get_submodule(path).register_forward_pre_hook(send(experts))
        for path, experts in stacks.items()
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


_BLOCK = 1 << 20
"""Elements that are squared at once: few enough for a processor's caches."""


def sum_of_squares(given: Tensor) -> Tensor:
    """The sum of each column's squares, F64 [columns], of what is [..., columns].

    The rows are dealt out to as many sums in float32 as a block has rows, which float64 adds up.
    """
    rows = given.reshape(-1, given.shape[-1])
    count, columns = rows.shape
    step = min(count, max(1, _BLOCK // columns))
    block, sums = rows.new_zeros((2, step, columns), dtype=torch.float32)
    for start in range(0, count, step):
        part = rows[start : start + step]
        floats = block[: len(part)].copy_(part)
        sums[: len(part)].addcmul_(floats, floats)
    total: Tensor = sums.double().sum(0)
    return total.cpu()


class Caches:
    """The keys and values that attention is given, which are those that enter a cache.

    Keys after their norm and their rotary embedding, and values, before heads are repeated: what
    both modelopt and compressed-tensors observe.
    """

    def __init__(self) -> None:
        self._found: list[tuple[float, float, float, float]] = []

    def see(self, name: str, keys: Tensor, values: Tensor) -> None:
        """Take what the attention `name` is given; NonFiniteInput for NaN or infinity."""
        bounds = [end.item() for part in (keys, values) for end in torch.aminmax(part)]
        if not all(map(math.isfinite, bounds)):
            raise NonFiniteInput(name)
        least_key, largest_key, least_value, largest_value = bounds
        self._found.append((least_key, largest_key, least_value, largest_value))

    def of_sample(self, layer: str) -> tuple[float, float, float, float]:
        """The least and the largest key, and value, since this was asked before.

        BackendError unless attention was computed once, by a function of transformers.
        """
        found, self._found = self._found, []
        if len(found) != 1:
            raise BackendError(
                f"transformers computed attention {len(found)} times in {layer[:-1]}",
                expected="once, by a function that ALL_ATTENTION_FUNCTIONS has",
            )
        return found[0]


@contextmanager
def seen_caches(layer: nn.Module) -> Iterator[Caches]:
    """While this is open, collect what attention in `layer` is given."""
    caches, names = Caches(), {id(module): name for name, module in layer.named_modules()}
    get_interface = ALL_ATTENTION_FUNCTIONS.get_interface

    def watched(implementation: str, default: Callable[..., Any]) -> Callable[..., Any]:
        attend = get_interface(implementation, default)

        def attention(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **named: Any
        ) -> Any:
            caches.see(names.get(id(module), "attention"), key, value)
            return attend(module, query, key, value, *rest, **named)

        return attention

    # Of this instance alone, which all models of transformers share.
    vars(ALL_ATTENTION_FUNCTIONS)["get_interface"] = watched
    try:
        yield caches
    finally:
        del vars(ALL_ATTENTION_FUNCTIONS)["get_interface"]


@dataclass(frozen=True)
class _Memory:
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
            _Memory(weight.data_ptr(), weight.nbytes // len(linears), linears)
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
        named = kwargs or {}
        if func in _PRODUCTS:
            given, matrix = _PRODUCTS[func]
            linears = self._places.owners(_operand(matrix, args, named))
            if linears:
                watched = self._watch(linears, _operand(given, args, named))
                place, name = given
                if place < len(args):
                    args = (*args[:place], watched, *args[place + 1 :])
                else:
                    named = {**named, name: watched}
        return func(*args, **named)


def _operand(place: _Place, args: Sequence[Any], named: Mapping[str, Any]) -> Tensor:
    number, name = place
    operand: Tensor = args[number] if number < len(args) else named[name]
    return operand
