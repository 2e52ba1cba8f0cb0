"""`carnice diff` says how two folders differ, whoever made them and in whatever format."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from itertools import combinations
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Finished, Project, TinyCheckpoint
from gguf_families import CONFIGS, write_checkpoint
from numpy.typing import NDArray
from tiny import (
    Tensor,
    bf16,
    read_all_tensors,
    read_json,
    read_safetensors,
    write_json,
    write_safetensors,
)

from carnice_build.commands.build import build_variants
from carnice_build.commands.diff import ModuleDiff, State, diff_folders
from carnice_build.commands.diff_side import open_side
from carnice_build.errors import StoreError

LINEARS = 8 * 3 + 6 * 5 + 2 * 4 + 2
"""Quantized modules of the tiny model: MLPs, delta nets, attention, embedding and head."""


@pytest.fixture
def built(project: Project) -> Project:
    """A project with two variants built."""
    build_variants(["mlx-4bit", "mlx-mixed_3_6"], project.options())
    return project


def modules(run: Finished) -> dict[str, dict[str, Any]]:
    """The modules of a diff as JSON."""
    assert run.code == 0, run.err

    found: dict[str, dict[str, Any]] = json.loads(run.out)["modules"]
    return found


def test_quantized_modules_differ_and_others_are_the_same(
    built: Project, carnice: Callable[..., Finished]
) -> None:
    """Bits and sizes are told for every module that another recipe quantizes otherwise."""
    found = modules(carnice("diff", "mlx-4bit", "mlx-mixed_3_6", "--json"))

    different = {name: item for name, item in found.items() if item["state"] == "differs"}
    assert len(different) == LINEARS
    head = different["lm_head"]
    assert (head["a"]["storage"], head["b"]["storage"]) == ("4-bit g64", "6-bit g64")
    assert head["a"]["size"] < head["b"]["size"]
    assert 0.05 < head["relative_difference"] < 0.15
    norm = found["model.language_model.norm"]
    assert (norm["state"], norm["relative_difference"]) == ("same", None)


def test_the_relative_difference_is_that_of_the_dequantized_weights(built: Project) -> None:
    """The figure equals one computed from mlx's own dequantization."""
    mx = pytest.importorskip("mlx.core")
    name = "language_model.model.layers.3.self_attn.o_proj"
    weights = []
    for variant, bits in (("mlx-4bit", 4), ("mlx-mixed_3_6", 3)):
        tensors = read_all_tensors(built.out / variant)
        packed, scales, biases = (
            mx.array(np.frombuffer(tensors[f"{name}.{part}"].data, kind)).reshape(
                tensors[f"{name}.{part}"].shape
            )
            for part, kind in (("weight", np.uint32), ("scales", np.uint16), ("biases", np.uint16))
        )
        wide = [grid.view(mx.bfloat16).astype(mx.float32) for grid in (scales, biases)]
        weights.append(np.asarray(mx.dequantize(packed, *wide, group_size=64, bits=bits)))
    expected = np.linalg.norm(weights[1] - weights[0]) / np.linalg.norm(weights[0])

    diff = diff_folders(built.out / "mlx-4bit", built.out / "mlx-mixed_3_6", jobs=2)

    (found,) = (item for item in diff.modules if item.module.endswith("layers.3.self_attn.o_proj"))
    assert found.relative == pytest.approx(expected, rel=1e-5)


def test_folders_without_build_json_are_hashed(built: Project) -> None:
    """What is the same and what is not does not depend on build.json."""
    folders = built.out / "mlx-4bit", built.out / "mlx-mixed_3_6"
    expected = [item.state for item in diff_folders(*folders, jobs=2, values=False).modules]
    for folder in folders:
        (folder / "build.json").unlink()

    found = diff_folders(*folders, jobs=2, values=False)

    assert expected == [item.state for item in found.modules]
    assert State.SAME in expected


def test_a_module_that_one_side_lacks_is_told(built: Project) -> None:
    """The head's shard taken away leaves a module that is only in the other folder."""
    index = json.loads((built.out / "mlx-4bit" / "model.safetensors.index.json").read_text())
    (built.out / "mlx-4bit" / index["weight_map"]["language_model.lm_head.weight"]).unlink()

    diff = diff_folders(built.out / "mlx-4bit", built.out / "mlx-mixed_3_6", jobs=2, values=False)

    assert [item.module for item in diff.modules if item.state is State.ONLY_B] == ["lm_head"]


