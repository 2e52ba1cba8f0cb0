"""Tensors that llama.cpp's converter makes of a config alone: factors of rope's frequencies."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping, Sequence

from carnice_build.errors import CheckpointError
from carnice_build.formats.gguf.parameters import ConfigScope

_MOST = 65536
"""Numbers of one tensor; half of a head's."""

_UNTURNED = 1e30
"""A frequency divided by it turns nothing."""


def constant_numbers(how: str, scope: ConfigScope) -> Sequence[float]:
    """The numbers that `how` names, for one config; CheckpointError where it does not say enough.

    Each is rounded to float32, as all that leads to it is.
    """
    return _NUMBERS[how](scope)


def _llama3(scope: ConfigScope) -> Sequence[float]:
    """Of Llama 3.1: low frequencies are divided by a factor, high ones not, others in between.

    Powers are rounded to nearest; torch's, which the converter takes, differ by one in the last
    place of a few, as they do for heads of 96 and a base of 500000.
    """
    size = scope.size("head_dim or hidden_size // num_attention_heads")
    base = _number("rope.rope_theta or 10000.0", scope)
    factor = _number("rope.factor or 8.0", scope)
    low = _number("rope.low_freq_factor or 1.0", scope)
    high = _number("rope.high_freq_factor or 4.0", scope)
    length = _number("rope.original_max_position_embeddings or 8192", scope)
    if size > _MOST or high == low:
        raise CheckpointError("rope's factors make no sense", where=scope.where)
    found = []
    for index in range(0, size, 2):
        frequency = _float(1 / _float(_float(base) ** _float(index / size)))
        # torch divides a number by a tensor as a product with its reciprocal.
        wave = _float(_float(1 / frequency) * _float(2 * math.pi))
        if wave < _float(length / high):
            found.append(1.0)
        elif wave > _float(length / low):
            found.append(factor)
        else:
            turns = _float(_float(1 / wave) * _float(length))
            smooth = _float(_float(turns - _float(low)) / _float(high - low))
            divided = _float(_float(1 - smooth) / _float(factor))
            found.append(_float(1 / _float(divided + smooth)))
    return found


def _proportional(scope: ConfigScope) -> Sequence[float]:
    """Of Gemma 4: of heads of full attention, the first pairs of numbers are turned alone."""
    size = scope.size("full_size")
    if size > _MOST:
        raise CheckpointError(f"heads of full attention have {size} numbers", where=scope.where)
    turned = scope.size("int(full_size * rope.partial_rotary_factor / 2)")
    return [1.0] * turned + [_UNTURNED] * (size // 2 - turned)


def _listed(name: str) -> Callable[[ConfigScope], Sequence[float]]:
    def numbers(scope: ConfigScope) -> Sequence[float]:
        found = scope.evaluated(name)
        if not isinstance(found, list) or len(found) > _MOST:
            raise CheckpointError(f"{name} is no list of numbers", where=scope.where)
        return [_checked(item, name, scope) for item in found]

    return numbers


def _number(formula: str, scope: ConfigScope) -> float:
    found = _checked(scope.evaluated(formula), formula, scope)
    if found <= 0:
        raise CheckpointError(f"{formula} is {found}", where=scope.where, expected="more than 0")
    return found


def _checked(value: object, what: str, scope: ConfigScope) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e30:
        raise CheckpointError(
            f"{what} is {value!r}"[:100], where=scope.where, expected="a finite number"
        )
    return float(value)


def _float(value: float) -> float:
    """Rounded to float32: of one operation on such, what that gives in float32."""
    return float(struct.unpack("<f", struct.pack("<f", value))[0])


_NUMBERS: Mapping[str, Callable[[ConfigScope], Sequence[float]]] = {
    "llama3": _llama3,
    "proportional": _proportional,
    "long": _listed("rope.long_factor"),
    "short": _listed("rope.short_factor"),
}
