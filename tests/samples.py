"""One sample of every op, format and step: what the tests that enumerate them are fed.

A new op, format or step needs an entry here and, for what all of its kind must do, no test of
its own: `test_every_op`, `test_every_format` and `test_every_step` find it by themselves.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import pytest
from conftest import REPOSITORY
from family_builds import INT4_WEIGHTS
from numpy.typing import NDArray
from tiny import bf16, tiny_config

from carnice_build.calibration.beside import Beside, passed_specs, told
from carnice_build.calibration.every_expert import EveryExpert
from carnice_build.calibration.parts import Combine, CombineExperts, Cut, Join, Total
from carnice_build.calibration.passes import Embed, Forward, ForwardExperts
from carnice_build.calibration.tokens import LongestFirst, LongestOrder, Tokens
from carnice_build.dtypes import NUMPY_NAME, TensorSpec
from carnice_build.formats.autoround.ops import Merge, Nearest, packed_specs
from carnice_build.formats.autoround.tune import Advance, Tune
from carnice_build.formats.compressed_tensors.awq import Smooth
from carnice_build.formats.compressed_tensors.calibrated import InputScales as StaticScales
from carnice_build.formats.compressed_tensors.gptq_ops import GptqAdvance, GptqQuantize, Hessians
from carnice_build.formats.compressed_tensors.ops import (
    SUFFIXES,
    GroupQuantize,
    SmoothNorm,
    SmoothWeight,
)
from carnice_build.formats.compressed_tensors.storages.floats_ops import (
    FloatQuantize as StoredFloats,
)
from carnice_build.formats.compressed_tensors.storages.ints_ops import IntQuantize
from carnice_build.formats.compressed_tensors.storages.mx_ops import MxQuantize as StoredMx
from carnice_build.formats.compressed_tensors.storages.nvfp4_ops import (
    GlobalQuantize,
    InverseScale,
)
from carnice_build.formats.compressed_tensors.storages.row_floats_ops import RowQuantize
from carnice_build.formats.elementwise import Elementwise
from carnice_build.formats.gguf.imatrix_ops import ColumnOrder, Importance
from carnice_build.formats.gguf.ops import PackMxfp4, Values
from carnice_build.formats.gguf.quantize_ops import (
    GgmlQuantize,
    GgmlQuantizeWeighted,
    Quantize,
    QuantizeWeighted,
)
from carnice_build.formats.kv_cache import CacheScales
from carnice_build.formats.mlx.ops import (
    AffineQuantize,
    FloatQuantize,
    ReferenceAffineQuantize,
    ReferenceFloatQuantize,
    Transform,
    TransformFloatQuantize,
    TransformQuantize,
)
from carnice_build.formats.nvfp4.fp8_ops import Fp8InputScales, MxQuantize, TensorQuantize
from carnice_build.formats.nvfp4.ops import BlockQuantize, InputScales, TakeTurns, TurnsQuantize
from carnice_build.graph import Op, Stacked, TensorData
from carnice_build.models import architecture_of
from carnice_build.models.base import Part, Role
from carnice_build.tensors import STACK

Inputs = Callable[[], Sequence[TensorData]]

# --- ops -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OpSample:
    """An op with parameters and small inputs that it can work on.

    `outside_key` names the fields of the op itself, which no key covers because they change no
    byte.  `bounded` says that a process op takes the same memory whatever the size of its inputs.
    """

    op: Op
    params: Mapping[str, Any]
    inputs: Inputs
    outside_key: frozenset[str] = frozenset()
    bounded: bool = False

    @property
    def specs(self) -> list[TensorSpec]:
        """Types and shapes of the inputs."""
        return [TensorSpec(item.dtype, item.array.shape) for item in self.inputs()]


def drawn(*specs: tuple[str, tuple[int, ...]], around: float = 0.0) -> Inputs:
    """Random floats of these types and shapes, the same ones at every call."""

    def draw() -> list[TensorData]:
        random = np.random.default_rng(0)
        return [
            data(dtype, random.normal(around, 0.05, shape).astype(np.float32))
            for dtype, shape in specs
        ]

    return draw


def data(dtype: str, values: NDArray[Any]) -> TensorData:
    """Float values as a tensor of `dtype`."""
    if dtype == "BF16":
        return TensorData(dtype, np.frombuffer(bf16(values), "<u2").reshape(values.shape).copy())
    return TensorData(dtype, values.astype(NUMPY_NAME[dtype]))


def _scaled(*weight: int, axis: int | None = None) -> Inputs:
    """A weight in BF16, and a positive scale for each index along `axis`."""

    def draw() -> list[TensorData]:
        (tensor,) = drawn(("BF16", weight))()
        if axis is None:
            return [tensor]
        return [tensor, data("F64", np.linspace(0.5, 2, weight[axis]))]

    return draw


def _merged() -> list[TensorData]:
    """A weight near its base, and the base on its grid."""
    (base,) = drawn(("BF16", (16, 128)))()
    changed = base.array.copy()
    changed[::2] ^= 1
    grid = [
        TensorData(spec.dtype, np.empty(spec.shape, NUMPY_NAME[spec.dtype]))
        for spec in packed_specs(TensorSpec("BF16", (16, 128)), 64)
    ]
    Nearest().apply({"group_size": 64}, [base], grid)
    return [TensorData("BF16", changed), base, *grid]


SAMPLES, LENGTH = 2, 8
_TOKENS = np.array([[3, 4, 5, -1, -1, -1, -1, -1], [6, 7, 8, 9, 3, 4, 5, -1]], np.int32)


def _tokens() -> TensorData:
    return TensorData("I32", _TOKENS.copy())


def _counts(dtype: str, shape: tuple[int, ...]) -> list[TensorData]:
    """Whole numbers, each another one."""
    values = np.arange(np.prod(shape), dtype=NUMPY_NAME[dtype])
    return [TensorData(dtype, values.reshape(shape))]


def _magnitudes(parts: int) -> list[TensorData]:
    """The largest inputs of five linears, over each of some parts."""
    return [data("F32", np.abs(item.array)) for item in drawn(*[("F32", (5,))] * parts)()]


def _squares() -> list[TensorData]:
    """Sums of squares for three experts, the second of which was given nothing, and counts."""
    (sums,) = drawn(("F32", (3, 8)))()
    counts = np.array([5, 0, 7], np.float32)
    return [data("F32", np.abs(sums.array) * counts[:, None]), data("F32", counts)]


def _ranges() -> TensorData:
    """The least and the largest keys and values of three samples."""
    (found,) = drawn(("F32", (3, 4)))()
    return data("F32", np.abs(found.array) * np.array([-1, 1, -1, 1], np.float32))


def _file(content: str) -> TensorData:
    return TensorData("U8", np.frombuffer(content.encode(), np.uint8).copy())


def _text() -> list[TensorData]:
    """A tokenizer and a dataset, as files."""
    tokenizer = (REPOSITORY / "demo" / "qwen3.6-27b" / "tokenizer.json").read_text()
    rows = [json.dumps({"text": text}) for text in ("One row of text.", "And a second row.")]
    return [_file(tokenizer), _file("\n".join(rows))]


@dataclass(frozen=True)
class _Layer:
    """Layer 3 of the tiny model, which has full attention: parameters, and inputs of its passes."""

    params: Mapping[str, Any]
    linears: Sequence[str]
    hidden: int
    weights: Sequence[tuple[str, tuple[int, ...]]]

    def inputs(self, states: int) -> Inputs:
        """Tokens, `states` equal tensors of hidden states, and the layer's tensors."""

        def draw() -> list[TensorData]:
            hidden = drawn(("BF16", (SAMPLES, LENGTH, self.hidden)))()
            return [_tokens(), *hidden * states, *drawn(*self.weights)()]

        return draw

    def packed(self, linears: Sequence[str]) -> list[TensorData]:
        """The linears rounded to nearest, three tensors each."""
        named = dict(zip(self.params["names"], drawn(*self.weights)(), strict=True))
        made: list[TensorData] = []
        for linear in linears:
            weight = named[f"{linear}.weight"]
            specs = packed_specs(TensorSpec(weight.dtype, weight.array.shape), 64)
            outputs = [TensorData(s.dtype, np.empty(s.shape, NUMPY_NAME[s.dtype])) for s in specs]
            Nearest().apply({"group_size": 64}, [weight], outputs)
            made += outputs
        return made


