"""What verify says of folders whose configs state several of modelopt's algorithms falsely."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from family_builds import build_checked, options_of, write_family
from tiny import read_json

from carnice_build.commands.verify import VerifySettings, verify_variants

RECIPE = """
quantize:
  format: nvfp4
  quant_algo: W4A16_NVFP4
  rules: [{match: '*.self_attn.*', quant_algo: MXFP8}]
"""
MODULE = "model.layers.0.mlp.down_proj"
PACKED = f"{MODULE}, which is of type U8 and has weight, weight_scale, weight_scale_2"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with a built folder of two algorithms, which passes its checks."""
    root = tmp_path_factory.mktemp("mixed")
    build_checked(root, write_family(root / "source", "qwen3", {}), "mine", RECIPE)
    return root


def problems(root: Path, stated: dict[str, Any], both: bool) -> str:
    """What the check of the folder's structure finds with another `quantization_config`."""
    files = {"config.json": "quantization_config", "hf_quant_config.json": "quantization"}
    folder = root / "out" / "mine"
    was = {name: read_json(folder / name) for name in files}
    try:
        for name, key in files.items():
            found = copy.deepcopy(was[name])
            if name == "config.json":
                found[key] = stated
            elif both:
                found[key]["quantized_layers"] = stated["quantized_layers"]
            (folder / name).unlink()
            (folder / name).write_text(json.dumps(found))
        options = options_of(root, root / "source")
        (result,) = verify_variants(["mine"], options, VerifySettings(run=False)).variants
    finally:
        for name, found in was.items():
            (folder / name).write_text(json.dumps(found))
    (check,) = (check for check in result.checks if check.name == "structure")
    return "\n".join(check.problems)


@pytest.mark.parametrize("algorithm", ["FP8", "NVFP4", "MXFP8"])
def test_a_module_that_is_said_to_have_another_algorithm_is_found(
    root: Path, algorithm: str
) -> None:
    """By its tensors, also where both configs say it."""
    stated = read_json(root / "out" / "mine" / "config.json")["quantization_config"]
    stated["quantized_layers"][MODULE] = {"quant_algo": algorithm}

    assert f"config.json states {algorithm} of {PACKED}" in problems(root, stated, both=True)


def test_a_module_of_which_nothing_is_said_is_found(root: Path) -> None:
    """And one of an algorithm that is none, one of a module that is none, and one said but once."""
    stated = read_json(root / "out" / "mine" / "config.json")["quantization_config"]
    layers = stated["quantized_layers"]
    unknown = {**layers, MODULE: {"quant_algo": "INT3"}, "nowhere": layers[MODULE]}
    missing = {name: item for name, item in layers.items() if name != MODULE}
    found = problems(root, {**stated, "quantized_layers": unknown}, both=True)

    assert f"{{'quant_algo': 'INT3'}} of {MODULE}, which is not known" in found
    assert "of nowhere, which is no module of the model" in found
    found = problems(root, {**stated, "quantized_layers": missing}, both=False)
    assert f"states None of {MODULE}, which is of type U8" in found
    assert "config.json and hf_quant_config.json differ in quantized_layers" in found


def test_config_groups_that_say_another_thing_are_found(root: Path) -> None:
    """They say of each module what its entry says."""
    stated = read_json(root / "out" / "mine" / "config.json")["quantization_config"]
    stated["config_groups"]["group_1"]["targets"].pop()

    assert "other config_groups than follow from quantized_layers" in problems(
        root, stated, both=False
    )
