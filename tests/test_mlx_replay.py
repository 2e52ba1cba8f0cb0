"""The steps of a trace, computed with numpy, give the bits of mlx, whatever the bits are."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from carnice_build.dtypes import NUMPY_NAME, TensorSpec
from carnice_build.formats.mlx.ops import Transform
from carnice_build.formats.mlx.replay import replay
from carnice_build.formats.mlx.trace import Step, Steps, as_params, infer, parsed
from carnice_build.graph import NonFiniteValue, TensorData

mx = pytest.importorskip("mlx.core")

FLOATS = {"BF16": mx.bfloat16, "F16": mx.float16, "F32": mx.float32}
WORDS = {"BF16": np.uint16, "F16": np.uint16, "F32": np.uint32}
EXPONENT = {"BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F800000}

dtypes = st.sampled_from(list(FLOATS))


@st.composite
def patterns(draw: st.DrawFn, dtype: str, shape: tuple[int, ...] = (4, 6)) -> TensorData:
    """Any bit patterns of a float but those of NaN and infinity."""
    words = WORDS[dtype]
    array = draw(arrays(words, shape, elements=st.integers(0, int(np.iinfo(words).max))))
    mask = words(EXPONENT[dtype])
    array[(array & mask) == mask] &= words(~EXPONENT[dtype] & int(np.iinfo(words).max))
    return TensorData(dtype, array.view(NUMPY_NAME[dtype]))


def to_mlx(data: TensorData) -> Any:
    """The same bits in mlx."""
    words = mx.array(data.array.view(WORDS[data.dtype]))
    return words.view(FLOATS[data.dtype])


def bits(array: Any, dtype: str) -> NDArray[Any]:
    """The bits of one of mlx's arrays."""
    return np.array(array.view(mx.uint32 if dtype == "F32" else mx.uint16))


def ours(steps: Steps, *sources: TensorData) -> NDArray[Any]:
    """The bits of what our replay gives."""
    made = replay(steps, sources)
    return np.ascontiguousarray(made.array).view(WORDS[made.dtype])


@given(st.data(), dtypes, st.sampled_from(["add", "subtract", "multiply"]))
def test_arithmetic_rounds_as_in_mlx(data: st.DataObject, dtype: str, op: str) -> None:
    """Sums, differences and products of any finite numbers, denormals and zeros of both signs."""
    one, other = data.draw(patterns(dtype)), data.draw(patterns(dtype))
    theirs = getattr(mx, op)(to_mlx(one), to_mlx(other))
    finite = np.isfinite(np.array(theirs.astype(mx.float32)))

    found = ours((Step(op, (0, 1)),), one, other)
    np.testing.assert_array_equal(bits(theirs, dtype)[finite], found[finite])


@given(st.data(), dtypes, st.sampled_from([1.0, -8.0, 0.3, 448.0]))
def test_numbers_have_the_type_that_they_meet(
    data: st.DataObject, dtype: str, value: float
) -> None:
    """A number is rounded to the tensor's type before it is added or multiplied."""
    one = data.draw(patterns(dtype))
    for op, theirs in (
        ("add_number", to_mlx(one) + value),
        ("subtract_number", to_mlx(one) - value),
        ("multiply_number", to_mlx(one) * value),
    ):
        finite = np.isfinite(np.array(theirs.astype(mx.float32)))

        found = ours((Step(op, (0,), (value,)),), one)
        np.testing.assert_array_equal(bits(theirs, dtype)[finite], found[finite])


@given(st.data(), dtypes, dtypes)
def test_casts_round_as_in_mlx(data: st.DataObject, source: str, target: str) -> None:
    """From any float type to any other, to nearest and beyond the range to infinity."""
    one = data.draw(patterns(source))
    theirs = bits(to_mlx(one).astype(FLOATS[target]), target)

    np.testing.assert_array_equal(theirs, ours((Step("astype", (0,), (target,)),), one))


@pytest.mark.parametrize("dtype", list(FLOATS))
def test_every_code_of_fp8_is_decoded_as_in_mlx(dtype: str) -> None:
    """All 256 of them; both codes of NaN are NaN."""
    codes = np.arange(256, dtype=np.uint8)
    theirs = mx.from_fp8(mx.array(codes), dtype=FLOATS[dtype])
    steps = (Step("from_fp8", (0,), (dtype,)),)
    made = replay(steps, [TensorData("F8_E4M3", codes)])
    number = np.isfinite(np.array(theirs.astype(mx.float32)))
    found = made.array.view(WORDS[dtype])

    np.testing.assert_array_equal(bits(theirs, dtype)[number], found[number])
    assert [127, 255] == np.flatnonzero(~number).tolist()