@cache
def _layer() -> _Layer:
    config = tiny_config(layers=4)
    architecture = architecture_of(config, "tiny")
    prefix = architecture.layer_prefix(3)
    facts = [
        fact
        for fact in architecture.tensors.values()
        if fact.part is Part.LAYERS and fact.layer == 3
    ]
    text = config["text_config"]
    params = {
        "names": [fact.name.removeprefix(prefix) for fact in facts],
        "layer": 3,
        "config": text,
        "dtype": "bfloat16",
        "attention": "eager",
        "threads": 1,
        "device": "cpu",
        "processor": "x86_64 avx2",
    }
    linears = [fact.module.removeprefix(prefix) for fact in facts if fact.role is Role.LINEAR]
    weights = [("BF16", fact.shape) for fact in facts]
    return _Layer(params, linears, text["hidden_size"], weights)


@cache
def _experts_layer() -> _Layer:
    """The only layer of a tiny Qwen3-MoE, whose experts are stacks."""
    hidden, width, experts = 128, 64, 3
    attention = {
        f"self_attn.{name}_proj": (rows, columns)
        for name, rows, columns in (
            ("q", 64, hidden),
            ("k", 32, hidden),
            ("v", 32, hidden),
            ("o", hidden, 64),
        )
    }
    stacks = {
        f"mlp.experts.*.{name}_proj": (experts, *shape)
        for name, shape in (
            ("gate", (width, hidden)),
            ("up", (width, hidden)),
            ("down", (hidden, width)),
        )
    }
    norms = {f"self_attn.{name}_norm": (32,) for name in "qk"}
    norms |= {f"{name}_layernorm": (hidden,) for name in ("input", "post_attention")}
    modules = {**attention, **stacks, "mlp.gate": (experts, hidden), **norms}
    config = {
        "model_type": "qwen3_moe",
        "hidden_size": hidden,
        "moe_intermediate_size": width,
        "num_experts": experts,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "vocab_size": 16,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }
    params = {
        **_layer().params,
        "names": [f"{name}.weight" for name in modules],
        "layer": 0,
        "config": config,
    }
    weights = [("BF16", shape) for shape in modules.values()]
    return _Layer(params, [*attention, *stacks], hidden, weights)


