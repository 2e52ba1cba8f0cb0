"""`carnice diff` pairs experts, however each of two folders holds them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from family_builds import build_checked
from numpy.typing import NDArray
from tiny import Tensor, bf16, read_all_tensors, write_safetensors
from zoo import write_zoo

from carnice_build.commands.diff import ModuleDiff, State, diff_folders

Floats = NDArray[np.float32]
Stacks = dict[str, Floats]
"""Weights [experts, rows, columns] of a projection each, by its name."""

EXPERTS = "model.layers.{layer}.mlp.experts"
RECIPES = {
    "mlx": "quantize: {format: mlx, bits: 4, group_size: 64}\n",
    "fp8": "quantize: {format: compressed-tensors, scheme: FP8_DYNAMIC}\n",
}


def one_by_one(layer: int, stacks: Stacks) -> Stacks:
    """A tensor for each expert, as most checkpoints on the hub have it."""
    name = EXPERTS.format(layer=layer)
    return {
        f"{name}.{index}.{projection}.weight": one
        for projection, stack in stacks.items()
        for index, one in enumerate(stack)
    }


def switched(layer: int, stacks: Stacks) -> Stacks:
    """A stack of all, as mlx-lm has it."""
    name = EXPERTS.format(layer=layer).replace("experts", "switch_mlp")
    return {f"{name}.{projection}.weight": stack for projection, stack in stacks.items()}


def fused(layer: int, stacks: Stacks) -> Stacks:
    """Gates and what they gate in one tensor, as transformers has it in memory."""
    name = EXPERTS.format(layer=layer)
    both = np.concatenate([stacks["gate_proj"], stacks["up_proj"]], axis=1)
    return {f"{name}.gate_up_proj": both, f"{name}.down_proj": stacks["down_proj"]}


Spelling = Callable[[int, Stacks], Stacks]


def respelled(source: Path, folder: Path, spelling: Spelling, noise: float) -> dict[str, Stacks]:
    """A copy of a checkpoint with its experts spelled so, their weights off by `noise`.

    Gives its stacks by layer.
    """
    folder.mkdir()
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    random = np.random.default_rng(0)
    tensors = read_all_tensors(source)
    found: dict[str, Stacks] = {}
    for name in [name for name in tensors if ".experts." in name]:
        tensor = tensors.pop(name)
        layer, projection = name.split(".")[2], name.split(".")[-2]
        raw = np.frombuffer(tensor.data, "<u2").astype("<u4") << 16
        values = raw.view("<f4").reshape(tensor.shape)
        values = values + noise * random.standard_normal(values.shape).astype(np.float32)
        rounded = np.frombuffer(bf16(values), "<u2").astype("<u4") << 16
        stack = found.setdefault(layer, {})
        one = rounded.view("<f4").reshape(1, *tensor.shape)
        stack[projection] = np.concatenate([stack[projection], one]) if projection in stack else one
    for layer, stacks in found.items():
        for name, value in spelling(int(layer), stacks).items():
            tensors[name] = Tensor("BF16", value.shape, bf16(value))
    write_safetensors(folder / "model.safetensors", tensors)
    return found


def experts(a: Path, b: Path) -> dict[str, ModuleDiff]:
    """What is said of experts, by module."""
    return {item.module: item for item in diff_folders(a, b, 2).modules if "experts" in item.module}


@pytest.mark.parametrize("first", [one_by_one, switched, fused])
@pytest.mark.parametrize("second", [one_by_one, switched, fused])
def test_experts_meet_in_whatever_spelling(
    first: Spelling, second: Spelling, tmp_path: Path
) -> None:
    """A projection of a layer is one module, as far apart as all of its experts together."""
    source = write_zoo(tmp_path / "source", "qwen3_moe", "transformers")
    one = respelled(source, tmp_path / "a", first, 0)
    other = respelled(source, tmp_path / "b", second, 0.01)
    expected = {
        f"{EXPERTS.format(layer=layer)}.*.{name}": np.linalg.norm(other[layer][name] - stack)
        / np.linalg.norm(stack)
        for layer, stacks in one.items()
        for name, stack in stacks.items()
    }

    found = experts(tmp_path / "a", tmp_path / "b")

    assert {State.DIFFERENT} == {item.state for item in found.values()}
    assert {name: item.relative for name, item in found.items()} == pytest.approx(expected, 1e-4)
    sizes = {item.a.size for item in found.values() if item.a} | {
        item.b.size for item in found.values() if item.b
    }
    assert {2 * stack.size for stack in one["1"].values()} == sizes


@pytest.mark.parametrize("spelling", [one_by_one, switched, fused])
def test_experts_of_the_same_bytes_are_the_same(spelling: Spelling, tmp_path: Path) -> None:
    """No number of theirs is read."""
    source = write_zoo(tmp_path / "source", "qwen3_moe", "transformers")
    for name in "ab":
        respelled(source, tmp_path / name, spelling, 0)

    found = experts(tmp_path / "a", tmp_path / "b")

    assert {State.SAME} == {item.state for item in found.values()}


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_stacks_of_mlx_meet_the_experts_of_torch(family: str, tmp_path: Path) -> None:
    """Packed in two formats, biases too; and nothing of them is in one folder only."""
    pytest.importorskip("mlx_lm")
    source = write_zoo(tmp_path / "source", family, "transformers")
    folders = [build_checked(tmp_path, source, name, recipe) for name, recipe in RECIPES.items()]

    for pair in (folders, [source, folders[0]], [source, folders[1]]):
        found = experts(*pair)
        assert found
        assert not {State.ONLY_A, State.ONLY_B} & {item.state for item in found.values()}
        relatives = [item.relative for item in found.values() if item.state is State.DIFFERENT]
        assert all(value is not None and value < 0.15 for value in relatives)