@given(st.data(), dtypes)
def test_moves_are_those_of_mlx(data: st.DataObject, dtype: str) -> None:
    """Slices with strides, transposes, padding, repetition and concatenation move alike."""
    one = data.draw(patterns(dtype, (4, 6, 2)))
    array = to_mlx(one)
    both = (
        Step("slice", (0,), ((0, 1, 0), (4, 6, 2), (1, 2, 1))),
        Step("concatenate", (1, 1), (1,)),
    )
    for steps, theirs in (
        ((Step("reshape", (0,), ((8, 6),)),), array.reshape(8, 6)),
        ((Step("transpose", (0,), ((2, 0, 1),)),), array.transpose(2, 0, 1)),
        ((Step("pad", (0,), ((0, 1, 0), (2, 0, 3))),), mx.pad(array, ((0, 2), (1, 0), (0, 3)))),
        ((Step("broadcast", (0,), ((3, 4, 6, 2),)),), mx.broadcast_to(array, (3, 4, 6, 2))),
        ((Step("negative", (0,)),), -array),
        (both, mx.concatenate([array[:, 1::2]] * 2, axis=1)),
    ):
        spec = infer(steps, [TensorSpec(dtype, one.array.shape)])

        assert (dtype, tuple(theirs.shape)) == (spec.dtype, spec.shape)
        np.testing.assert_array_equal(bits(theirs, dtype), ours(steps, one))


@given(st.data())
def test_bytes_are_seen_as_mlx_sees_them(data: st.DataObject) -> None:
    """Sixteen bytes are four words, the first byte the lowest."""
    content = data.draw(arrays(np.uint8, (2, 3, 16)))
    theirs = np.array(mx.array(content).view(mx.uint32))
    made = replay((Step("view", (0,), ("U32",)),), [TensorData("U8", content)])

    np.testing.assert_array_equal(theirs, made.array)


@given(st.data())
def test_each_is_the_same_steps_for_every_index(data: st.DataObject) -> None:
    """A stack's program is that of each of its members."""
    one = data.draw(patterns("BF16", (3, 4, 2)))
    inner = (Step("transpose", (0,), ((1, 0),)), Step("add_number", (1,), (1.0,)))
    each = (Step("each", (0,), (as_params(inner),)),)
    members = [ours(inner, TensorData("BF16", one.array[index])) for index in range(3)]

    np.testing.assert_array_equal(np.stack(members), ours(each, one))


def params(steps: Steps, dtype: str = "BF16", nonfinite: str = "refuse") -> dict[str, Any]:
    return {"steps": as_params(steps), "dtype": dtype, "nonfinite": nonfinite}


def test_what_the_steps_make_on_the_way_is_declared() -> None:
    """Each value that is kept, and the floats that sums are computed in."""
    (item,) = (TensorSpec("BF16", (64, 256)),)
    add = Step("add_number", (0,), (1.0,))
    one, two = ((add,), (add, Step("transpose", (1,), ((1, 0),))))
    needed = [Transform().workspace(params(steps), [item]) for steps in (one, two)]

    assert needed[0] >= item.nbytes + 2 * 4 * item.size
    assert needed[1] == needed[0] + item.nbytes


def test_nan_is_refused_or_counts_as_zero() -> None:
    """As everywhere in the format."""
    source = TensorData("BF16", np.array([0x3F80, 0x7FC0], np.uint16))
    out = TensorData("BF16", np.empty(2, np.uint16))
    steps = (Step("add_number", (0,), (1.0,)),)
    with pytest.raises(NonFiniteValue) as caught:
        Transform().apply(params(steps), [source], [out])
    Transform().apply(params(steps, nonfinite="zero"), [source], [out])

    assert (1, 0) == (caught.value.index, caught.value.operand)
    assert [0x4000, 0x3F80] == out.array.tolist()


@pytest.mark.parametrize(("number", "dtype"), [(3e38, "BF16"), (1.0, "F16")])
def test_what_the_steps_make_infinite_is_no_operands_fault(number: float, dtype: str) -> None:
    """Neither their sum nor a cast of it: all that they are made of are numbers."""
    sources = [TensorData("BF16", np.full(2, 0x7E80, np.uint16)) for _ in range(2)]
    out = TensorData(dtype, np.empty(2, NUMPY_NAME[dtype]))
    steps = (Step("add", (0, 1)), Step("add_number", (2,), (number,)))
    with pytest.raises(NonFiniteValue) as caught:
        Transform().apply(params(steps, dtype), sources, [out])

    assert caught.value.operand is None


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        "[]",
        '"x"',
        '{"programs": [[]], "tensors": [["a", "BF16", [2], [["b", "BF16", [3]]], 0]]}',
        '{"programs": [[["exec", [0]]]], "tensors": []}',
        '{"programs": [[["negative", [9]]]], "tensors": [["a", "F32", [], [["b", "F32", []]], 0]]}',
    ],
)
def test_a_text_that_is_no_trace_is_none(text: str) -> None:
    """Whoever can write to the cache can write nonsense: it is refused, and asked for again."""
    with pytest.raises(ValueError, match="no trace"):
        parsed(text)


def test_a_list_of_names_in_a_refusal_is_cut() -> None:
    """The first ones say it, and how many more there are."""
    from carnice_build.backends.mlx_trace import _sentence

    names = ", ".join(f"layers.{index}.weight" for index in range(36))

    assert _sentence(ValueError(f"Received 36 parameters not in model: {names}.")).endswith(
        ", layers.4.weight and 31 more"
    )
