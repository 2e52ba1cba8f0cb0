"""What a config lists as unquantized follows from the model that an engine builds of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from calibrating import QUICK, make_project, tie
from tiny import read_json, write_json
from verifying import Copy

from carnice_build.commands.build import build_variants
from carnice_build.commands.options import Options
from carnice_build.commands.plan import plan_variants

NVFP4, AUTOROUND, AWQ = FORMATS = ("tied-nvfp4", "tied-autoround", "tied-awq")
"""A tied model without its tower in each format that lists what it leaves alone."""

RECIPES = {
    NVFP4: "qwen-nvfp4-text-mtp",
    AUTOROUND: "int4-rtn",
    AWQ: "w4a16-awq-minmax",
}
TOWERLESS = """
extends: {parent}.yaml
variant: {variant}
description: A tied model without its vision tower
sources:
  body: {{model: Qwen/Qwen3.6-27B}}
steps:
  - drop: {{match: 'model.visual.*'}}
"""
FUSED = "mtp.layers.0.mlp.gate_up_proj"
TOWER = "model.visual.blocks.0.attn.qkv"
MTP = "mtp.fc"


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Options:
    """Where a tied model of two layers is built in every such format; not to be changed."""
    project = make_project(tmp_path_factory.mktemp("tied") / "project", (2, 7))
    tie(project.base)
    for variant, parent in RECIPES.items():
        project.recipe(variant, TOWERLESS.format(parent=parent, variant=variant))
    options = project.options(out=project.root / "build", cache=project.root / "cache")
    for variant in FORMATS:
        build_variants([variant], quick(options, variant))
    return options


def quick(options: Options, variant: str) -> Options:
    """The options for `variant`, which may need a calibration."""
    return options if variant == AUTOROUND else replace(options, overrides=QUICK)


def listed(stated: dict[str, Any]) -> Any:
    """The list, or the table by module, of what a file of a folder leaves alone."""
    if "quantization" in stated:
        return stated["quantization"]["exclude_modules"]
    section = stated["quantization_config"]
    return section["ignore"] if "ignore" in section else section["extra_config"]


@pytest.mark.parametrize("variant", FORMATS)
def test_what_an_engine_builds_is_listed_though_the_folder_lacks_it(
    tied: Options, variant: str
) -> None:
    """The head of a tied model, and the tower that `vision_config` is about; verify passes."""
    copied = Copy(variant, quick(tied, variant))
    found = list(listed(read_json(copied.folder / "config.json")))
    index = read_json(copied.folder / "model.safetensors.index.json")["weight_map"]

    assert {"lm_head", TOWER, "model.visual.merger.linear_fc2"} <= set(found)
    assert not any(name.startswith(("lm_head", "model.visual")) for name in index)
    assert 3 * 4 + 2 == sum(name.startswith("model.visual.") for name in found)
    assert len(set(found)) == len(found)
    assert {} == copied.problems()


def test_both_files_of_modelopt_have_one_list(tied: Options) -> None:
    """hf_quant_config.json and config.json name the same modules."""
    config, twin = (
        read_json(tied.out / NVFP4 / name) for name in ("config.json", "hf_quant_config.json")
    )

    assert listed(config) == listed(twin)


MISSING = [
    (variant, module)
    for variant in FORMATS
    for module in ("lm_head", TOWER, MTP, FUSED)
    if variant != AWQ or module in ("lm_head", TOWER)
]


@pytest.mark.parametrize(("variant", "module"), [*MISSING, (AWQ, "re:^mtp.*")])
def test_verify_misses_what_is_not_listed(
    tied: Options, tmp_path: Path, variant: str, module: str
) -> None:
    """It derives the list from config.json: no tensor of the folder need tell of the module."""
    copied = Copy.of(variant, quick(tied, variant), tmp_path)
    files = ["config.json", *(["hf_quant_config.json"] if variant == NVFP4 else [])]
    for name in files:
        stated = read_json(copied.folder / name)
        entries = listed(stated)
        entries.remove(module) if isinstance(entries, list) else entries.pop(module)
        write_json(copied.folder / name, stated)
    named = "mtp.fc" if module.startswith("re:") else module

    assert f"does not list {named}, which is not quantized" in copied.problems()["structure"]


@pytest.mark.parametrize("variant", FORMATS)
def test_verify_refuses_entries_for_what_the_config_does_not_announce(
    tied: Options, tmp_path: Path, variant: str
) -> None:
    """Without `vision_config` no tower is built, and its entries are for no module."""
    copied = Copy.of(variant, quick(tied, variant), tmp_path)
    config = read_json(copied.folder / "config.json")
    del config["vision_config"]
    write_json(copied.folder / "config.json", config)

    assert f"lists {TOWER}, which is no module of the model" in copied.problems()["structure"]


@pytest.mark.parametrize(("layers", "problem"), [(0, "announces no MTP head"), (2, "mtp.layers.1")])
def test_verify_holds_the_announced_head_against_the_folder(
    tied: Options, tmp_path: Path, layers: int, problem: str
) -> None:
    """A config that announces no head, or a larger one than is there, is told."""
    copied = Copy.of(AUTOROUND, tied, tmp_path)
    config = read_json(copied.folder / "config.json")
    config["text_config"]["mtp_num_hidden_layers"] = layers
    write_json(copied.folder / "config.json", config)

    assert problem in copied.problems()["structure"]


HEADLESS = "  - drop: {{match: 'mtp.*'}}\n"


def write_headless(options: Options, variant: str) -> None:
    """Write a recipe `headless`, like that of `variant` but without the MTP head."""
    text = (TOWERLESS + HEADLESS).format(parent=RECIPES[variant], variant="headless")
    (options.recipes / "headless.yaml").write_text(text)


@pytest.mark.parametrize("variant", FORMATS)
def test_without_an_mtp_head_none_is_announced_nor_listed(tied: Options, variant: str) -> None:
    """The config of a folder whose head was dropped speaks of no head."""
    write_headless(tied, variant)
    (plan,) = plan_variants(["headless"], quick(tied, variant)).variants

    assert 0 == plan.config["text_config"]["mtp_num_hidden_layers"]
    assert not any("mtp" in name for name in plan.conversion.ignored)
    assert "lm_head" in plan.conversion.ignored


def test_verify_refuses_a_head_that_is_announced_and_not_there(
    tied: Options, tmp_path: Path
) -> None:
    """The folder of another tool, or of a former version, that has lost its head."""
    write_headless(tied, AUTOROUND)
    build_variants(["headless"], tied)
    copied = Copy.of("headless", tied, tmp_path)
    config = read_json(copied.folder / "config.json")
    config["text_config"]["mtp_num_hidden_layers"] = 1
    write_json(copied.folder / "config.json", config)

    assert "announces an MTP head, and the folder has none" in copied.problems()["structure"]