_GEMMA = {
    "model_type": "gemma4_text",
    "vocab_size": 16,
    "vocab_size_per_layer_input": 16,
    "hidden_size": 64,
    "hidden_size_per_layer_input": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_kv_shared_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "global_head_dim": 32,
    "layer_types": ["full_attention"] * 2,
    "pad_token_id": 0,
}


@cache
def _passing_layer(number: int) -> _Layer:
    """One of two layers, the second of which has no keys and values of its own."""
    architecture = architecture_of(_GEMMA, "gemma")
    prefix = architecture.layer_prefix(number)
    facts = [fact for fact in architecture.tensors.values() if fact.layer == number]
    given, made = list(map(told, architecture.passed(number))), list(map(told, _SHARED))
    params = {
        **_layer().params,
        "names": [fact.name.removeprefix(prefix) for fact in facts],
        "layer": number,
        "config": _GEMMA,
        "given": given,
        **({} if number else {"made": made}),
    }
    specs = passed_specs("bfloat16", TensorSpec("I32", (SAMPLES, LENGTH)), given)
    weights = [("BF16", fact.shape) for fact in facts]
    linears = [fact.module.removeprefix(prefix) for fact in facts if fact.role is Role.LINEAR]
    return _Layer(params, linears, 64, [*weights, *((spec.dtype, spec.shape) for spec in specs)])


def _shared_outputs() -> range:
    """The numbers of what the first of them makes for the second, keys and values."""
    params = {**_passing_layer(0).params, "linears": list(_passing_layer(0).linears)}
    inputs = _passing_layer(0).inputs(1)()
    specs = [TensorSpec(item.dtype, item.array.shape) for item in inputs]
    count = len(Forward().infer(params, specs))
    return range(count - 2, count)


_SHARED = [item for item in architecture_of(_GEMMA, "gemma").passed(1) if item.key]
_OUTSIDE = [
    fact
    for fact in architecture_of(_GEMMA, "gemma").tensors.values()
    if fact.part in (Part.EMBED, Part.BODY)
]

