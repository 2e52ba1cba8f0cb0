"""INT4 weights in the format ``auto_round:auto_gptq``, bit for bit as auto-round 0.15 packs them.

A weight [out, in] becomes three tensors, all transposed, for groups of ``group_size`` inputs:

- ``qweight``, int32 [in / 8, out]: eight codes of 0..15 along *in*, the first one lowest;
- ``scales``, float16 [in / group_size, out], signed;
- ``qzeros``, int32 [in / group_size, out / 8]: eight zero points along *out*, each less one.

weight ~ scale * (code - zero point). The symmetric grids that auto-round makes have zero point 8
throughout, and a scale whose sign sends the group's weight of largest magnitude to code 0.
``out`` is a multiple of 8. (The ``pack`` of auto-round's ``QuantLinear`` drops the zero points
of the last outputs unless it is one of 32; ``quantize_weight_rtn`` keeps them, as we do.)

Functions work on a block of rows, from row ``first`` of the weight on, and write their columns
of the whole tensors: any split into blocks, on any threads, gives the same bytes. They run on the
calling thread, without the GIL. Weights come in the storage of ``dtype`` (``_floats``), in any
layout; all else must be C-contiguous and aligned. Misfits raise ValueError.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from . import _autoround_loops as loops
from ._floats import Array, FloatFormat, float_format, require, widen

Packed = NDArray[np.int32]
Scales = NDArray[np.float16]

GROUP_SIZES = (32, 64, 128)

SYMMETRIC_ZEROS = np.int32(0x77777777)
"""Eight zero points of 8, each stored less one."""

LARGEST = 8 * 65520.0
"""From this magnitude on, a weight's scale rounds to an infinite F16."""

_KERNELS = {"BF16": loops.quantize_bf16, "F16": loops.quantize_f16, "F32": loops.quantize_f32}


