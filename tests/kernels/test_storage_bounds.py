"""How far weights in storages of compressed-tensors may be off, against what the ops make."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from int4_weights import EXPONENT, STORAGE, Array, any_finite, ordinary, to_float
from storage_samples import assorted, every_pattern, exponents

from carnice_build.dtypes import NUMPY_NAME, TensorSpec
from carnice_build.formats.checks import QuantizedValues, Tensors
from carnice_build.formats.compressed_tensors import ops as packed
from carnice_build.formats.compressed_tensors.storages import (
    floats_ops,
    floats_values,
    ints_ops,
    mx_ops,
    mx_values,
    nvfp4_ops,
    nvfp4_values,
)
from carnice_build.formats.compressed_tensors.storages.integers_values import (
    Integers,
    IntegerValues,
    round_trip,
)
from carnice_build.formats.values import Floats, Incomparable
from carnice_build.graph import ArrayOp, BadInput, TensorData
from carnice_build.tensors import SourceTensor

MINMAX = "memoryless_minmax"
every_dtype = pytest.mark.parametrize("dtype", STORAGE)


class InMemory:
    """Bytes that are read as those of a file are."""

    identity = "memory"

    def __init__(self, content: bytes) -> None:
        self.content = content

    def read_into(self, offset: int, buffer: memoryview) -> None:
        buffer[:] = self.content[offset : offset + len(buffer)]


@dataclass(frozen=True)
class Storage:
    """An op, what its outputs are called, and how they are read back."""

    op: ArrayOp
    params: Mapping[str, Any]
    suffixes: Sequence[str]
    values: Callable[[Tensors], QuantizedValues]
    round_trip: Callable[[Floats], Floats]

    def made(self, weight: Array, dtype: str) -> dict[str, SourceTensor]:
        """The tensors of module `m`."""
        specs = self.op.infer(self.params, [TensorSpec(dtype, weight.shape)])
        outputs = [TensorData(s.dtype, np.empty(s.shape, NUMPY_NAME[s.dtype])) for s in specs]
        self.op.apply(self.params, [TensorData(dtype, weight)], outputs)
        return {
            f"m.{suffix}": held(f"m.{suffix}", spec, item.array)
            for suffix, spec, item in zip(self.suffixes, specs, outputs, strict=True)
        }

    def off(self, weight: Array, dtype: str) -> int:
        """Weights that are further off than their bits allow, read a few rows at a time."""
        return outside(self.values(self.made(weight, dtype)), to_float(weight, dtype))


def held(name: str, spec: TensorSpec, array: Array) -> SourceTensor:
    return SourceTensor(name, spec, InMemory(array.tobytes()), 0)  # type: ignore[arg-type]


def outside(values: QuantizedValues, source: Floats) -> int:
    assert source.shape == values.shape
    found = 0
    for start in range(0, len(source), 7):
        rows = source[start : start + 7]
        made = values.rows(start, start + len(rows)).astype(np.float64)
        found += int((~(np.abs(made - rows) <= values.allowance(rows, start))).sum())
    return found


def _integers(
    bits: int, group_size: int | None, symmetric: bool, words: bool, observer: str = MINMAX
) -> Storage:
    scheme = Integers(bits, group_size, symmetric, observer)
    params = {"bits": bits, "group_size": group_size, "symmetric": symmetric}
    names = packed.SUFFIXES if words else ints_ops.SUFFIXES
    if words:
        params |= {"observer": observer, "columns": False, "rows": False}
    return Storage(
        packed.GroupQuantize() if words else ints_ops.IntQuantize(),
        params,
        [name for name in names if name != "weight_zero_point" or not symmetric],
        lambda tensors: IntegerValues(tensors, "m", scheme, packed=words),
        lambda weight: round_trip(weight, scheme),
    )


def _floats(block: tuple[int, int] | None) -> Storage:
    return Storage(
        floats_ops.FloatQuantize(),
        {"block": block},
        floats_ops.SUFFIXES,
        lambda tensors: floats_values.BlockValues(tensors, "m", block),
        lambda weight: floats_values.round_trip(weight, block),
    )


def _mx(bits: int) -> Storage:
    return Storage(
        mx_ops.MxQuantize(),
        {"bits": bits},
        mx_ops.SUFFIXES[bits],
        lambda tensors: mx_values.MxValues(tensors, "m", bits),
        lambda weight: mx_values.round_trip(weight, bits),
    )


STORAGES = {
    "W4A16": _integers(4, 32, True, True),
    "W8A16": _integers(8, 32, True, True),
    "W3A16 of channels": _integers(3, None, True, True),
    "W4A16_ASYM": _integers(4, 32, False, True),
    "W8A16 asymmetric, of channels": _integers(8, None, False, True),
    "W8A8": _integers(8, None, True, False),
    "W8A8 asymmetric": _integers(8, 32, False, False),
    "FP8": _floats(None),
    "FP8_BLOCK": _floats((16, 48)),
    "NVFP4A16": Storage(
        nvfp4_ops.GlobalQuantize(),
        {},
        nvfp4_ops.SUFFIXES,
        lambda tensors: nvfp4_values.GlobalValues(tensors, "m"),
        lambda weight: nvfp4_values.round_trip([weight])[0],
    ),
    "MXFP4": _mx(4),
    "MXFP8": _mx(8),
}
every_storage = pytest.mark.parametrize("storage", STORAGES.values(), ids=STORAGES)


@every_storage
@every_dtype
def test_ordinary_weights_and_corners_keep_the_bound(storage: Storage, dtype: str) -> None:
    """Zeros, denormals, ties, groups of one large weight, and any patterns."""
    assert 0 == storage.off(ordinary(dtype, (40, 96)), dtype)
    assert 0 == storage.off(assorted(dtype, 30000), dtype)


@every_storage
@every_dtype
def test_weights_of_every_magnitude_keep_the_bound(storage: Storage, dtype: str) -> None:
    """Every 16-bit value, in groups down to those that become zeros."""
    for exponent in exponents(dtype, 8)[:-1]:
        try:
            assert 0 == storage.off(every_pattern(dtype, exponent)[::3], dtype)
        except BadInput:
            assert ("F16", "nvfp4.global") == (dtype, storage.op.name)


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_ranges_of_the_least_error_keep_their_bound(dtype: str, symmetric: bool, bits: int) -> None:
    """The search may cut the ends of a range."""
    storage = _integers(bits, 32, symmetric, True, "mse")

    assert 0 == storage.off(ordinary(dtype, (40, 96)), dtype)
    assert 0 == storage.off(assorted(dtype, 30000), dtype)


def test_a_round_trip_searches_as_the_op_does() -> None:
    """The observer is the scheme's."""
    storage = _integers(4, 32, True, True, "mse")
    weight = ordinary("BF16", (40, 96))
    values = storage.values(storage.made(weight, "BF16"))

    assert np.array_equal(values.rows(0, 40), storage.round_trip(to_float(weight, "BF16")))