_AFFINE = {"bits": 4, "group_size": 64, "dtype": "BF16", "nonfinite": "refuse"}
_FLOATS = {"mode": "nvfp4", "dtype": "BF16", "nonfinite": "refuse"}
_PLUS_ONE = {"add": 1.0, "dtype": "BF16", "nonfinite": "refuse"}
_GROUPED = {"observer": "mse", "group_size": 64}
_INTEGERS = {
    "observer": "memoryless_minmax",
    "group_size": 32,
    "columns": False,
    "rows": False,
}
_TUNED = ["self_attn.o_proj", "mlp.down_proj"]
_TUNING = {
    "group_size": 64,
    "amp": True,
    "iters": 2,
    "lr": None,
    "minmax_lr": None,
    "enable_minmax_tuning": True,
    "batch_size": 1,
    "gradient_accumulate_steps": 1,
    "not_use_best_mse": False,
    "seed": 42,
}
_ARITHMETIC = ("dtype", "attention", "threads", "device", "processor")
_SEARCH = {
    "scheme": {"num_bits": 4, "group_size": 64, "symmetric": False},
    "n_grid": 4,
    "duo_scaling": True,
    "norms": "library",
}
_HESSIANS = {"hands_on": False, "norms": "library"}
_GPTQ = {
    "num_bits": 4,
    "symmetric": False,
    "strategy": "group",
    "group_size": 64,
    "observer": "mse",
    "block_size": 32,
    "dampening_frac": 0.01,
    "actorder": "weight",
    **{name: _layer().params[name] for name in ("threads", "device", "processor")},
}


def _with_hessian(*weight: int, each: bool = False) -> Inputs:
    """A weight and the Hessian of some inputs, or a stack and one for all or for each."""

    def draw() -> list[TensorData]:
        tensor, inputs = drawn(("BF16", weight), ("F32", (*weight[:-2], 200, weight[-1])))()
        given = inputs.array if each or len(weight) == 2 else inputs.array[0]
        return [tensor, data("F32", given.swapaxes(-1, -2) @ given)]

    return draw


def _packed_layer(linear: str) -> tuple[Mapping[str, Any], Inputs]:
    """`_layer` with a linear of integers: parameters of a pass, and inputs."""
    layer, index = _layer(), _layer().params["names"].index(f"{linear}.weight")
    names = list(layer.params["names"])
    names[index : index + 1] = [f"{linear}.{suffix}" for suffix in SUFFIXES]

    def draw() -> list[TensorData]:
        found = layer.inputs(1)()
        weight = found[2 + index]
        params = {**_GROUPED, "columns": False, "rows": False}
        specs = GroupQuantize().infer(params, [TensorSpec(weight.dtype, weight.array.shape)])
        parts = [TensorData(s.dtype, np.empty(s.shape, NUMPY_NAME[s.dtype])) for s in specs]
        GroupQuantize().apply(params, [weight], parts)
        return [*found[: 2 + index], *parts, *found[3 + index :]]

    scheme = {name: _GPTQ[name] for name in ("num_bits", "symmetric", "strategy", "group_size")}
    own = {"names": names, "schemes": {linear: scheme}, "norms": "exact"}
    return {**layer.params, **own}, draw


_PASSING = ("names", "layer", "config", "threads", "processor")
_WORKSPACE = frozenset({"workspace", "transient"})
_FORWARD = frozenset({*_WORKSPACE, "first"})
# What is `shared` stands in the name, and what is row-wise follows from it.
_STACKED = frozenset({"op", "name", "version", "libraries", "figures", "shared", "rowwise"})

_TURNED = {
    "steps": [["transpose", [0], [0, 2, 1]], ["add_number", [1], 1.0]],
    "dtype": "BF16",
    "nonfinite": "refuse",
}