def quantize_rtn(
    weight: Array,
    dtype: str,
    group_size: int,
    first: int,
    qweight: Packed,
    qzeros: Packed,
    scales: Scales,
) -> int:
    """Round a block of rows, [n, in], to nearest on the symmetric grid of each group.

    The rule is that of ``quantize_weight_rtn`` (auto_round/utils/missing_tensors.py), which is
    auto-round's ``iters=0, disable_opt_rtn=True``: with m the end of the group of larger
    magnitude, the upper one when both are equal, and 0 among its values, scale = F16(-m / 8), at
    least 1e-5 in magnitude; code = clip(rint(w / scale), -8, 7) + 8 in float32, ties to even.
    (Layers in F16, unlike such tensors, get their quotient rounded to F16 by auto-round.)

    Returns -1, or the flat index in ``weight`` of the first value that is NaN, infinite, or of
    magnitude ``LARGEST`` or more; the outputs are then unspecified.
    """
    form, rows = _grouped("weight", weight, dtype, group_size)
    _require_format(rows.shape, first, qweight, qzeros, scales)
    stop = first + rows.shape[0]
    qzeros[:, first // 8 : -(-stop // 8)] = SYMMETRIC_ZEROS
    tile = _KERNELS[dtype](rows, first, qweight, scales.view(np.uint16))
    if tile < 0:
        return -1
    values = widen(rows[tile:].reshape(-1).view(form.storage), dtype)
    return tile * int(weight.shape[1]) + int(np.argmin(np.abs(values) < LARGEST))


def pack(
    weight: Array,
    dtype: str,
    tuned_scales: Scales,
    first: int,
    qweight: Packed,
    qzeros: Packed,
    scales: Scales,
) -> int:
    """Pack a block of rows, [n, in], that tuning has left on its grid: w = scale * (code - 8).

    ``tuned_scales`` is [n, in / group_size], as auto-round leaves it in ``layer.scale``, beside
    the product rounded to ``dtype`` in ``layer.weight``. The codes are rint(w / scale) + 8, which
    is what ``QuantLinear.pack`` (auto_round_extension/torch/qlinear_torch_zp.py) computes.

    Returns -1, or the flat index in ``weight`` of the first value that is no product of a code
    and its scale, NaN and infinity among them; the outputs are then unspecified. (auto-round
    would round such a value, or let it run over into the codes beside it.)
    """
    group_size = _group_size(weight.shape, tuned_scales.shape)
    form, rows = _grouped("weight", weight, dtype, group_size)
    require("tuned_scales", tuned_scales, np.float16, rows.shape[:2])
    _require_format(rows.shape, first, qweight, qzeros, scales)
    stop = first + rows.shape[0]
    qzeros[:, first // 8 : -(-stop // 8)] = SYMMETRIC_ZEROS
    scales[:, first:stop] = tuned_scales.T
    wide = tuned_scales.astype(np.float32)
    tile = loops.pack(rows, loops.KINDS[dtype], wide, first, qweight)
    if tile < 0:
        return -1
    values = widen(rows[tile:].view(form.storage), dtype)
    return tile * int(weight.shape[1]) + _first_off_grid(values, wide[tile:])


def unpack_rows(qweight: Packed, first: int, codes: NDArray[np.uint8]) -> None:
    """Write the codes, 0..15, of rows ``first`` and following to ``codes``, uint8 [n, in]."""
    rows, columns = codes.shape
    require("codes", codes, np.uint8, (rows, columns))
    _require_columns("qweight", qweight, np.int32, columns // 8, first + rows)
    loops.unpack(qweight, first, codes.reshape(rows, -1, GROUP_SIZES[0]))


def dequantize_rows(
    qweight: Packed, qzeros: Packed, scales: Scales, first: int, out_float32: NDArray[np.float32]
) -> None:
    """Write scale * (code - zero point) of rows ``first`` and following to ``out_float32``,
    [n, in]. The product is exact."""
    rows, columns = out_float32.shape
    require("out_float32", out_float32, np.float32, (rows, columns))
    group_size = _group_size((rows, columns), scales.shape[::-1])
    grouped = out_float32.reshape(rows, -1, group_size)
    _require_format(grouped.shape, first, qweight, qzeros, scales)
    loops.dequantize(qweight, qzeros, _wide(scales, first, rows), first, grouped)


def _wide(scales: Scales, first: int, count: int) -> NDArray[np.float32]:
    """The scales of rows ``first`` and following, [groups, count]."""
    return scales[:, first : first + count].astype(np.float32, order="C")


def _first_off_grid(values: NDArray[np.float32], scales: NDArray[np.float32]) -> int:
    """The flat index of the first of ``values`` [n, groups, group_size] that the loop refused."""
    with np.errstate(all="ignore"):
        steps = values / scales[..., None]
        codes = np.rint(steps)
        near = (np.abs(steps - codes) <= loops.OFF_GRID) & np.isfinite(scales[..., None])
    return int(np.argmin(near & (codes >= -8) & (codes <= 7)))


def _grouped(name: str, weight: Array, dtype: str, group_size: int) -> tuple[FloatFormat, Array]:
    """The bit patterns of a weight's rows, [n, groups, group_size], never writable: numba would
    compile again for an array that is."""
    form = float_format(dtype)
    if group_size not in GROUP_SIZES:
        raise ValueError(f"group_size is {group_size}, expected one of {GROUP_SIZES}")
    if weight.ndim != 2 or weight.shape[1] % group_size:
        raise ValueError(f"shape {list(weight.shape)} is not [rows, a multiple of {group_size}]")
    weight = np.require(weight, requirements=["C", "A"])
    require(name, weight, form.storage, weight.shape)
    patterns = weight.view(form.bits).reshape(weight.shape[0], -1, group_size)
    patterns.flags.writeable = False
    return form, patterns


def _group_size(weight: tuple[int, ...], scales: tuple[int, ...]) -> int:
    """The inputs that share a scale, from the shapes [n, in] and [n, in / group_size]."""
    return weight[-1] // scales[-1] if len(scales) == 2 and scales[-1] else 0


def _require_format(
    rows: tuple[int, ...], first: int, qweight: Packed, qzeros: Packed, scales: Scales
) -> None:
    """Raise ValueError unless the three tensors fit each other and hold the rows,
    [n, groups, group_size] from ``first`` on."""
    count, groups, group_size = rows
    if first < 0:
        raise ValueError(f"first is {first}, expected 0 or more")
    _require_columns("qweight", qweight, np.int32, groups * group_size // 8, first + count)
    outputs = qweight.shape[1]
    if outputs % 8:
        raise ValueError(f"qweight has {outputs} columns, expected a multiple of 8")
    require("qzeros", qzeros, np.int32, (groups, outputs // 8))
    require("scales", scales, np.float16, (groups, outputs))


def _require_columns(name: str, array: Array, storage: type, lines: int, stop: int) -> None:
    outputs = array.shape[1] if array.ndim == 2 else 0
    require(name, array, storage, (lines, max(outputs, stop)))
