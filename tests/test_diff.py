"""`carnice diff` says how two built folders differ."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from conftest import Finished, Project
from tiny import read_all_tensors

from carnice_build.commands.build import build_variants
from carnice_build.commands.diff import State, diff_folders
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


def test_a_folder_is_the_same_as_itself(built: Project, carnice: Callable[..., Finished]) -> None:
    """Nothing differs between a variant and itself, given by name and by path."""
    run = carnice("diff", "mlx-4bit", built.out / "mlx-4bit", "--json")

    assert {item["state"] for item in modules(run).values()} == {"same"}
    assert json.loads(run.out)["same"] is True


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
    with pytest.raises(StoreError, match="holds no safetensors file"):
        diff_folders(built.out / "mlx-4bit", built.out / "mlx-5bit", jobs=1)