OPS: Sequence[OpSample] = [
    OpSample(AffineQuantize(), _AFFINE, drawn(("BF16", (9, 128)))),
    OpSample(
        AffineQuantize(),
        {"bits": 3, "group_size": 32, "dtype": "F16", "nonfinite": "zero"},
        drawn(("F32", (9, 64))),
    ),
    OpSample(ReferenceAffineQuantize(), _AFFINE, drawn(("BF16", (9, 128)))),
    OpSample(Transform(), _TURNED, drawn(("BF16", (3, 128, 4)))),
    OpSample(
        Transform(), {**_TURNED, "dtype": "F32", "nonfinite": "zero"}, drawn(("BF16", (2, 32, 4)))
    ),
    OpSample(TransformQuantize(), {**_AFFINE, **_TURNED}, drawn(("BF16", (3, 128, 4)))),
    OpSample(FloatQuantize(), _FLOATS, drawn(("BF16", (9, 128)))),
    OpSample(
        FloatQuantize(),
        {"mode": "mxfp8", "dtype": "F16", "nonfinite": "zero"},
        drawn(("F32", (9, 64))),
    ),
    OpSample(ReferenceFloatQuantize(), _FLOATS, drawn(("BF16", (9, 128)))),
    OpSample(TransformFloatQuantize(), {**_FLOATS, **_TURNED}, drawn(("BF16", (3, 128, 4)))),
    OpSample(Elementwise(), _PLUS_ONE, drawn(("BF16", (9,)))),
    OpSample(
        Elementwise(), {**_PLUS_ONE, "add": None, "nonfinite": "zero"}, drawn(("F32", (9, 4)))
    ),
    OpSample(Quantize(), {"type": "Q4_K"}, drawn(("BF16", (9, 256)))),
    OpSample(GgmlQuantize(), {"type": "Q5_0"}, drawn(("BF16", (9, 64)))),
    *(
        OpSample(
            op,
            {"type": "Q4_K"},
            drawn(("BF16", (*outer, 9, 256)), ("F32", (*outer, 256)), around=1),
            _STACKED if outer else frozenset(),
        )
        for op, outer in (
            (QuantizeWeighted(), ()),
            (Stacked(QuantizeWeighted()), (2,)),
            (GgmlQuantizeWeighted(), ()),
            (Stacked(GgmlQuantizeWeighted()), (2,)),
        )
    ),
    OpSample(Values(), {"how": "add_one"}, drawn(("BF16", (9,)))),
    OpSample(Values(), {"how": "negative_exp"}, drawn(("F16", (9,)))),
    OpSample(Values(), {"how": "softplus"}, drawn(("F32", (9,)))),
    OpSample(PackMxfp4(), {}, drawn(("U8", (5, 2, 16)), ("U8", (5, 2)))),
    OpSample(BlockQuantize(), {}, drawn(("BF16", (9, 32)), ("BF16", (4, 32)))),
    OpSample(RowQuantize(), {}, drawn(("BF16", (9, 128)))),
    OpSample(Stacked(RowQuantize()), {}, drawn(("BF16", (9, 4, 128))), _STACKED),
    OpSample(
        Stacked(BlockQuantize()), {}, drawn(("BF16", (9, 4, 32)), ("BF16", (9, 2, 32))), _STACKED
    ),
    OpSample(TurnsQuantize(), {}, drawn(*[("BF16", (3, 9, 32))] * 2), bounded=True),
    OpSample(TakeTurns(), {}, drawn(("BF16", (3, 9)), ("BF16", (3, 9)))),
    OpSample(
        InputScales(),
        {"groups": [[0, 2], [1]], "shapes": [[], [2]]},
        drawn(("F32", (3,)), around=5),
    ),
    OpSample(
        Fp8InputScales(),
        {"groups": [[0, 2], [1]], "shapes": [[], [2]]},
        drawn(("F32", (3,)), around=5),
    ),
    OpSample(TensorQuantize(), {}, drawn(("BF16", (9, 32)), ("BF16", (4, 40)))),
    OpSample(MxQuantize(), {}, drawn(("BF16", (9, 64)))),
    OpSample(
        Stacked(TensorQuantize()), {}, drawn(("BF16", (9, 4, 32)), ("BF16", (9, 2, 32))), _STACKED
    ),
    OpSample(Stacked(MxQuantize()), {}, drawn(("BF16", (9, 4, 64))), _STACKED),
    OpSample(Nearest(), {"group_size": 64}, drawn(("BF16", (24, 128)))),
    OpSample(Merge(), {"group_size": 64, "rounding": "delta"}, _merged),
    OpSample(Merge(), {"group_size": 64, "rounding": "nearest"}, _merged),
    OpSample(SmoothNorm(), {"exact": False}, _scaled(128, axis=0)),
    OpSample(SmoothNorm(), {"exact": True}, _scaled(128)),
    OpSample(
        GroupQuantize(), {**_GROUPED, "columns": True, "rows": False}, _scaled(9, 128, axis=1)
    ),
    OpSample(
        GroupQuantize(),
        {"observer": "memoryless_minmax", "group_size": 32, "columns": False, "rows": False},
        drawn(("F32", (9, 64))),
    ),
    *(
        OpSample(GroupQuantize(), {**_INTEGERS, **params}, drawn(("BF16", (9, 128))))
        for params in (
            {"symmetric": True},
            {"symmetric": True, "bits": 8, "group_size": None},
            {"bits": 3},
        )
    ),
    OpSample(
        IntQuantize(),
        {"bits": 8, "group_size": None, "symmetric": True},
        drawn(("BF16", (9, 60))),
    ),
    OpSample(
        IntQuantize(),
        {"bits": 4, "group_size": 32, "symmetric": False},
        drawn(("F16", (9, 64))),
    ),
    OpSample(StoredFloats(), {"block": None}, drawn(("BF16", (9, 60)))),
    OpSample(StoredFloats(), {"block": [4, 32]}, drawn(("BF16", (9, 60)))),
    OpSample(GlobalQuantize(), {}, drawn(("BF16", (9, 32)), ("BF16", (4, 32)))),
    OpSample(InverseScale(), {}, drawn(("F32", ()), around=5)),
    *(
        OpSample(
            StaticScales(),
            {"indices": [0, [2, 1]], "bits": bits, "dtype": "BF16"},
            drawn(("F32", (3,)), around=5),
        )
        for bits in (4, 8)
    ),
    OpSample(
        Stacked(GlobalQuantize()), {}, drawn(("BF16", (9, 4, 32)), ("BF16", (9, 2, 32))), _STACKED
    ),
    OpSample(Stacked(StoredFloats()), {"block": None}, drawn(("BF16", (9, 4, 32))), _STACKED),
    *(OpSample(StoredMx(), {"bits": bits}, drawn(("BF16", (9, 64)))) for bits in (4, 8)),
    OpSample(SmoothWeight(), {"columns": False, "rows": True}, _scaled(9, 128, axis=0)),
    OpSample(
        Tokens(),
        {
            "samples": SAMPLES,
            "length": LENGTH,
            "joined": False,
            "roles": {"human": "user"},
            "template": "{{ messages }}",
            "special_tokens": {"eos_token": "<eos>"},
            "rows": "jsonl",
        },
        _text,
        bounded=True,
    ),
    OpSample(LongestFirst(), {"processor": "x86_64 avx2"}, lambda: [_tokens()]),
    OpSample(LongestOrder(), {"processor": "x86_64 avx2"}, lambda: [_tokens()]),
    OpSample(Join(), {}, lambda: [_ranges(), _ranges()]),
    *(
        OpSample(
            CacheScales(),
            {"observer": observer, "dtype": "BF16", "shape": [1]},
            lambda: [_ranges()],
        )
        for observer in ("minmax", "static_minmax")
    ),
    OpSample(Importance(), {"calls": None}, _squares),
    OpSample(Importance(), {"calls": 3}, lambda: _squares()[:1]),
    OpSample(ColumnOrder(), {"split": [2, 3, 4], "order": [1, 0, 2]}, drawn(("F32", (3, 24)))),
    OpSample(Cut(), {"sizes": [2, 1]}, lambda: _counts("I32", (3, LENGTH))),
    OpSample(Combine(), {}, lambda: _magnitudes(3)),
    OpSample(Total(), {}, lambda: _magnitudes(3)),
    OpSample(
        CombineExperts(),
        {},
        lambda: [item for amax in _magnitudes(2) for item in (amax, *_counts("I64", (4,)))],
    ),
    OpSample(
        Embed(),
        {"dtype": "F32"},
        lambda: [_tokens(), *drawn(("BF16", (16, 32)))()],
    ),
    OpSample(
        Forward(workspace=1 << 20),
        {**_layer().params, "linears": list(_layer().linears)},
        _layer().inputs(1),
        _FORWARD,
    ),
    OpSample(
        ForwardExperts(workspace=1 << 20),
        {**_experts_layer().params, "linears": list(_experts_layer().linears)},
        _experts_layer().inputs(1),
        _FORWARD,
    ),
    OpSample(
        EveryExpert(workspace=1 << 20),
        {
            **_experts_layer().params,
            "linears": [name for name in _experts_layer().linears if STACK in name],
        },
        _experts_layer().inputs(1),
        frozenset({"workspace", "first"}),
    ),
    OpSample(
        Forward(workspace=1 << 20),
        {**_layer().params, "linears": list(_layer().linears), "caches": True},
        _layer().inputs(1),
        _FORWARD,
    ),
    *(
        OpSample(
            Forward(
                workspace=1 << 20, transient=frozenset({0} if number else {0, *_shared_outputs()})
            ),
            {**_passing_layer(number).params, "linears": list(_passing_layer(number).linears)},
            _passing_layer(number).inputs(1),
            _FORWARD,
        )
        for number in range(2)
    ),
    OpSample(
        Beside(frozenset({0, 1})),
        {
            **{name: _layer().params[name] for name in _ARITHMETIC},
            "names": [fact.name for fact in _OUTSIDE],
            "tables": [fact.name for fact in _OUTSIDE if fact.role is Role.EMBEDDING],
            "linears": [fact.module for fact in _OUTSIDE if fact.role is Role.LINEAR],
            "given": [[number, _passing_layer(number).params["given"][0]] for number in range(2)],
            "config": _GEMMA,
        },
        lambda: [_tokens(), *drawn(*(("BF16", fact.shape) for fact in _OUTSIDE))()],
        frozenset({"transient", "first"}),
    ),
    OpSample(
        Smooth(workspace=1 << 20, transient=frozenset({0, 2, 3})),
        {
            **_passing_layer(0).params,
            "mappings": [["mlp.up_proj", ["mlp.down_proj"]]],
            "quantized": ["mlp.up_proj", "mlp.down_proj"],
            **_SEARCH,
        },
        _passing_layer(0).inputs(1),
        _WORKSPACE,
    ),
    OpSample(
        Smooth(workspace=1 << 20),
        {
            **_experts_layer().params,
            "mappings": [["mlp.experts.*.up_proj", ["mlp.experts.*.down_proj"]]],
            "quantized": ["mlp.experts.*.up_proj", "mlp.experts.*.down_proj"],
            **_SEARCH,
        },
        _experts_layer().inputs(1),
        _WORKSPACE,
    ),
    OpSample(
        Smooth(workspace=1 << 20),
        {
            **_layer().params,
            "mappings": [["mlp.up_proj", ["mlp.down_proj"]]],
            "quantized": ["mlp.up_proj", "mlp.down_proj"],
            **_SEARCH,
        },
        _layer().inputs(1),
        _WORKSPACE,
    ),
    OpSample(
        Hessians(workspace=1 << 20, transient=frozenset({0, 1})),
        {
            **_layer().params,
            "groups": [[["mlp.gate_proj", "mlp.up_proj"], False], [["mlp.down_proj"], False]],
            **_HESSIANS,
        },
        _layer().inputs(1),
        _WORKSPACE,
    ),
    OpSample(
        Hessians(workspace=1 << 20),
        {
            **_experts_layer().params,
            "groups": [
                [["mlp.experts.*.gate_proj", "mlp.experts.*.up_proj"], False],
                [["mlp.experts.*.down_proj"], True],
            ],
            **_HESSIANS,
        },
        _experts_layer().inputs(1),
        _WORKSPACE,
    ),
    *(
        OpSample(
            Hessians(workspace=1 << 20, transient=frozenset({0} if hands_on else ())),
            {
                **_passing_layer(number).params,
                "groups": [[["mlp.down_proj"], False]],
                "hands_on": hands_on,
                "norms": "exact",
            },
            _passing_layer(number).inputs(1),
            _WORKSPACE,
        )
        for number in range(2)
        for hands_on in (True, False)
    ),
    OpSample(GptqQuantize(), _GPTQ, _with_hessian(16, 128), frozenset({"transient"})),
    OpSample(
        GptqQuantize(frozenset({4})),
        {**_GPTQ, "symmetric": True, "strategy": "channel", "group_size": None, "num_bits": 8},
        _with_hessian(3, 16, 64, each=True),
        frozenset({"transient"}),
        bounded=True,
    ),
    # One expert after the other takes the same memory, however many there are.
    OpSample(
        GptqQuantize(),
        {**_GPTQ, "actorder": None},
        _with_hessian(3, 16, 128),
        frozenset({"transient"}),
        bounded=True,
    ),
    OpSample(
        GptqAdvance(workspace=1 << 20),
        *_packed_layer("mlp.up_proj"),
        _WORKSPACE,
    ),
    OpSample(
        Tune(),
        {
            **{name: _layer().params[name] for name in _PASSING},
            "linears": _TUNED,
            "settings": _TUNING,
        },
        _layer().inputs(2),
    ),
    OpSample(
        Advance(),
        {
            **{name: _layer().params[name] for name in _PASSING},
            "linears": _TUNED,
            "batch_size": 1,
            "amp": True,
        },
        lambda: [*_layer().inputs(2)(), *_layer().packed(_TUNED)],
    ),
]
"""Every op at least once, and once more for each way of its own through the code."""