def test_the_table_folds_modules_by_kind(
    built: Project, carnice: Callable[..., Finished], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line stands for all modules of a kind, or one for each with --all."""
    monkeypatch.setenv("COLUMNS", "200")

    folded = carnice("diff", "mlx-4bit", "mlx-mixed_3_6").out
    every = carnice("diff", "mlx-4bit", "mlx-mixed_3_6", "--all").out

    assert folded.count("mlp.down_proj") == 1
    assert every.count("mlp.down_proj") == 8


def test_a_folder_that_is_not_there_is_an_error(built: Project) -> None:
    """A name that is neither a variant nor a folder of shards ends in one sentence."""
    with pytest.raises(StoreError, match="holds no safetensors or GGUF file"):
        diff_folders(built.out / "mlx-4bit", built.out / "mlx-5bit", jobs=1)


# --- between formats -----------------------------------------------------------------------------

MODULE = "model.language_model.layers.3.self_attn.o_proj"
ROWS = COLUMNS = 128
GROUP = 32
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)

Array = NDArray[Any]
Packed = tuple[dict[str, Tensor], Array, dict[str, Any], str]
"""The tensors of MODULE, the numbers they stand for, the config's section, and what diff says."""


def words(nibbles: Array) -> bytes:
    """Eight nibbles of each word along the last axis, the first one lowest."""
    eights = nibbles.astype(np.uint32).reshape(*nibbles.shape[:-1], -1, 8)
    shifted: Array = (eights << np.arange(0, 32, 4, dtype=np.uint32)).sum(-1, dtype=np.uint32)
    return shifted.tobytes()


def draw(group: int) -> tuple[Array, Array]:
    """Nibbles [ROWS, COLUMNS], and scales [ROWS, groups] that every type holds."""
    random = np.random.default_rng(group)
    exponents = random.integers(-7, -4, (ROWS, COLUMNS // group))
    return random.integers(0, 16, (ROWS, COLUMNS)), np.exp2(exponents.astype(np.float32))


def autoround() -> Packed:
    """Codes along the inputs, all zero points 8, which is stored as 7."""
    codes, scales = draw(GROUP)
    groups = COLUMNS // GROUP
    lines = np.frombuffer(words(codes), np.uint32).reshape(ROWS, -1)
    tensors = {
        "qweight": Tensor("I32", (COLUMNS // 8, ROWS), lines.T.tobytes()),
        "qzeros": Tensor("I32", (groups, ROWS // 8), b"\x77" * (groups * ROWS // 2)),
        "scales": Tensor("F16", (groups, ROWS), scales.T.astype(np.float16).tobytes()),
    }
    stated = {
        "quant_method": "auto-round",
        "packing_format": "auto_round:auto_gptq",
        "bits": 4,
        "group_size": GROUP,
    }
    return tensors, (codes - 8.0) * np.repeat(scales, GROUP, 1), stated, "4-bit g32"


def compressed_tensors() -> Packed:
    """Codes along the inputs and zero points along the outputs, both 8 more than they mean."""
    codes, scales = draw(GROUP)
    zeros = np.random.default_rng(1).integers(0, 16, scales.shape)
    packed_zeros = np.frombuffer(words(zeros.T), np.uint32).reshape(-1, ROWS // 8).T
    tensors = {
        "weight_packed": Tensor("I32", (ROWS, COLUMNS // 8), words(codes)),
        "weight_scale": Tensor("BF16", scales.shape, bf16(scales)),
        "weight_zero_point": Tensor("I32", packed_zeros.shape, packed_zeros.tobytes()),
        "weight_shape": Tensor("I64", (2,), np.array([ROWS, COLUMNS]).tobytes()),
    }
    weights = {"num_bits": 4, "type": "int", "symmetric": False, "group_size": GROUP}
    stated = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }
    wide = np.repeat(scales, GROUP, 1) * (codes - np.repeat(zeros, GROUP, 1))
    return tensors, wide, stated, "4-bit g32"


def modelopt() -> Packed:
    """E2M1 two a byte, the first one lower; scales of 1 or 2 in E4M3; a scale for the tensor."""
    codes, scales = draw(16)
    large = scales > scales.min()
    whole = np.float32(2**-6)
    tensors = {
        "weight": Tensor(
            "U8", (ROWS, COLUMNS // 2), (codes[:, ::2] | codes[:, 1::2] << 4).astype("u1").tobytes()
        ),
        "weight_scale": Tensor(
            "F8_E4M3", large.shape, np.where(large, 0x40, 0x38).astype("u1").tobytes()
        ),
        "weight_scale_2": Tensor("F32", (), whole.tobytes()),
        "input_scale": Tensor("F32", (), whole.tobytes()),
    }
    weights = {"num_bits": 4, "type": "float", "group_size": 16, "dynamic": False}
    stated = {
        "quant_method": "modelopt",
        "quant_algo": "NVFP4",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }
    return tensors, E2M1[codes] * np.repeat(1 + large, 16, 1) * whole, stated, "FP4 g16"


PACKERS: Mapping[str, Callable[[], Packed]] = {
    "modelopt": modelopt,
    "auto-round": autoround,
    "compressed-tensors": compressed_tensors,
}


def packed_folder(folder: Path, packed: Packed) -> Path:
    """The tiny checkpoint in `folder` with MODULE packed, as a tool that is not ours leaves it."""
    tensors = read_all_tensors(folder)
    del tensors[f"{MODULE}.weight"]
    tensors |= {f"{MODULE}.{part}": tensor for part, tensor in packed[0].items()}
    write_safetensors(folder / "model.safetensors", tensors)
    config = read_json(folder / "config.json")
    write_json(folder / "config.json", config | {"quantization_config": packed[2]})
    return folder


def the_changed(a: Path, b: Path) -> ModuleDiff:
    """The one module that is not the same."""
    (found,) = (item for item in diff_folders(a, b, 1).modules if item.state is not State.SAME)
    return found


@pytest.mark.parametrize(("first", "second"), list(combinations(["plain", *PACKERS], 2)))
def test_numbers_are_dequantized_whatever_the_formats(
    first: str, second: str, tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    """A module of two formats is one module, as far apart as the numbers that it stands for."""
    folders, values, storages = [], [], []
    for name in (first, second):
        folder = tiny_checkpoint(tmp_path / name)
        raw = np.frombuffer(read_all_tensors(folder)[f"{MODULE}.weight"].data, "<u2")
        value = (raw.astype("<u4") << 16).view("<f4").reshape(ROWS, COLUMNS)
        storage = "BF16"
        if name in PACKERS:
            packed = PACKERS[name]()
            packed_folder(folder, packed)
            _, value, _, storage = packed
        folders.append(folder)
        values.append(value)
        storages.append(storage)
    expected = np.linalg.norm(values[1] - values[0]) / np.linalg.norm(values[0])

    found = the_changed(*folders)

    assert (MODULE, State.DIFFERENT) == (found.module, found.state)
    assert found.relative == pytest.approx(expected, rel=1e-5)
    assert found.a is not None
    assert found.b is not None
    assert storages == [found.a.storage, found.b.storage]


_AUTOROUND: Mapping[str, dict[str, Any]] = {
    "other packing": {"packing_format": "auto_round:auto_awq"},
    "other bits": {"extra_config": {MODULE: {"bits": 8}}},
    "no groups": {"group_size": -1},
    "groups that do not fit": {"group_size": 64},
    "text for a number": {"group_size": "32"},
    "a method not known": {"quant_method": "gptq"},
}


@pytest.mark.parametrize("change", _AUTOROUND)
def test_numbers_that_config_json_does_not_explain_are_not_compared(
    change: str, tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    """The module differs, and no figure says by how much."""
    tensors, values, stated, storage = autoround()
    changed = (tensors, values, stated | _AUTOROUND[change], storage)
    folder = packed_folder(tiny_checkpoint(tmp_path / "packed"), changed)

    found = the_changed(tiny_checkpoint(), folder)

    assert (MODULE, State.DIFFERENT, None) == (found.module, found.state, found.relative)


def test_columns_in_another_order_are_not_compared(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    """Where compressed-tensors stores a permutation beside the codes, they stand elsewhere."""
    packed = compressed_tensors()
    packed[0]["weight_g_idx"] = Tensor("I32", (COLUMNS,), np.zeros(COLUMNS, "<i4").tobytes())
    folder = packed_folder(tiny_checkpoint(tmp_path / "packed"), packed)

    assert the_changed(tiny_checkpoint(), folder).relative is None


def test_several_groups_of_settings_say_nothing_of_one_module(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    """Which of them a module has is not guessed: it is told by types alone, and not compared."""
    packed = compressed_tensors()
    groups = packed[2]["config_groups"]
    groups["group_1"] = groups["group_0"]
    folder = packed_folder(tiny_checkpoint(tmp_path / "packed"), packed)

    found = the_changed(tiny_checkpoint(), folder)

    assert found.relative is None
    assert found.b is not None
    assert "BF16, I32, I64" == found.b.storage


def test_norms_of_mlx_are_not_compared_with_those_of_torch(
    built: Project, carnice: Callable[..., Finished]
) -> None:
    """mlx-lm stores the gain 1 + w; all else of the source, misprefixed, meets its module."""
    found = modules(carnice("diff", built.checkpoint, "mlx-4bit", "--json"))

    states = {kind: {m["state"] for m in found.values() if m["kind"] == kind} for kind in KINDS}
    assert KINDS == states
    head = found["lm_head"]
    assert ("BF16", "4-bit g64") == (head["a"]["storage"], head["b"]["storage"])
    assert 0.05 < head["relative_difference"] < 0.15
    conv = found["model.language_model.layers.0.linear_attn.conv1d"]
    assert 0 == conv["relative_difference"]


def test_weights_published_in_fp8_are_compared_by_their_floats(tmp_path: Path) -> None:
    """Their scales are a part of them, and of the numbers: one is twice as much."""
    up, folders = "model.layers.0.mlp.up_proj", []
    for scale in (2.0, 4.0):
        folder = write_checkpoint(tmp_path / str(scale), CONFIGS["llama"])
        tensors = read_safetensors(folder / "model.safetensors")
        shape = tensors[f"{up}.weight"].shape
        tensors[f"{up}.weight"] = Tensor("F8_E4M3", shape, bytes([60] * prod(shape)))
        tensors[f"{up}.weight_scale_inv"] = Tensor("F32", (1, 1), struct.pack("<f", scale))
        write_safetensors(folder / "model.safetensors", tensors)
        stated = {"quant_method": "fp8", "weight_block_size": [128, 128]}
        config = {**CONFIGS["llama"], "quantization_config": stated}
        write_json(folder / "config.json", config)
        folders.append(folder)

    found = the_changed(*folders)

    assert up == found.module
    assert found.a is not None
    assert "FP8" == found.a.storage
    assert 1.0 == found.relative


def test_norms_of_torch_that_mlx_calls_alike_are_those_of_torch(tmp_path: Path) -> None:
    """Qwen3-Next's, as long as nothing else has a name that MLX alone gives it."""
    folder = write_checkpoint(tmp_path / "model", CONFIGS["qwen3_next"])
    of_torch = open_side(folder).stores_gain("model.norm")
    number = Tensor("BF16", (1,), bytes(2))
    names = ("model.norm.weight", "model.layers.0.mlp.switch_mlp.up_proj.weight")
    write_safetensors(folder / "model.safetensors", dict.fromkeys(names, number))

    assert not of_torch
    assert open_side(folder).stores_gain("model.norm")


KINDS = {
    "input_layernorm": {"not comparable"},
    "post_attention_layernorm": {"not comparable"},
    "self_attn.q_norm": {"not comparable"},
    "self_attn.k_norm": {"not comparable"},
    "norm": {"not comparable"},
    "linear_attn.A_log": {"same"},
    "linear_attn.conv1d": {"differs"},
    "mlp.down_proj": {"differs"},
    "lm_head": {"differs"},
    "attn.qkv": {"only in A"},
}
