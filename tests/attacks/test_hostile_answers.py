"""Hostile answers: what a library is said to make of a checkpoint is a trace of it, or none.

Whatever the cache holds, it is asked for anew or gives tensors that can be made.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from carnice_build.dtypes import NUMPY_NAME, TensorSpec
from carnice_build.formats.mlx.answers import answered
from carnice_build.formats.mlx.ops import Transform
from carnice_build.formats.mlx.replay import replay
from carnice_build.formats.mlx.trace import NotATrace, Trace, as_params
from carnice_build.graph import TensorData

WEIGHT, SCALE = "model.layers.0.mlp.experts.*.up_proj.weight", "model.layers.0.scale"
NORM, QUERY, CODES, EXPONENTS = "model.norm.weight", "q_proj.weight", "down_blocks", "down_scales"

TENSORS = {
    "model.layers.0.mlp.experts.0.up_proj.weight": TensorSpec("F8_E4M3", (4, 64)),
    "model.layers.0.mlp.experts.1.up_proj.weight": TensorSpec("F8_E4M3", (4, 64)),
    SCALE: TensorSpec("BF16", (2, 4, 64)),
    NORM: TensorSpec("BF16", (256,)),
    QUERY: TensorSpec("BF16", (4, 64)),
    CODES: TensorSpec("U8", (2, 4, 2, 16)),
    EXPONENTS: TensorSpec("U8", (2, 4, 2)),
    "mtp.norm.weight": TensorSpec("BF16", (8,)),
}
NAMES = {*TENSORS, WEIGHT}

STATED = {"bits": 4, "group_size": 32, "mode": "mxfp4"}

ANSWER: dict[str, Any] = {
    "programs": [
        [],
        [["each", [0, 1], [["from_fp8", [0], "BF16"], ["multiply", [2, 1]]]]],
        [["add_number", [0], 1.0]],
        [
            ["pad", [0], [0, 0], [4, 0]],
            ["reshape", [1], [2, 4, 64]],
            ["slice", [2], [0, 0, 0], [2, 4, 64], [1, 2, 1]],
            ["transpose", [3], [1, 0, 2]],
            ["concatenate", [4, 4], 0],
            ["broadcast", [5], [4, 2, 64]],
            ["multiply_number", [6], 0.5],
            ["negative", [7]],
            ["astype", [8], "F32"],
        ],
        [["view", [0], "U32"], ["reshape", [1], [2, 4, 8]]],
    ],
    "tensors": [
        [
            "up.weight", "BF16", [2, 4, 64],
            [[WEIGHT, "F8_E4M3", [2, 4, 64]], [SCALE, "BF16", [2, 4, 64]]], 1,
        ],
        ["norm.weight", "BF16", [256], [[NORM, "BF16", [256]]], 2],
        ["q.weight", "F32", [4, 2, 64], [[QUERY, "BF16", [4, 64]]], 3],
        ["q_again.weight", "BF16", [4, 64], [[QUERY, "BF16", [4, 64]]], 0],
        ["down.weight", "U32", [2, 4, 8], [[CODES, "U8", [2, 4, 2, 16]]], 4],
        ["down.scales", "U8", [2, 4, 2], [[EXPONENTS, "U8", [2, 4, 2]]], 0],
    ],
    "modules": {"up": {}, "q_again": {"bits": 8, "group_size": 64}},
    "quantized": {"down": STATED},
    "stated": STATED,
    "dropped": ["mtp.norm.weight"],
}  # fmt: skip
"""An answer with most of what may stand in one."""


def read(answer: Any) -> Any:
    """What is made of an answer about the checkpoint of `TENSORS`."""
    return answered(json.dumps(answer), TENSORS, NAMES)


def make(trace: Trace) -> None:
    """Make every tensor of a trace, of zeros; what is made is what was said."""
    for item in trace.tensors:
        specs = [source.spec for source in item.sources]
        params = {"steps": as_params(item.steps), "dtype": item.spec.dtype, "nonfinite": "refuse"}
        Transform().workspace(params, specs)
        zeros = [TensorData(s.dtype, np.zeros(s.shape, NUMPY_NAME[s.dtype])) for s in specs]

        assert (item.spec,) == Transform().infer(params, specs)
        assert item.spec.shape == replay(item.steps, zeros).array.shape


def test_a_good_answer_is_a_trace() -> None:
    """What the others change is one."""
    make(read(ANSWER))


Change = Callable[[dict[str, Any]], object]


def program(*steps: Sequence[Any], shape: Sequence[Any] = (256,), dtype: str = "BF16") -> Change:
    """The norm is made by these steps."""

    def change(answer: dict[str, Any]) -> None:
        answer["programs"].append(steps)
        answer["tensors"][1][1:3] = [dtype, shape]
        answer["tensors"][1][4] = len(answer["programs"]) - 1

    return change


def named(name: Any) -> Change:
    """The norm has another name."""
    return lambda answer: answer["tensors"][1].__setitem__(0, name)


def sourced(name: Any) -> Change:
    """The norm is made of another tensor."""
    return lambda answer: answer["tensors"][1][3][0].__setitem__(0, name)


def module(path: str, **own: Any) -> Change:
    """Something is said of a module."""
    return lambda answer: answer["modules"].__setitem__(path, own)


HOSTILE: dict[str, Change] = {
    **{f"a source called {name!r}": sourced(name) for name in (0, None, True, [], {}, "", "*")},
    **{
        f"a tensor called {name[:12]!r}": named(name)
        for name in ("__metadata__", "../../x", "a/b", "a\ud800b", "", "a..b", "a" * 1000, "*")
    },
    "a tensor called 7": named(7),
    "a name twice": named("up.weight"),
    "a pad beyond all": program(["pad", [0], [0], [10**30]], ["slice", [1], [0], [10**30], [1]]),
    "a broadcast to 10^9 rows": program(
        ["broadcast", [0], [10**9, 256]], ["slice", [1], [0, 0], [1, 256], [1, 1]],
        ["reshape", [2], [256]],
    ),
    "a number that is missing": program(["add_number", [0]]),
    "a number of text": program(["add_number", [0], "abc"]),
    "a number that is none": program(["add_number", [0], float("nan")]),
    "a number beyond F32": program(["multiply_number", [0], 1e300]),
    "a number that is a bool": program(["add_number", [0], True]),
    "two numbers": program(["add_number", [0], 1.0, 2.0]),
    "a negative pad": program(["pad", [0], [-1], [1]]),
    "negative sizes": program(["reshape", [0], [-2, -128]]),
    "sizes of floats": program(["reshape", [0], [256.0]]),
    "sizes that are one": program(["reshape", [0], 256]),
    "axes without end": program(["reshape", [0], [1] * 99 + [256]], ["reshape", [1], [256]]),
    "an operand too many": program(["negative", [0, 0]]),
    "no operand": program(["concatenate", [], 0]),
    "an operand that comes later": program(["negative", [2]], ["negative", [1]]),
    "a step of no use": program(["negative", [0]], ["add_number", [0], 1.0]),
    "steps without a bottom": program(
        ["each", [0], [["each", [0], [["each", [0], [["each", [0], [["each", [0], []]]]]]]]]]
    ),
    "an unknown step": program(["exec", [0]]),
    "an axis that is not there": program(["concatenate", [0], 5]),
    "words that are floats": program(["view", [0], "U32"], ["view", [1], "I64"], shape=[64]),
    "a view of an unknown type": program(["view", [0], "U7"]),
    "another type than the steps make": program(["negative", [0]], dtype="I64"),
    "a norm of nothing": program(["slice", [0], [0], [0], [1]], shape=[0]),
    "a norm left out": lambda answer: answer["tensors"].pop(1),
    "a tensor of nothing": lambda answer: answer["tensors"][1].__setitem__(3, []),
    "a source of no use": lambda answer: answer["tensors"][1][3].append([QUERY, "BF16", [4, 64]]),
    "a source twice": lambda answer: answer["tensors"][1][3].append([NORM, "BF16", [256]]),
    "dropped and used": lambda answer: answer["dropped"].append(NORM),
    "a module that is not there": module("nope.nope", bits=4),
    "a norm as a module": module("norm"),
    "codes as a module": module("down"),
    "another mode": module("up", bits=4, group_size=16, mode="nf4"),
    "a group that its mode has not": module("up", bits=4, group_size=16, mode="mxfp4"),
    "bits of a float": module("up", bits=4.0),
    "a group that affine has not": module("up", group_size=16),
    "something else of a module": module("up", foo=[1]),
    "bits that are not those of the codes": lambda answer: answer.update(
        stated=STATED | {"bits": 8}
    ),
    "a mode that codes of these bits have not": lambda answer: answer.update(
        stated=STATED | {"mode": "nvfp4"}, quantized={"down": STATED | {"mode": "nvfp4"}}
    ),
    "codes as affine": lambda answer: answer.update(
        stated=STATED | {"mode": "affine"}, quantized={"down": STATED | {"mode": "affine"}}
    ),
    "codes of which nothing is said": lambda answer: answer.update(quantized={}, stated=None),
    "something said of nothing": lambda answer: answer["quantized"].update(up=STATED),
}  # fmt: skip


@pytest.mark.parametrize("what", HOSTILE)
def test_what_is_no_trace_is_none(what: str) -> None:
    """So that it is asked for anew."""
    answer = copy.deepcopy(ANSWER)
    HOSTILE[what](answer)
    with pytest.raises(NotATrace):
        read(answer)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where something stands in an answer."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return [
        found
        for key, item in items
        for found in (
            (*path, key),
            *(places(item, (*path, key)) if isinstance(item, dict | list) else ()),
        )
    ]


WORDS = ["BF16", "U8", "F64", "BOOL", "each", "view", "negative", NORM, WEIGHT, "../x", "", "*"]
OTHERS = [0, -1, 1, 2, 64, 10**9, 2**70, 1e308, 256.0, None, True, [], {}, [0], [[]]]

NONSENSE = st.sampled_from(
    [
        *WORDS,
        *OTHERS,
        *ANSWER["tensors"],
        *ANSWER["programs"],
        *(step for steps in ANSWER["programs"] for step in steps),
    ]
)


@given(st.data())
def test_a_changed_answer_is_none_or_can_be_made(data: st.DataObject) -> None:
    """Whatever is put in whatever places: there is no third way."""
    answer = copy.deepcopy(ANSWER)
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from(places(answer)))
        holder: Any = answer
        for key in path[:-1]:
            holder = holder[key]
        if data.draw(st.booleans()):
            holder[path[-1]] = copy.deepcopy(data.draw(NONSENSE))
        elif isinstance(holder, list):
            holder.pop(path[-1])
        else:
            holder[f"{path[-1]}x"] = holder.pop(path[-1])
        if not places(answer):
            break
    try:
        trace = read(answer)
    except NotATrace:
        return

    assert isinstance(trace, Trace)
    make(trace)
