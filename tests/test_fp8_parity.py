"""FP8 of the demo checkpoint, held against llm-compressor's own `oneshot`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import REPOSITORY
from demo_model import BASE, whole_model
from oneshot import tokenizer
from tiny import Tensor, read_all_tensors, read_json

from carnice_build.commands.build import build_variants
from carnice_build.commands.options import Options

RECIPE = """
variant: fp8
description: FP8 of the whole Qwen stand-in
sources:
  body: {model: Qwen/Qwen3.6-27B}
steps:
  - drop: {match: 'model.visual.*'}
quantize: {format: compressed-tensors, scheme: FP8_DYNAMIC, ignore: ["*.in_proj_a", "*.in_proj_b"]}
"""


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Our folder."""
    root = tmp_path_factory.mktemp("fp8")
    (root / "recipes").mkdir()
    (root / "recipes" / "fp8.yaml").write_text(RECIPE)
    (root / "recipes" / "_profiles.yaml").write_text("demo:\n  Qwen/Qwen3.6-27B: demo\n")
    (root / "demo").symlink_to(REPOSITORY / "demo" / "qwen3.6-27b")
    build_variants(
        ["fp8"], Options(recipes=root / "recipes", out=root / "ours", cache=root / "cache")
    )
    return root / "ours" / "fp8"


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What llm-compressor saves."""
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier

    folder = tmp_path_factory.mktemp("oneshot")
    model = whole_model("bfloat16", "sdpa")
    modifier = QuantizationModifier(
        targets=["Linear"], scheme="FP8_DYNAMIC", ignore=["lm_head", "re:.*in_proj_[ab]$"]
    )
    oneshot(model=model, processor=tokenizer(), recipe=[modifier])
    model.save_pretrained(folder, save_compressed=True)
    return folder


def is_norm(name: str) -> bool:
    """True for the norms that `oneshot` stores as 1 + w in BF16 and back, which alters them."""
    return name.endswith("norm.weight")


def test_tensors_are_those_of_the_library(ours: Path, theirs: Path) -> None:
    """All of the text model and the MTP head, but for norms, which we leave as they are."""
    wanted, found = read_all_tensors(theirs), read_all_tensors(ours)

    assert set(wanted) == set(found)
    assert [] == [name for name in wanted if not is_norm(name) and wanted[name] != found[name]]


def test_norms_are_those_of_the_source(ours: Path) -> None:
    """`model_free_ptq` of llm-compressor leaves them alone, too."""
    source: dict[str, Tensor] = read_all_tensors(BASE)
    found = {name: item for name, item in read_all_tensors(ours).items() if is_norm(name)}

    assert found == {name: source[name] for name in found}
    assert found


def test_the_config_is_that_of_the_library(ours: Path, theirs: Path) -> None:
    """Scheme and format; what is ignored are the same modules and those of the vision tower."""
    wanted, found = (
        read_json(folder / "config.json")["quantization_config"] for folder in (theirs, ours)
    )
    lists = [section.pop("ignore") for section in (wanted, found)]

    assert wanted == found
    assert set(lists[0]) <= set(lists[1])
    assert all(name.startswith("model.visual.") for name in set(lists[1]) - set(lists[0]))


def test_the_recipe_names_the_library_s_own_scheme(ours: Path) -> None:
    """In llm-compressor's words."""
    recipe: dict[str, Any] = yaml.safe_load((ours / "recipe.yaml").read_text())
    (modifier,) = recipe["default_stage"]["default_modifiers"].values()

    assert "FP8_DYNAMIC" == modifier["scheme"]


def test_compressed_tensors_loads_the_folder(ours: Path) -> None:
    """transformers finds every parameter, and the model's logits are finite."""
    from transformers import AutoModelForImageTextToText

    model, report = AutoModelForImageTextToText.from_pretrained(
        ours, dtype="bfloat16", output_loading_info=True
    )
    with torch.no_grad():
        logits = model(input_ids=torch.arange(1, 17)[None]).logits

    assert not [name for name in report["missing_keys"] if "visual" not in name]
    assert bool(logits.isfinite().all())
