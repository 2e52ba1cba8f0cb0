"""What every op on arrays must do, whichever it is; `samples.OPS` says what each is tried on."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
from samples import OPS, OpSample, each

from carnice_build.dtypes import ITEM_SIZE, NUMPY_NAME, TensorSpec
from carnice_build.graph import ArrayOp, BadInput, NonFiniteValue, TensorData

ON_ARRAYS = [sample for sample in OPS if isinstance(sample.op, ArrayOp)]
IN_ROWS = [
    sample
    for sample in ON_ARRAYS
    if isinstance(sample.op, ArrayOp) and (sample.op.rowwise or sample.op.transposed)
]

GUARD = 64
"""Bytes before and behind an output, which nobody may write."""


class Room:
    """Memory for the outputs of `specs`, filled with one byte, and guarded on both sides."""

    def __init__(self, specs: Sequence[TensorSpec], fill: int) -> None:
        self._fill = fill
        self._memory = [np.full(spec.nbytes + 2 * GUARD, fill, np.uint8) for spec in specs]
        self.outputs = [
            TensorData(
                spec.dtype,
                memory[GUARD : GUARD + spec.nbytes]
                .view(NUMPY_NAME[spec.dtype])
                .reshape(spec.shape),
            )
            for spec, memory in zip(specs, self._memory, strict=True)
        ]

    def content(self) -> list[bytes]:
        """The outputs' bytes, once nothing beside them was written."""
        for memory in self._memory:
            assert (memory[:GUARD] == self._fill).all()
            assert (memory[-GUARD:] == self._fill).all()
        return [memory[GUARD:-GUARD].tobytes() for memory in self._memory]


def applied(
    sample: OpSample, inputs: Sequence[TensorData] | None = None, fill: int = 0xA5
) -> list[bytes]:
    """The bytes of the outputs."""
    assert isinstance(sample.op, ArrayOp)
    room = Room(sample.op.infer(sample.params, sample.specs), fill)
    sample.op.apply(sample.params, inputs or sample.inputs(), room.outputs)
    return room.content()


@each(ON_ARRAYS)
def test_what_is_inferred_is_what_is_filled(sample: OpSample) -> None:
    """An op writes every byte of its outputs, whatever was there before, and none beside them."""
    assert applied(sample, fill=0xA5) == applied(sample, fill=0x5A)


@each(ON_ARRAYS)
def test_inputs_stay_as_they_are(sample: OpSample) -> None:
    """Other actions read the same arrays, and their digests were taken before."""
    inputs = sample.inputs()
    before = [item.array.tobytes() for item in inputs]
    applied(sample, inputs)

    assert before == [item.array.tobytes() for item in inputs]


@each(ON_ARRAYS)
def test_equal_inputs_give_equal_bytes(sample: OpSample) -> None:
    """Nothing but the inputs decides what comes out."""
    assert applied(sample) == applied(sample)


@each(ON_ARRAYS)
def test_what_passes_fits_its_place(sample: OpSample) -> None:
    """What an op passes on, where digests alone tell what comes out, has the output's type."""
    assert isinstance(sample.op, ArrayOp)
    specs = sample.specs
    outputs = sample.op.infer(sample.params, specs)
    # Inputs of one type and shape are equal, any others are not.
    passed = sample.op.passes([str(spec) for spec in specs])
    given = [None] * len(outputs) if passed is None else list(passed)

    assert len(outputs) == len(given)
    assert [] == [
        i for i, item in enumerate(given) if item is not None and specs[item] != outputs[i]
    ]


def cuts(rows: int) -> list[list[int]]:
    """Ways to cut that many rows: one by one, in blocks that divide nothing, at both ends."""
    return [list(range(1, rows)), list(range(3, rows, 3)), list(range(7, rows, 7)), [1, rows - 1]]


@each(IN_ROWS)
def test_any_split_by_rows_gives_the_same_bytes(sample: OpSample) -> None:
    """Rows that come a block at a time, of whatever size, make what the whole tensor makes."""
    expected = applied(sample)
    rows = sample.specs[0].shape[0]

    for cut in cuts(rows):
        assert expected == in_blocks(sample, [0, *cut, rows])


def in_blocks(sample: OpSample, edges: Sequence[int]) -> list[bytes]:
    """The bytes of the outputs, of rows that come in blocks, as `execute.streaming` gives them."""
    assert isinstance(sample.op, ArrayOp)
    inputs = sample.inputs()
    room = Room(sample.op.infer(sample.params, sample.specs), 0xA5)
    for first, end in pairwise(edges):
        blocks = [TensorData(whole.dtype, whole.array[first:end].copy()) for whole in inputs]
        if sample.op.transposed:
            sample.op.apply_rows(sample.params, first, *blocks, room.outputs)
        else:
            rows = [TensorData(out.dtype, out.array[first:end]) for out in room.outputs]
            sample.op.apply(sample.params, blocks, rows)
    return room.content()


