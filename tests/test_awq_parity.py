"""AWQ builds of the demo checkpoint, held against llm-compressor's own `oneshot`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
import yaml
from calibrating import tie
from conftest import REPOSITORY, Project
from oneshot import IGNORE, canonical, run_oneshot, tokenizer, write_rows, written
from tiny import read_all_tensors, read_json

from carnice_build.backends.compressed import WeightScheme, quantize_module
from carnice_build.backends.tensors import as_data
from carnice_build.calibration.tokenizing import longest_first
from carnice_build.commands.build import BuildResult, build_variants
from carnice_build.commands.options import Options
from carnice_build.commands.plan import plan_variants

pytest_plugins = ["calibrating"]

OBSERVERS = {"w4a16": "mse", "w4a16-minmax": "memoryless_minmax"}

RECIPE = """
extends: w4a16-awq.yaml
variant: w4a16
description: AWQ of the whole Qwen stand-in
sources:
  body: {model: Qwen/Qwen3.6-27B}
steps: []
calibration: {dataset: rows.jsonl, samples: 3, threads: 1}
"""
MINMAX = """
extends: w4a16.yaml
variant: w4a16-minmax
description: The same with the other observer
quantize: {config_groups: {group_0: {weights: {observer: memoryless_minmax}}}}
"""


@dataclass(frozen=True)
class Parity:
    """Our folders and the library's, by variant, and what building ours one by one took."""

    ours: dict[str, Path]
    theirs: dict[str, Path]
    reports: dict[str, BuildResult]


@pytest.fixture(scope="module")
def parity(tmp_path_factory: pytest.TempPathFactory) -> Parity:
    """Both observers, built one after the other into one cache, and by `oneshot`.

    Neither is told in which order to take the samples.
    """
    root = tmp_path_factory.mktemp("awq")
    options, tokens = _project(root)
    reports = {name: build_variants([name], options) for name in OBSERVERS}
    for name, observer in OBSERVERS.items():
        run_oneshot(observer, root / name, tokens)
    return Parity(
        {name: root / "ours" / name for name in OBSERVERS},
        {name: root / name for name in OBSERVERS},
        reports,
    )


def _project(root: Path, *overrides: str) -> tuple[Options, list[torch.Tensor]]:
    """Recipes for both observers in a folder of their own, and the tokens of their samples."""
    recipes = root / "recipes"
    recipes.mkdir()
    (recipes / "_base").symlink_to(REPOSITORY / "recipes" / "_base")
    for name, text in (
        ("w4a16-awq", (REPOSITORY / "recipes" / "w4a16-awq.yaml").read_text()),
        ("w4a16", RECIPE),
        ("w4a16-minmax", MINMAX),
        ("_profiles", "demo:\n  Qwen/Qwen3.6-27B: demo\n"),
    ):
        (recipes / f"{name}.yaml").write_text(text)
    (root / "demo").symlink_to(REPOSITORY / "demo" / "qwen3.6-27b")
    tokens = write_rows(root / "rows.jsonl")
    options = Options(recipes=recipes, out=root / "ours", cache=root / "cache", overrides=overrides)
    return options, tokens


@pytest.mark.parametrize("name", OBSERVERS)
def test_every_tensor_that_oneshot_writes_is_ours_bit_for_bit(parity: Parity, name: str) -> None:
    """Packed weights, scales, zero points, norms and what stays plain; the MTP head is copied."""
    ours, theirs = read_all_tensors(parity.ours[name]), written(parity.theirs[name])
    different = [key for key, tensor in theirs.items() if ours.get(key) != tensor]

    assert [] == different
    assert {key for key in ours if not key.startswith(("mtp.", "model.visual."))} <= set(theirs)
    assert len(theirs) >= 205


@pytest.mark.gpu
@pytest.mark.parametrize("name", OBSERVERS)
def test_a_gpu_finds_what_oneshot_finds_there(tmp_path: Path, name: str) -> None:
    """The norms are those of `oneshot` on the same GPU, and so are the smoothed weights.

    These are rounded on the processor, with the bits that the library has there; on a GPU it has
    others, for torch multiplies by the reciprocal of a number there where it is to divide by it.
    """
    options, tokens = _project(tmp_path, "calibration.device=cuda")
    build_variants([name], options)
    library = run_oneshot(OBSERVERS[name], tmp_path / name, tokens)
    ours, theirs = read_all_tensors(tmp_path / "ours" / name), written(tmp_path / name)
    packed = [
        key.removesuffix(".weight_packed") for key in theirs if key.endswith(".weight_packed")
    ]
    plain = [key for key in theirs if key.rpartition(".")[0] not in packed]

    assert 32 == len(packed)
    assert [] == [key for key in plain if ours[key] != theirs[key]]
    for module in packed:
        weight = library.smoothed[f"{module}.weight"].cpu()
        for end, tensor in quantize_module(weight, OBSERVERS[name], WeightScheme()).items():
            assert as_data(tensor).array.tobytes() == ours[f"{module}.{end}"].data, module


