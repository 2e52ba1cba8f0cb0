"""What ggml's blocks of weights hold, type by type: levels, steps, and how far off they may be.

A block's weights are in groups, each with a step and a shift: a weight is level * step - shift.
Steps of K-quants are whole numbers of six bits or so in units that a block of 256 has in F16.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from carnice_build.checkpoint.gguf_types import TYPES
from carnice_build.formats.values import HALF_PLACE, HALF_SMALLEST, Floats

Bytes = NDArray[np.uint8]
Levels = NDArray[np.int8]
_Integers = NDArray[Any]


@dataclass(frozen=True)
class Groups:
    """Groups of weights: `levels` [groups, size], all else float32 [groups, 1].

    `unit` is what the step is a whole number of, and `shift_unit` that of the shift, 0 where they
    are numbers of their own.
    """

    levels: Levels
    step: Floats
    shift: Floats
    unit: Floats
    shift_unit: Floats


@dataclass(frozen=True)
class Kind:
    """A type of blocks: how they are unpacked, and what is known of how ggml makes them.

    `low` and `high` are the least and the greatest level; of a type whose levels lie apart
    unevenly, `halves` has half the wider gap beside each of them, from level `low` on.
    `most` is the greatest number of units that a step has, 0 for steps of their own.
    With `exact`, levels are chosen for the step as it is stored, else before it is rounded to F16.
    `fitted` is the share of the range by which ggml's search may leave weights out at either end.
    `tolerated` is the share of weights that may be further off, and `tolerated_weighted` the same
    where steps are chosen by importance.
    """

    unpack: Callable[[Bytes], Groups]
    low: int
    high: int
    most: int = 0
    exact: bool = False
    fitted: float = 0.0
    tolerated: float = 0.0
    tolerated_weighted: float = 0.0
    halves: Floats | None = None


def unpacked(kind: str, raw: Bytes) -> Groups:
    """The groups of rows [rows, bytes of a row], one row's after another's."""
    return KINDS[kind].unpack(np.ascontiguousarray(raw).reshape(-1, TYPES[kind].nbytes))


def allowed(kind: str, groups: Groups, source: Floats, *, weighted: bool = False) -> Floats:
    """The most that each weight may be off, given what it was, [groups, size].

    Within the range of its group a weight has the level nearest to it: it is off by half a step,
    and where levels are chosen before the step is rounded to F16, by what that moves the level.
    Beyond the range a weight has the last level.
    It can lie there for two reasons, which bound how far: the search for a step tries some that
    leave out the ends (`Kind.fitted`), and in K-quants a step is rounded to its unit, which is the
    largest step of a block divided by `Kind.most`, as is a shift.
    Where steps are `weighted` by importance, what matters little may lie anywhere beyond; and those
    types whose steps are then found again by least squares have levels chosen for another step.
    """
    how = KINDS[kind]
    ends = np.stack([groups.step * how.low, groups.step * how.high]) - groups.shift
    low, high = ends.min(axis=0), ends.max(axis=0)
    size = np.abs(groups.step)
    extent = max(-how.low, how.high)
    inside = _halves(how, groups.levels) * size
    if not how.exact:
        inside = inside + extent * _rounding(groups, size) + _half_place(np.abs(groups.shift))
    beyond = np.maximum(np.maximum(low - source, source - high), 0)
    if not weighted:
        # A unit is the nearest in F16, and then so is the whole number of it.
        rounded = 0.5 * groups.unit + how.most * _half_place(groups.unit)
        moved = 0.5 * groups.shift_unit + how.most * _half_place(groups.shift_unit)
        reach = how.fitted * (high - low) + extent * rounded + moved
        beyond = np.minimum(beyond, reach)
    arithmetic = 8 * HALF_PLACE["F32"] * (np.abs(source) + np.maximum(np.abs(low), np.abs(high)))
    found: Floats = inside + beyond + arithmetic
    return found


def _rounding(groups: Groups, size: Floats) -> Floats:
    """What F16 moves a step by: that of a number of units by as many times what it moves one."""
    own = groups.unit == 0
    unit = np.where(own, size, groups.unit)
    number = np.where(own, 1, size / np.where(own, 1, groups.unit))
    found: Floats = (number * _half_place(unit)).astype(np.float32)
    return found


def _halves(how: Kind, levels: Levels) -> Any:
    return 0.5 if how.halves is None else how.halves[levels.astype(np.int16) - how.low]


def _half_place(values: Floats) -> Floats:
    """What rounding to F16 moves positive numbers by, at most."""
    found: Floats = np.maximum(HALF_PLACE["F16"] * values, np.float32(HALF_SMALLEST["F16"]))
    return found


def _halves_of(levels: Any) -> Floats:
    """Half the wider gap beside each of some levels, by their distance from the least."""
    ordered = sorted({int(level) for level in levels})
    gaps = np.diff(ordered)
    wider = np.maximum(np.append(gaps, 0), np.insert(gaps, 0, 0)) / 2
    found = np.zeros(ordered[-1] - ordered[0] + 1, np.float32)
    found[np.array(ordered) - ordered[0]] = wider
    return found


IQ4_LEVELS = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.int8
)
"""`kvalues_iq4nl` in ggml-common.h."""

FP4_LEVELS = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.int8)
"""Twice the numbers of E2M1."""


def _f16(raw: Bytes) -> Floats:
    """Two bytes of each block as a number, [blocks, 1]."""
    return np.ascontiguousarray(raw).view("<f2").astype(np.float32)


def _nibbles(raw: Bytes) -> _Integers:
    """The low halves of bytes [blocks, n], then the high ones: [blocks, 2 * n]."""
    return np.concatenate([raw & 15, raw >> 4], axis=-1)


def _bits(raw: Bytes, count: int) -> _Integers:
    """Bits of little-endian words [blocks, bytes], one after another."""
    return np.unpackbits(raw, axis=-1, count=count, bitorder="little")


def _own(levels: Any, step: Floats, shift: Floats | None = None) -> Groups:
    """Groups with steps of their own."""
    none = np.zeros_like(step)
    return Groups(levels.astype(np.int8), step, none if shift is None else shift, none, none)


def _in_units(
    levels: Any, unit: Floats, numbers: Any, shift_unit: Floats | None = None, shifts: Any = None
) -> Groups:
    """Of blocks [blocks, groups, size] of levels, whose steps and shifts are so many units."""
    count, groups, size = levels.shape
    flat = levels.reshape(-1, size).astype(np.int8)

    def spread(values: Floats) -> Floats:
        return np.broadcast_to(values, (count, groups)).reshape(-1, 1)

    step = spread(unit * numbers.astype(np.float32))
    if shift_unit is None:
        none = np.zeros_like(step)
        return Groups(flat, step, none, spread(np.abs(unit)), none)
    shift = spread(shift_unit * shifts.astype(np.float32))
    return Groups(flat, step, shift, spread(np.abs(unit)), spread(np.abs(shift_unit)))


def _q4_0(raw: Bytes) -> Groups:
    return _own(_nibbles(raw[:, 2:]).astype(np.int8) - 8, _f16(raw[:, :2]))


def _q4_1(raw: Bytes) -> Groups:
    return _own(_nibbles(raw[:, 4:]), _f16(raw[:, :2]), -_f16(raw[:, 2:4]))


def _q5_0(raw: Bytes) -> Groups:
    levels = _nibbles(raw[:, 6:]) | _bits(raw[:, 2:6], 32) << 4
    return _own(levels.astype(np.int8) - 16, _f16(raw[:, :2]))


def _q5_1(raw: Bytes) -> Groups:
    levels = _nibbles(raw[:, 8:]) | _bits(raw[:, 4:8], 32) << 4
    return _own(levels, _f16(raw[:, :2]), -_f16(raw[:, 2:4]))


def _q8_0(raw: Bytes) -> Groups:
    return _own(np.ascontiguousarray(raw[:, 2:]).view(np.int8), _f16(raw[:, :2]))


def _iq4_nl(raw: Bytes) -> Groups:
    return _own(IQ4_LEVELS[_nibbles(raw[:, 2:])], _f16(raw[:, :2]))


def _mxfp4(raw: Bytes) -> Groups:
    # The step is half of the stored power of two, which is a subnormal number for 0 and 1.
    step = np.ldexp(np.float32(1), raw[:, :1].astype(np.int32) - 128).astype(np.float32)
    return _own(FP4_LEVELS[_nibbles(raw[:, 1:])], step)


def _pairs(raw: Bytes) -> _Integers:
    """Two bits of each byte of two runs of 32 as ggml orders them: [blocks, 256]."""
    runs = raw.reshape(-1, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8).reshape(1, 1, 4, 1) & 3
    found: _Integers = runs.reshape(-1, 256)
    return found


def _q2_k(raw: Bytes) -> Groups:
    numbers = raw[:, :16]
    levels = _pairs(raw[:, 16:80]).reshape(-1, 16, 16)
    unit, shift_unit = _f16(raw[:, 80:82]), _f16(raw[:, 82:84])
    return _in_units(levels, unit, numbers & 15, shift_unit, numbers >> 4)


def _q3_k(raw: Bytes) -> Groups:
    masks = raw[:, None, :32] >> np.arange(8, dtype=np.uint8).reshape(1, 8, 1) & 1
    levels = _pairs(raw[:, 32:96]) | masks.reshape(-1, 256) << 2
    low, high = _nibbles(raw[:, 96:104]), raw[:, 104:108]
    upper = np.concatenate([high >> shift & 3 for shift in (0, 2, 4, 6)], axis=-1)
    numbers = (low | upper << 4).astype(np.int8) - 32
    return _in_units(levels.reshape(-1, 16, 16).astype(np.int8) - 4, _f16(raw[:, 108:]), numbers)


def _six_bits(raw: Bytes) -> tuple[_Integers, _Integers]:
    """The numbers of units of 8 steps and 8 shifts, out of 12 bytes."""
    first, second, third = raw[:, :4], raw[:, 4:8], raw[:, 8:]
    steps = np.concatenate([first & 63, third & 15 | first >> 6 << 4], axis=-1)
    shifts = np.concatenate([second & 63, third >> 4 | second >> 6 << 4], axis=-1)
    return steps, shifts


def _runs(raw: Bytes) -> _Integers:
    """Half bytes in runs of 32, the low ones of a run before its high ones: [blocks, 8, 32]."""
    return _nibbles(raw.reshape(-1, 4, 32)).reshape(-1, 8, 32)


def _q4_k(raw: Bytes) -> Groups:
    steps, shifts = _six_bits(raw[:, 4:16])
    return _in_units(_runs(raw[:, 16:]), _f16(raw[:, :2]), steps, _f16(raw[:, 2:4]), shifts)


def _q5_k(raw: Bytes) -> Groups:
    steps, shifts = _six_bits(raw[:, 4:16])
    fifth = raw[:, None, 16:48] >> np.arange(8, dtype=np.uint8).reshape(1, 8, 1) & 1
    levels = _runs(raw[:, 48:]) | fifth << 4
    return _in_units(levels, _f16(raw[:, :2]), steps, _f16(raw[:, 2:4]), shifts)


def _q6_k(raw: Bytes) -> Groups:
    low = _nibbles(raw[:, :128].reshape(-1, 2, 64)).reshape(-1, 256)
    levels = (low | _pairs(raw[:, 128:192]) << 4).astype(np.int8) - 32
    numbers = np.ascontiguousarray(raw[:, 192:208]).view(np.int8)
    return _in_units(levels.reshape(-1, 16, 16), _f16(raw[:, 208:]), numbers)


def _iq4_xs(raw: Bytes) -> Groups:
    high = np.ascontiguousarray(raw[:, 2:4]).view("<u2") >> np.arange(0, 16, 2, dtype=np.uint16) & 3
    low = np.stack([raw[:, 4:8] & 15, raw[:, 4:8] >> 4], axis=-1).reshape(-1, 8)
    numbers = (low | high.astype(np.uint8) << 4).astype(np.int8) - 32
    levels = IQ4_LEVELS[_nibbles(raw[:, 8:].reshape(-1, 8, 16))]
    return _in_units(levels, _f16(raw[:, :2]), numbers)


_LEVELS_OF_IQ4 = _halves_of(IQ4_LEVELS)

KINDS: Mapping[str, Kind] = {
    # The largest number has level -8 of its own sign: one as large of the other lies a step beyond.
    "Q4_0": Kind(_q4_0, -8, 7, fitted=1 / 15, tolerated_weighted=0.05),
    "Q4_1": Kind(_q4_1, 0, 15, tolerated_weighted=0.05),
    "Q5_0": Kind(_q5_0, -16, 15, fitted=1 / 31, tolerated_weighted=0.05),
    "Q5_1": Kind(_q5_1, 0, 31, tolerated_weighted=0.05),
    "Q8_0": Kind(_q8_0, -127, 127),
    "Q2_K": Kind(_q2_k, 0, 3, most=15, exact=True, fitted=1.0, tolerated=5e-4),
    "Q3_K": Kind(_q3_k, -4, 3, most=32, exact=True, fitted=0.2, tolerated=1e-4),
    "Q4_K": Kind(_q4_k, 0, 15, most=63, exact=True, fitted=0.1),
    "Q5_K": Kind(_q5_k, 0, 31, most=63, exact=True, fitted=0.05),
    "Q6_K": Kind(_q6_k, -32, 31, most=128, exact=True, fitted=0.05),
    "IQ4_NL": Kind(_iq4_nl, -127, 113, fitted=0.1, halves=_LEVELS_OF_IQ4),
    "IQ4_XS": Kind(_iq4_xs, -127, 113, most=32, fitted=0.1, halves=_LEVELS_OF_IQ4),
    # The power of two is that of the largest number, which is less than 16 halves of it.
    "MXFP4": Kind(_mxfp4, -12, 12, exact=True, fitted=1 / 6, halves=_halves_of(FP4_LEVELS)),
}
"""By the names of types; the other types of ggml are not told apart here.

`fitted` of the types whose step is searched for is some twice what was seen of weights of many
distributions, and `tolerated` what was seen beyond that of the farthest from normal ones;
`tolerated_weighted` is for importances that vary by factors of hundreds within a row.
"""