@each(IN_ROWS)
def test_ops_on_rows_have_outputs_that_fit(sample: OpSample) -> None:
    """As many rows everywhere when rows stand for themselves, else one input; never both ways."""
    assert isinstance(sample.op, ArrayOp)
    specs = sample.specs
    outputs = sample.op.infer(sample.params, specs)

    assert not (sample.op.rowwise and sample.op.transposed)
    if sample.op.rowwise:
        assert {specs[0].shape[0]} == {spec.shape[0] for spec in (*specs, *outputs)}
    else:
        assert 1 == len(specs)


# --- values that nobody expects ------------------------------------------------------------------

FLOATS = {"F32": (8, 23), "F16": (5, 10), "BF16": (8, 7), "F64": (11, 52)}
"""Bits of exponent and mantissa."""


def patterns(dtype: str) -> dict[str, int]:
    """Odd values of a type of floats, as bits."""
    exponent, mantissa = FLOATS[dtype]
    sign = 1 << (exponent + mantissa)
    infinity = ((1 << exponent) - 1) << mantissa
    return {
        "nan": infinity | 1 << (mantissa - 1),
        "signalling nan": infinity | 1,
        "negative nan": sign | infinity | 1,
        "infinity": infinity,
        "-infinity": sign | infinity,
        "zero": 0,
        "-0": sign,
        "denormal": 1,
        "-denormal": sign | 1,
        "largest denormal": (1 << mantissa) - 1,
        "largest": infinity - 1,
        "-largest": sign | (infinity - 1),
    }


NOT_FINITE = ("nan", "signalling nan", "negative nan", "infinity", "-infinity")
FINITE = tuple(name for name in patterns("F32") if name not in NOT_FINITE)


def changed(
    sample: OpSample, operand: int, pattern: str, indices: slice | int = slice(None)
) -> list[TensorData]:
    """The inputs, with a value put into one of them at these places."""
    inputs = list(sample.inputs())
    target = inputs[operand]
    array = target.array.copy()
    bits = f"u{ITEM_SIZE[target.dtype]}"
    array.reshape(-1).view(bits)[indices] = patterns(target.dtype)[pattern]
    inputs[operand] = TensorData(target.dtype, array)
    return inputs


def floats(sample: OpSample) -> list[int]:
    """The inputs that are floats, by their number."""
    return [index for index, spec in enumerate(sample.specs) if spec.dtype in FLOATS]


@each(ON_ARRAYS)
@pytest.mark.parametrize("pattern", NOT_FINITE)
def test_what_is_not_finite_is_refused_where_it_is(sample: OpSample, pattern: str) -> None:
    """NaN and infinity name their input and their place in it, or are zeros where that is asked."""
    for operand in floats(sample):
        for index in {0, sample.specs[operand].size // 2, sample.specs[operand].size - 1}:
            inputs = changed(sample, operand, pattern, index)
            if sample.params.get("nonfinite") == "zero":
                assert applied(sample, changed(sample, operand, "zero", index)) == applied(
                    sample, inputs
                )
                continue
            with pytest.raises((NonFiniteValue, BadInput)) as caught:
                applied(sample, inputs)
            assert operand == caught.value.operand
            if isinstance(caught.value, NonFiniteValue):
                assert index == caught.value.index


@each(ON_ARRAYS)
@pytest.mark.parametrize("pattern", FINITE)
def test_numbers_give_numbers_or_are_refused(sample: OpSample, pattern: str) -> None:
    """Denormals, signed zeros and the largest numbers never become NaN or infinity in silence."""
    specs = sample.op.infer(sample.params, sample.specs)
    for operand in floats(sample):
        for indices in (slice(None), slice(None, None, 2), 0):
            inputs = changed(sample, operand, pattern, indices)
            try:
                found = applied(sample, inputs)
            except (NonFiniteValue, BadInput) as refused:
                assert refused.operand is None or refused.operand in range(len(inputs))
                continue
            for content, spec in zip(found, specs, strict=True):
                assert is_finite(content, spec.dtype)


def is_finite(content: bytes, dtype: str) -> bool:
    """Whether all of a tensor are numbers; E4M3 has NaN, and no infinity."""
    if dtype == "F8_E4M3":
        return not any(byte & 0x7F == 0x7F for byte in content)
    if dtype not in FLOATS:
        return True
    infinity = patterns(dtype)["infinity"]
    bits = np.frombuffer(content, f"u{ITEM_SIZE[dtype]}")
    return not ((bits & infinity) == infinity).any()