@pytest.mark.parametrize("count", [2, 3, 16, 17, 256, 1000])
def test_samples_come_in_the_order_of_oneshot(count: int) -> None:
    """However many there are, and whatever many of them have one length, as those that are cut."""
    from datasets import Dataset
    from llmcompressor.datasets.utils import LengthAwareSampler

    random = Random(count)
    lengths = [random.choice([3, 5, 8, 8, 8]) for _ in range(count)]
    rows = Dataset.from_dict({"input_ids": [[1] * length for length in lengths]})

    assert list(LengthAwareSampler(rows)) == longest_first(lengths)


def test_the_other_observer_takes_no_search_and_no_forward_pass(parity: Parity) -> None:
    """Switching from mse to minmax runs the observers and the packing of each weight alone."""
    first, second = (parity.reports[name] for name in OBSERVERS)
    quantized = sum(name.endswith("_packed") for name in read_all_tensors(parity.ours["w4a16"]))

    assert quantized == second.actions_run
    assert first.actions_run - second.actions_run == second.actions_reused


@pytest.mark.parametrize("name", OBSERVERS)
def test_the_config_is_the_librarys(parity: Parity, name: str) -> None:
    """quantization_config is that of `save_pretrained`; vision and MTP head are ignored besides."""
    ours, theirs = (
        read_json(folder / "config.json")["quantization_config"]
        for folder in (parity.ours[name], parity.theirs[name])
    )
    ignored, library = ours.pop("ignore"), theirs.pop("ignore")

    assert theirs == ours
    text = {entry for entry in ignored if not entry.startswith("model.visual.")}
    assert {canonical(entry) for entry in library} | {"re:^mtp.*"} == text
    assert len(ignored) - len(text) == 3 * 4 + 2


def test_a_tied_head_is_ignored_as_llm_compressor_does(small: Project) -> None:
    """The library lists the head though it saves one table for both, and so do we."""
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from transformers import Qwen3_5ForConditionalGeneration

    tie(small.base)
    model: Any = Qwen3_5ForConditionalGeneration.from_pretrained(small.base)
    oneshot(
        model=model,
        recipe=[QuantizationModifier(targets=["Linear"], scheme="W4A16", ignore=IGNORE)],
    )
    model.save_pretrained(small.root / "theirs", save_compressed=True)
    theirs = read_json(small.root / "theirs" / "config.json")["quantization_config"]["ignore"]
    small.recipe("w4a16", RECIPE.replace("rows.jsonl", "demo/calibration.jsonl"))
    (plan,) = plan_variants(["w4a16"], small.options()).variants

    assert "lm_head" in theirs
    assert not any("lm_head" in name for name in read_all_tensors(small.root / "theirs"))
    assert set(theirs) == set(plan.conversion.ignored)


@pytest.mark.parametrize("name", OBSERVERS)
def test_the_recipe_beside_the_weights_is_llm_compressors(parity: Parity, name: str) -> None:
    """recipe.yaml names the modifiers and their arguments as the library writes them."""
    ours, theirs = (
        yaml.safe_load((folder / "recipe.yaml").read_text())
        for folder in (parity.ours[name], parity.theirs[name])
    )

    assert theirs == ours


def test_transformers_loads_the_folder_and_its_logits_are_finite(parity: Parity) -> None:
    """compressed-tensors decompresses every weight, and no parameter is missing."""
    from transformers import Qwen3_5ForConditionalGeneration

    loaded: Any = Qwen3_5ForConditionalGeneration.from_pretrained(
        parity.ours["w4a16"], output_loading_info=True
    )
    model, info = loaded
    prompt = tokenizer()("Which functions do you have?", return_tensors="pt").input_ids
    logits = model(prompt).logits

    assert not info["missing_keys"]
    assert torch.isfinite(logits).all()