@every_storage
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_whatever_is_made_keeps_the_bound(storage: Storage, data: st.DataObject) -> None:
    """Of any bit patterns that are not refused, far enough from Inf not to be rounded to it."""
    dtype = data.draw(st.sampled_from(list(STORAGE)))
    step = EXPONENT[dtype] & -EXPONENT[dtype]
    weight = data.draw(any_finite(dtype, 32, 2, EXPONENT[dtype] - 2 * step))
    try:
        found = storage.off(weight, dtype)
    except BadInput:
        return

    assert 0 == found


@every_storage
def test_other_codes_break_the_bound(storage: Storage) -> None:
    """Most weights whose codes are moved by two or more are seen."""
    weight = np.random.default_rng(1).standard_normal((32, 96)).astype(np.float32)
    tensors = storage.made(weight, "F32")
    codes = tensors[f"m.{storage.suffixes[0]}"]
    moved = bytes(byte ^ 0x22 for byte in codes.file.content)  # type: ignore[union-attr]
    tensors[codes.name] = SourceTensor(codes.name, codes.spec, InMemory(moved), 0)  # type: ignore[arg-type]

    assert outside(storage.values(tensors), weight) > 0.5 * weight.size


@every_storage
def test_scales_twice_as_large_break_the_bound(storage: Storage) -> None:
    """With the codes as they are, all but the smallest weights are seen."""
    weight = np.random.default_rng(1).standard_normal((32, 96)).astype(np.float32)
    tensors = storage.made(weight, "F32")
    name = "m.weight_global_scale" if len(storage.suffixes) == 3 else "m.weight_scale"
    name = name if name in tensors else "m.weight_scale"
    scales = tensors[name]
    array = np.frombuffer(scales.file.content, NUMPY_NAME[scales.spec.dtype])  # type: ignore[union-attr]
    doubled = array + 1 if scales.spec.dtype == "U8" else array * np.float32(2)
    tensors[name] = held(name, scales.spec, doubled.astype(array.dtype))

    assert outside(storage.values(tensors), weight) > 0.6 * weight.size


