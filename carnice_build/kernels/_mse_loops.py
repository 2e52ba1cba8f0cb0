"""The compiled loops of ``compressed.mse_qparams``: numba, one thread, no GIL, cached on disk.

A group is tried under every range before the next one is read. Which ranges count is known at
the end alone, since the search of all groups ends together; so each group keeps, as bits, which
ranges were better than all before.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ._affine_loops import (
    BF16,
    CHUNK_CODES,
    F16,
    Floats,
    Patterns,
    _any_non_finite,
    _extremes,
    _from_key,
    _inlined,
    _kernel,
    _key_16,
    _narrow,
    _widen,
)
from ._compressed_loops import ZeroPoints, _round_to
from ._integer_loops import _clip, _scale, _scale_and_zero

Places = NDArray[np.uint32]

LANES = 8
"""The float32 lanes of the registers in which torch sums on x86-64, also where it has wider."""

LARGEST_BF16, LARGEST_F16 = np.float32((2 - 2.0**-7) * 2.0**127), np.float32(65504)


@_inlined
def _sum(loads: Floats) -> np.float32:
    """The sum of registers [n, LANES], flat, n being 2, 4 or 8, in torch's order.

    Four accumulators take the registers in turn; where there are but two, the first takes both.
    Then the accumulators are added, and at last their lanes.
    """
    if loads.size == 8 * LANES:
        for k in range(4 * LANES):
            loads[k] += loads[k + 4 * LANES]
    total = np.float32(0)
    for lane in range(LANES):
        part = loads[lane] + loads[LANES + lane]
        if loads.size > 2 * LANES:
            part = (part + loads[2 * LANES + lane]) + loads[3 * LANES + lane]
        total += part
    return total


@_inlined
def _error(
    group: Floats,
    scale: np.float32,
    zero: np.float32,
    half: np.float32,
    kind: int,
    powers: Floats,
    places: Places,
    loads: Floats,
) -> np.float32:
    """The sum of |dequantized - w| to the power that ``powers`` tabulates.

    torch reads two registers' worth of 16-bit floats at once and adds the two.
    """
    for k in range(group.size):
        quotient = _round_to(group[k] / scale, kind)
        code = np.rint(_clip(_round_to(quotient + zero, kind), half))
        value = _round_to((code - zero) * scale, kind)
        places[k] = _narrow(value - group[k], kind) & np.uint32(0x7FFF)
    for i in range(loads.size // LANES):
        for lane in range(LANES):
            at = 2 * LANES * i + lane
            loads[LANES * i + lane] = powers[places[at]] + powers[places[at + LANES]]
    return _round_to(_sum(loads), kind)


@_inlined
def _shrunk(value: np.float32, shrink: np.float32, kind: int) -> np.float32:
    return _round_to(value * shrink, kind)


@_inlined
def _qparams(
    low: np.float32,
    high: np.float32,
    shrink: np.float32,
    half: np.float32,
    symmetric: bool,
    kind: int,
) -> tuple[np.float32, np.float32]:
    """Scale and zero point of a range that is shrunk."""
    low, high = _shrunk(low, shrink, kind), _shrunk(high, shrink, kind)
    if symmetric:
        return _scale(max(abs(low), abs(high)), half, kind), np.float32(0)
    return _scale_and_zero(low, high, half, kind)


@_inlined
def _improvements(
    patterns: Patterns,
    low: np.float32,
    high: np.float32,
    half: np.float32,
    symmetric: bool,
    kind: int,
    shrinks: Floats,
    powers: Floats,
    group: Floats,
    places: Places,
    loads: Floats,
) -> np.uint32:
    """Bit i says that factor i of ``shrinks`` made the error smaller than all before it."""
    for k in range(group.size):
        group[k] = _widen(patterns[k], kind)
    best = LARGEST_BF16 if kind == BF16 else LARGEST_F16
    found = np.uint32(0)
    for i in range(shrinks.size):
        scale, zero = _qparams(low, high, shrinks[i], half, symmetric, kind)
        error = _error(group, scale, zero, half, kind, powers, places, loads)
        if error < best:
            best = error
            found |= np.uint32(1) << np.uint32(i)
    return found


@_inlined
def _last_tried(found: np.uint32, count: int, patience: int) -> int:
    """The factor at which the search ends: ``patience`` in a row helped no group at all."""
    idle = 0
    for i in range(count):
        idle = 0 if found >> np.uint32(i) & np.uint32(1) else idle + 1
        if idle == patience:
            return i
    return count - 1


@_inlined
def _mse(
    groups: Patterns,
    bits: int,
    symmetric: bool,
    kind: int,
    infinity: int,
    shrinks: Floats,
    patience: int,
    powers: Floats,
    scales: Patterns,
    zero_points: ZeroPoints,
) -> int:
    total, group_size = groups.shape
    half = np.float32(1 << (bits - 1))
    room = CHUNK_CODES // group_size
    low_keys = np.empty(room, np.int32)
    high_keys = np.empty(room, np.int32)
    lows = np.empty(total, np.float32)
    highs = np.empty(total, np.float32)
    improved = np.empty(total, np.uint32)
    group = np.empty(group_size, np.float32)
    places = np.empty(group_size, np.uint32)
    loads = np.empty(group_size // 2, np.float32)
    found = np.uint32(0)
    for first in range(0, total, room):
        chunk = groups[first : first + room]
        _extremes(chunk, _key_16, low_keys, high_keys)
        if _any_non_finite(chunk.shape[0], infinity, low_keys, high_keys):
            return first
        for g in range(chunk.shape[0]):
            low = _from_key(low_keys[g], kind)
            high = _from_key(high_keys[g], kind)
            lows[first + g] = low
            highs[first + g] = high
            better = _improvements(
                chunk[g], low, high, half, symmetric, kind, shrinks, powers, group, places, loads
            )
            improved[first + g] = better
            found |= better
    last = _last_tried(found, shrinks.size, patience)
    for g in range(total):
        best = last
        while best > 0 and not improved[g] >> np.uint32(best) & np.uint32(1):
            best -= 1
        scale, zero = _qparams(lows[g], highs[g], shrinks[best], half, symmetric, kind)
        scales[g] = _narrow(scale, kind)
        if not symmetric:
            zero_points[g] = np.int8(zero)
    return -1


@_kernel
def mse_bf16(
    groups: Patterns,
    bits: int,
    symmetric: bool,
    shrinks: Floats,
    patience: int,
    powers: Floats,
    scales: Patterns,
    zero_points: ZeroPoints,
) -> int:
    """Scale and zero point of groups [n, group_size] from their extremes times the best factor
    of ``shrinks``, for codes of ``bits``; -1, or the first group of the chunk that holds a NaN or
    an Inf."""
    return _mse(
        groups, bits, symmetric, BF16, 0x7F80, shrinks, patience, powers, scales, zero_points
    )


@_kernel
def mse_f16(
    groups: Patterns,
    bits: int,
    symmetric: bool,
    shrinks: Floats,
    patience: int,
    powers: Floats,
    scales: Patterns,
    zero_points: ZeroPoints,
) -> int:
    """As ``mse_bf16``, for F16."""
    return _mse(
        groups, bits, symmetric, F16, 0x7C00, shrinks, patience, powers, scales, zero_points
    )
