"""The ops of compressed-tensors' storages against `model_free_ptq`: names, types, shapes, bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from int4_weights import Array, from_torch, ordinary, to_torch
from llmcompressor.entrypoints.model_free.converter import ModelFreePtqConverter
from storage_samples import content, integers, preset

from carnice_build.dtypes import NUMPY_NAME, TensorSpec
from carnice_build.errors import PlanError
from carnice_build.formats.compressed_tensors import ops as packed
from carnice_build.formats.compressed_tensors.storages import (
    floats_ops,
    ints_ops,
    mx_ops,
    nvfp4_ops,
)
from carnice_build.graph import ArrayOp, BadInput, TensorData
from carnice_build.kernels import global_nvfp4, nvfp4

SAFETENSORS = {
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int32: "I32",
    torch.int64: "I64",
}

Described = dict[str, tuple[str, list[int], bytes]]


def library(scheme: QuantizationScheme, weights: Mapping[str, Array], dtype: str) -> Described:
    """The tensors that `model_free_ptq` makes of weights, by their names, but for activations'."""
    config = QuantizationConfig(config_groups={"group_0": scheme})
    tensors = {name: to_torch(weight, dtype) for name, weight in weights.items()}
    made = ModelFreePtqConverter(config).process(tensors)
    return {
        name: (SAFETENSORS[tensor.dtype], list(tensor.shape), content(tensor))
        for name, tensor in made.items()
        if ".input_" not in name
    }


def ours(
    op: ArrayOp, params: Mapping[str, Any], weights: Sequence[Array], dtype: str
) -> list[tuple[str, list[int], bytes]]:
    """What an op makes of weights."""
    specs = op.infer(params, [TensorSpec(dtype, weight.shape) for weight in weights])
    outputs = [TensorData(s.dtype, np.empty(s.shape, NUMPY_NAME[s.dtype])) for s in specs]
    op.apply(params, [TensorData(dtype, weight) for weight in weights], outputs)
    return [
        (spec.dtype, list(spec.shape), item.array.tobytes())
        for spec, item in zip(specs, outputs, strict=True)
    ]


PLAIN = {"observer": "memoryless_minmax", "columns": False, "rows": False}
SYMMETRIC = tuple(name for name in packed.SUFFIXES if name != "weight_zero_point")
INTEGERS = ints_ops.SUFFIXES

CASES: Mapping[str, tuple[QuantizationScheme, ArrayOp, Mapping[str, Any], Sequence[str]]] = {
    "FP8": (preset("FP8"), floats_ops.FloatQuantize(), {"block": None}, floats_ops.SUFFIXES),
    "FP8_BLOCK": (
        preset("FP8_BLOCK"),
        floats_ops.FloatQuantize(),
        {"block": [128, 128]},
        floats_ops.SUFFIXES,
    ),
    "W8A8": (
        preset("W8A8"),
        ints_ops.IntQuantize(),
        {"bits": 8, "group_size": None, "symmetric": True},
        INTEGERS[:2],
    ),
    "W4AFP8": (
        preset("W4AFP8"),
        ints_ops.IntQuantize(),
        {"bits": 4, "group_size": 128, "symmetric": True},
        INTEGERS[:2],
    ),
    "int-quantized, asymmetric": (
        integers(8, None, False, "int-quantized"),
        ints_ops.IntQuantize(),
        {"bits": 8, "group_size": None, "symmetric": False},
        INTEGERS,
    ),
    **{
        f"W{bits}A16": (
            preset(f"W{bits}A16"),
            packed.GroupQuantize(),
            {**PLAIN, "group_size": 128, "symmetric": True, "bits": bits},
            SYMMETRIC,
        )
        for bits in range(2, 9)
    },
    "W4A16_ASYM": (
        preset("W4A16_ASYM"),
        packed.GroupQuantize(),
        {**PLAIN, "group_size": 128},
        packed.SUFFIXES,
    ),
    "symmetric channels": (
        integers(4, None, True, "pack-quantized"),
        packed.GroupQuantize(),
        {**PLAIN, "group_size": None, "symmetric": True},
        SYMMETRIC,
    ),
    "asymmetric channels": (
        integers(8, None, False, "pack-quantized"),
        packed.GroupQuantize(),
        {**PLAIN, "group_size": None, "bits": 8},
        packed.SUFFIXES,
    ),
    **{
        f"MXFP{bits}": (
            preset(f"MXFP{bits}"),
            mx_ops.MxQuantize(),
            {"bits": bits},
            mx_ops.SUFFIXES[bits],
        )
        for bits in (4, 8)
    },
}


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
@pytest.mark.parametrize("case", CASES)
def test_a_module_is_that_of_the_library(case: str, dtype: str) -> None:
    """Each tensor of a weight whose rows no word of zero points and no block divides."""
    scheme, op, params, suffixes = CASES[case]
    weight = ordinary(dtype, (131, 256))
    made = ours(op, params, [weight], dtype)

    assert library(scheme, {"model.o_proj.weight": weight}, dtype) == {
        f"model.o_proj.{suffix}": item for suffix, item in zip(suffixes, made, strict=True)
    }