@every_storage
def test_a_round_trip_is_what_a_folder_says(storage: Storage) -> None:
    """Of weights in BF16, as models are published."""
    weight = ordinary("BF16", (40, 96))
    values = storage.values(storage.made(weight, "BF16"))

    assert np.array_equal(values.rows(0, 40), storage.round_trip(to_float(weight, "BF16")))


@every_storage
def test_tensors_that_are_missing_or_do_not_fit_are_not_compared(storage: Storage) -> None:
    """Each of them, of another type or shape, or not there."""
    tensors = storage.made(ordinary("BF16", (40, 96)), "BF16")
    needed = [name for name in tensors if name != "m.weight_shape"]
    for name in needed:
        spec = tensors[name].spec
        others = [None, TensorSpec("F64", spec.shape), TensorSpec(spec.dtype, (3, *spec.shape))]
        for other in others:
            changed = {key: item for key, item in tensors.items() if key != name}
            if other is not None:
                changed[name] = SourceTensor(name, other, InMemory(bytes(other.nbytes)), 0)  # type: ignore[arg-type]
            with pytest.raises(Incomparable, match="m"):
                storage.values(changed)


def test_columns_in_another_order_are_not_compared() -> None:
    """As GPTQ may have them."""
    storage = STORAGES["W4A16"]
    tensors = storage.made(ordinary("BF16", (40, 96)), "BF16")
    order = held("m.weight_g_idx", TensorSpec("I32", (96,)), np.zeros(96, np.int32))
    with pytest.raises(Incomparable, match="another order"):
        storage.values({**tensors, order.name: order})


def test_a_shape_that_the_codes_have_not_is_not_compared() -> None:
    """Only it says how many columns a packed channel has."""
    storage = STORAGES["W3A16 of channels"]
    tensors = storage.made(ordinary("BF16", (40, 96)), "BF16")
    # Nine words hold 86 to 96 codes of three bits.
    for shape in ([41, 96], [40, 85], [40, 97], [40, 0]):
        stated = held("m.weight_shape", TensorSpec("I64", (2,)), np.array(shape, np.int64))
        with pytest.raises(Incomparable):
            storage.values({**tensors, stated.name: stated})


def test_the_scale_of_a_weight_may_be_a_scalar() -> None:
    """As others than llm-compressor write it."""
    storage = STORAGES["FP8"]
    weight = ordinary("BF16", (40, 96))
    tensors = storage.made(weight, "BF16")
    scale = tensors["m.weight_scale"]
    scalar = SourceTensor(scale.name, TensorSpec("BF16", ()), scale.file, 0)

    assert 0 == outside(storage.values({**tensors, scale.name: scalar}), to_float(weight, "BF16"))


def test_a_negative_or_infinite_global_scale_is_not_compared() -> None:
    """It is no scale."""
    storage = STORAGES["NVFP4A16"]
    tensors = storage.made(ordinary("BF16", (40, 96)), "BF16")
    for value in (0, -1, np.inf, np.nan):
        scale = held("m.weight_global_scale", TensorSpec("F32", (1,)), np.float32([value]))
        with pytest.raises(Incomparable, match="no positive number"):
            storage.values({**tensors, scale.name: scale})