def identifiers(samples: Sequence[OpSample]) -> list[str]:
    """Names of tests: the op's, and a number where it has several samples."""
    names = [sample.op.name for sample in samples]
    return [
        f"{name}-{names[:index].count(name)}" if names.count(name) > 1 else name
        for index, name in enumerate(names)
    ]


def each(samples: Sequence[OpSample]) -> Callable[[Any], Any]:
    """Run a test for each of the samples."""
    return pytest.mark.parametrize("sample", samples, ids=identifiers(samples))


# --- formats -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FormatSample:
    """A format as a recipe asks for it.

    `quantize` is the section, but for `format`; the model is the demo's base, cut to two layers,
    with its vision tower and MTP head, and the recipe has a calibration for formats that need one.
    `change` sets another value of one knob, for `--set`; None when no knob changes what an action
    does.  `blamed` says that it alone decides a parameter of the actions that then run.
    `excluded` leads to what config.json lists as not quantized; empty when it lists no such thing.
    """

    quantize: Mapping[str, Any] = field(default_factory=dict)
    change: str | None = None
    blamed: bool = True
    excluded: tuple[str, ...] = ()


FORMATS: Mapping[str, FormatSample] = {
    "mlx": FormatSample({"bits": 4}, change="quantize.bits=5"),
    "nvfp4": FormatSample(
        # Which linears share a scale follows from `defaults` and `keep` together.
        change='quantize.keep="*.layers.1.mlp.*"',
        blamed=False,
        excluded=("quantization_config", "ignore"),
    ),
    "autoround": FormatSample(
        {"method": "nearest"},
        change="quantize.group_size=64",
        excluded=("quantization_config", "extra_config"),
    ),
    "compressed-tensors": FormatSample(
        {
            "targets": ["Linear"],
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": INT4_WEIGHTS}},
            "algorithm": "awq",
            "ignore": ["lm_head", "re:model.visual.*", "re:mtp.*", "re:.*linear_attn.*"],
            "awq": {"n_grid": 4},
        },
        change="quantize.config_groups.group_0.weights.observer=mse",
        excluded=("quantization_config", "ignore"),
    ),
    "gguf": FormatSample({"mix": "Q4_0"}, change="quantize.mix=Q5_0"),
}


# --- steps ---------------------------------------------------------------------------------------

STEPS: Mapping[str, Sequence[Mapping[str, Any]]] = {
    "decode": [{"decode": {"match": "*.down_proj.weight", "dtype": "bfloat16", "expect": 9}}],
    "rename": [
        {"rename": {"from": "^lm_head", "to": "head", "expect": 1}},
        {"rename": {"from": "^head", "to": "lm_head", "optional": True}},
    ],
    "drop": [{"drop": {"match": ["model.visual.*"], "optional": False}}],
    "graft": [{"graft": {"from": "base", "match": "mtp.*", "replace": True, "expect": 15}}],
    "chat_template": [{"chat_template": {"patch": "hermes"}}],
}
"""The `steps` of a recipe that uses a step, of whose sources `base` alone has an MTP head; that of
`decode` has a quantized body."""