@pytest.mark.parametrize("scheme", ["NVFP4A16", "NVFP4"])
@pytest.mark.parametrize(
    "fused", [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["mlp.down_proj"]]
)
def test_linears_that_share_a_global_scale_are_those_of_the_library(
    scheme: str, fused: list[str]
) -> None:
    """It is in each of the modules, whose weights are of several sizes and magnitudes."""
    modules = [f"model.layers.0.{name}" for name in fused]
    weights = [
        from_torch(to_torch(ordinary("BF16", (32 * (n + 1), 64), n), "BF16") * (n + 1))
        for n in range(len(modules))
    ]
    *made, shared = ours(nvfp4_ops.GlobalQuantize(), {}, weights, "BF16")
    expected = {
        f"{module}.{suffix}": item
        for number, module in enumerate(modules)
        for suffix, item in zip(
            nvfp4_ops.SUFFIXES, [*made[2 * number : 2 * number + 2], shared], strict=True
        )
    }
    named = {f"{name}.weight": item for name, item in zip(modules, weights, strict=True)}

    assert expected == library(preset(scheme), named, "BF16")


def test_parameters_of_older_builds_still_mean_asymmetric_groups_of_four_bits() -> None:
    """Keys of actions cover parameters: who names bits and symmetry finds no older action."""
    weight = ordinary("BF16", (16, 128))
    params = {**PLAIN, "group_size": 64}
    named = {**params, "bits": 4, "symmetric": False}
    op = packed.GroupQuantize()

    assert ours(op, params, [weight], "BF16") == ours(op, named, [weight], "BF16")


def test_the_inverse_of_modelopt_s_scale_means_the_same() -> None:
    """Codes and scales of modelopt under it are the same numbers but for rounding."""
    weight = ordinary("BF16", (32, 256))
    amax, _ = nvfp4.amax(weight, "BF16")
    scale_2 = nvfp4.weight_scale_2(amax)
    ((dtype, shape, scale),) = ours(nvfp4_ops.InverseScale(), {}, [np.array(scale_2)], "F32")
    codes, scales = np.empty((32, 128), np.uint8), np.empty((32, 16), np.uint8)
    nvfp4.quantize_rows(weight, "BF16", scale_2, codes, scales)
    theirs, made = np.empty((2, 32, 256), np.float32)
    nvfp4.dequantize_rows(codes, scales, scale_2, theirs)
    global_nvfp4.dequantize_rows(codes, scales, np.frombuffer(scale, np.float32)[0], made)

    assert ("F32", [1]) == (dtype, shape)
    assert np.allclose(theirs, made, rtol=2**-22, atol=0)


@pytest.mark.parametrize("scale", [0.0, -1.0, 1e-45])
def test_a_scale_without_an_inverse_is_refused(scale: float) -> None:
    """What modelopt never exports."""
    with pytest.raises(BadInput, match="is "):
        ours(nvfp4_ops.InverseScale(), {}, [np.array(scale, np.float32)], "F32")


def test_weights_that_f16_has_no_global_scale_for_are_refused() -> None:
    """The library takes 1 for 2688 / 0.03, which makes zeros of nearly all of them."""
    weight = np.full((2, 32), 0.03, np.float16)
    with pytest.raises(BadInput, match=r"no weight beyond 0\.03") as caught:
        ours(nvfp4_ops.GlobalQuantize(), {}, [weight * np.float16(0.5), weight], "F16")

    assert 1 == caught.value.operand


FOR_GROUPS = {**PLAIN, "group_size": 48}
REFUSED: Sequence[tuple[ArrayOp, Mapping[str, Any], Sequence[TensorSpec], str]] = [
    (
        packed.GroupQuantize(),
        FOR_GROUPS,
        [TensorSpec("BF16", (8, 64))],
        "group_size 48 does not divide the 64 inputs",
    ),
    (
        packed.GroupQuantize(),
        {**FOR_GROUPS, "observer": "mse", "group_size": None},
        [TensorSpec("BF16", (8, 64))],
        "the observer mse is for groups of 32, 64 or 128",
    ),
    (
        ints_ops.IntQuantize(),
        {"bits": 8, "group_size": 48, "symmetric": True},
        [TensorSpec("BF16", (8, 64))],
        "group_size 48 does not divide the 64 inputs",
    ),
    (
        mx_ops.MxQuantize(),
        {"bits": 4},
        [TensorSpec("BF16", (8, 48))],
        "blocks of 32 do not divide the 48 inputs",
    ),
    (
        nvfp4_ops.GlobalQuantize(),
        {},
        [TensorSpec("BF16", (8, 40))],
        "blocks of 16 do not divide the 40 inputs",
    ),
    (
        nvfp4_ops.GlobalQuantize(),
        {},
        [TensorSpec("BF16", (8, 64)), TensorSpec("F32", (8, 64))],
        "BF16 and F32 weights cannot share a scale",
    ),
    *(
        (op, params, [TensorSpec("I32", (8, 128))], "cannot quantize I32 weights")
        for _, op, params, _ in CASES.values()
    ),
]


@pytest.mark.parametrize(("op", "params", "specs", "sentence"), REFUSED)
def test_what_does_not_fit_is_refused_by_the_plan(
    op: ArrayOp, params: Mapping[str, Any], specs: Sequence[TensorSpec], sentence: str
) -> None:
    """Before a weight is read."""
    with pytest.raises(PlanError) as caught:
        op.infer(params, specs)

    assert sentence == caught.value.what
