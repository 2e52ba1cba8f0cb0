"""Builds in modelopt's other formats, and in several at once, held against its own export."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from calibrating import cut_demo
from conftest import Project
from modelopt_export import LENGTH, SAMPLES, export
from tiny import read_all_tensors, read_json, write_json

from carnice_build.commands.build import build_variants
from carnice_build.commands.diff import State, diff_folders
from carnice_build.commands.options import Options
from carnice_build.commands.verify import VerifySettings, verify_variants
from carnice_build.verification.result import Check, Outcome

VARIANT = "qwen-nvfp4-text-mtp"


@dataclass(frozen=True)
class Case:
    """What a recipe says below `quantize`, and the settings of the library that say the same."""

    quant_algo: str
    preset: str
    rules: Mapping[str, str] = field(default_factory=dict)
    others: Mapping[str, str] = field(default_factory=dict)


CASES = {
    "FP8": Case("FP8", "FP8_DEFAULT_CFG"),
    "W4A16_NVFP4": Case("W4A16_NVFP4", "W4A16_NVFP4_CFG"),
    "MXFP8": Case("MXFP8", "MXFP8_DEFAULT_CFG"),
    "NVFP4 and FP8": Case(
        "NVFP4",
        "NVFP4_DEFAULT_CFG",
        {"*.self_attn.*": "FP8"},
        {"*self_attn*": "FP8_DEFAULT_CFG"},
    ),
    "all": Case(
        "NVFP4",
        "NVFP4_DEFAULT_CFG",
        {"*.self_attn.*": "FP8", "*.linear_attn.*": "MXFP8", "*.layers.0.mlp.*": "W4A16_NVFP4"},
        {
            "*self_attn*": "FP8_DEFAULT_CFG",
            "*linear_attn*": "MXFP8_DEFAULT_CFG",
            "*layers.0.mlp*": "W4A16_NVFP4_CFG",
        },
    ),
}


@dataclass(frozen=True)
class Pair:
    """One checkpoint by us and by the library; and what our checks say of ours."""

    source: Path
    ours: Path
    theirs: Path
    checks: list[Check]


@pytest.fixture(scope="module", params=CASES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    case = CASES[request.param]
    project = Project(tmp_path_factory.mktemp("modelopt"))
    cut_demo("qwen3.6-27b", project.base, (2, 7))
    rules = [{"match": match, "quant_algo": name} for match, name in case.rules.items()]
    options = Options(
        recipes=Path(__file__).parents[1] / "recipes",
        out=project.root / "ours",
        cache=project.root / "cache",
        sources={"body": project.base},
        overrides=(
            f"calibration.samples={SAMPLES}",
            f"calibration.length={LENGTH}",
            "steps=[{drop: {match: 'model.visual.*'}}]",
            f"quantize.quant_algo={case.quant_algo}",
            f"quantize.rules={rules}",
            "package.serve=modelopt-vllm",
        ),
    )
    build_variants([VARIANT], options)
    (found,) = verify_variants([VARIANT], options, VerifySettings(run=False)).variants
    theirs = project.root / "theirs"
    export(theirs, None, project.base, preset=case.preset, others=case.others)
    return Pair(project.base, project.root / "ours" / VARIANT, theirs, list(found.checks))


def test_every_tensor_of_modelopts_export_is_ours_bit_for_bit(pair: Pair) -> None:
    """Codes, scales of weights and of inputs, and what stays plain; ours alone is the MTP head."""
    ours, theirs = read_all_tensors(pair.ours), read_all_tensors(pair.theirs)
    alone = set(ours) - set(theirs)

    assert [] == [name for name, tensor in theirs.items() if ours.get(name) != tensor]
    assert all(name.startswith("mtp.") for name in alone)


def test_both_configs_say_what_modelopts_say(pair: Pair) -> None:
    """Lists of plain modules name, in ours, what an engine builds beside: the MTP head and fused
    modules.  A folder of several algorithms has no such lists, as the library writes it."""
    for file, section, excluded in (
        ("config.json", "quantization_config", "ignore"),
        ("hf_quant_config.json", "quantization", "exclude_modules"),
    ):
        ours, theirs = (read_json(folder / file)[section] for folder in (pair.ours, pair.theirs))
        lists: list[Any] = [stated.pop(excluded, None) for stated in (ours, theirs)]
        assert theirs == ours
        if ours.get("quant_algo") == "MIXED_PRECISION":
            assert lists[0] == lists[1]
        else:
            assert set(lists[1]) < set(lists[0])


def test_the_folder_passes_its_checks(pair: Pair) -> None:
    """Structure and round trip, every module compared."""
    found = {check.name: check for check in pair.checks}

    assert [] == [check for check in pair.checks if check.outcome is Outcome.FAILED]
    assert 0 == found["round trip"].details["not_compared"]


def test_the_librarys_folder_is_read_as_any_other(pair: Pair, tmp_path: Path) -> None:
    """`diff` tells the numbers of every module, and finds no difference beside ours.

    The library saw the text model alone, whose class names modules otherwise than the source's.
    """
    stated = read_json(pair.theirs / "config.json")["quantization_config"]
    theirs = tmp_path / "theirs"
    shutil.copytree(pair.theirs, theirs)
    source_config = read_json(pair.source / "config.json")
    write_json(theirs / "config.json", {**source_config, "quantization_config": stated})
    quantized = {
        name.removesuffix(".weight_scale")
        for name in read_all_tensors(pair.theirs)
        if name.endswith(".weight_scale")
    }
    source = {item.module: item for item in diff_folders(pair.source, theirs, 1).modules}
    ours = {item.module: item for item in diff_folders(pair.ours, theirs, 1).modules}

    assert quantized
    assert all(0 < (source[module].relative or math.nan) < 0.2 for module in quantized)
    assert {State.SAME} == {ours[module].state for module in quantized}
