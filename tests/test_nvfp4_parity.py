"""NVFP4 builds of the demo checkpoints, held against modelopt's own quantization and export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from calibrating import QUICK, tie
from conftest import REPOSITORY, Project
from modelopt_export import LENGTH, SAMPLES, export
from tiny import read_all_tensors, read_json

from carnice_build.commands.build import build_variants
from carnice_build.commands.options import Options
from carnice_build.commands.plan import plan_variants

pytest_plugins = ["calibrating"]

VARIANT = "qwen-nvfp4-text-mtp"

KEEP_043 = [
    "*block_sparse_moe.gate*",
    "*linear_attn.conv1d*",
    "*lm_head*",
    "*mixer.conv1d*",
    "*mlp.gate.*",
    "*mlp.shared_expert_gate.*",
    "*output_layer*",
    "*proj_out.*",
    "*router*",
    "output.*",
]


@pytest.fixture(scope="module", params=["modelopt-0.47", "modelopt-0.43"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Our folder and modelopt's, of one checkpoint, one list of exceptions and one calibration.

    With the list of 0.47 there are scales of keys and values, too.
    """
    root = tmp_path_factory.mktemp(request.param)
    overrides = (
        f"calibration.samples={SAMPLES}",
        f"calibration.length={LENGTH}",
        f"quantize.defaults={request.param}",
    )
    options = Options(
        recipes=REPOSITORY / "recipes", out=root / "ours", cache=root / "cache", overrides=overrides
    )
    newest = request.param == "modelopt-0.47"
    more = "quantize.kv_cache.format=fp8" if newest else "quantize.keep=mtp.*"
    options = Options(**{**vars(options), "overrides": (*overrides, more)})
    build_variants(["qwen-nvfp4-text-mtp"], options)
    export(root / "theirs", None if newest else KEEP_043, kv_cache=newest)
    return root / "ours" / "qwen-nvfp4-text-mtp", root / "theirs"


def test_every_tensor_of_modelopts_export_is_ours_bit_for_bit(pair: tuple[Path, Path]) -> None:
    """Weights, block scales, second-level scales, input scales and what stays plain are equal."""
    ours, theirs = map(read_all_tensors, pair)
    different = [name for name, tensor in theirs.items() if ours.get(name) != tensor]

    assert [] == different
    assert len(theirs) >= 259


@pytest.mark.gpu
def test_a_gpu_sees_the_maxima_that_modelopt_sees_there(tmp_path: Path) -> None:
    """Every maximum, of weights and of activations, is that of modelopt on the same GPU.

    The scales made of them may be a unit in the last place apart: where modelopt divides a tensor
    on a GPU by a number, torch multiplies by the number's reciprocal.
    Maxima are BF16, which tells them from each other in spite of that.
    """
    import torch

    overrides = (
        f"calibration.samples={SAMPLES}",
        f"calibration.length={LENGTH}",
        "calibration.device=cuda",
    )
    options = Options(
        recipes=REPOSITORY / "recipes",
        out=tmp_path / "ours",
        cache=tmp_path / "cache",
        overrides=overrides,
    )
    build_variants([VARIANT], options)
    export(tmp_path / "theirs", None, device="cuda")
    ours, theirs = map(read_all_tensors, (tmp_path / "ours" / VARIANT, tmp_path / "theirs"))
    scales = [name for name in theirs if name.endswith(("input_scale", "weight_scale_2"))]

    assert 100 == len(scales)
    for name in scales:
        one, other = (
            torch.frombuffer(bytearray(tensors[name].data), dtype=torch.float32) * 6 * 448
            for tensors in (ours, theirs)
        )
        assert torch.equal(one.bfloat16(), other.bfloat16()), name


def test_only_the_mtp_head_is_ours_alone(pair: tuple[Path, Path]) -> None:
    """transformers drops the 15 tensors of the MTP head; nothing else differs in names."""
    ours, theirs = map(read_all_tensors, pair)
    alone = set(ours) - set(theirs)

    assert 15 == len(alone)
    assert all(name.startswith("mtp.") for name in alone)
    assert {"BF16"} == {ours[name].dtype for name in alone}


def test_the_configs_say_what_modelopts_say(pair: tuple[Path, Path]) -> None:
    """Only the ignore lists differ: ours also names the MTP head, the tower, and what is fused.

    The library saw the text model alone; an engine builds the tower that `vision_config` is about.
    """
    ours, theirs = (read_json(folder / "config.json")["quantization_config"] for folder in pair)
    more = set(ours.pop("ignore")) - set(theirs.pop("ignore"))

    assert theirs == ours
    assert all(
        name.startswith(("mtp.", "model.visual.")) or name.endswith("in_proj_ba") for name in more
    )
    assert {"mtp.fc", "mtp.layers.0.self_attn.qkv_proj", "mtp.layers.0.mlp.gate_up_proj"} <= more


def test_hf_quant_config_excludes_what_config_json_ignores(pair: tuple[Path, Path]) -> None:
    """Both files of the folder carry one list."""
    ours, theirs = (read_json(folder / "hf_quant_config.json") for folder in pair)
    ignore = read_json(pair[0] / "config.json")["quantization_config"]["ignore"]

    assert ignore == ours["quantization"].pop("exclude_modules")
    assert set(theirs["quantization"].pop("exclude_modules")) <= set(ignore)
    assert theirs == ours


def test_a_tied_head_is_excluded_as_modelopt_does(small: Project) -> None:
    """modelopt lists the head though its export has no tensor of it, and so do we."""
    tie(small.base)
    export(small.root / "theirs", None, small.base)
    theirs = read_json(small.root / "theirs" / "hf_quant_config.json")["quantization"]
    (plan,) = plan_variants([VARIANT], small.options(overrides=QUICK)).variants

    assert "lm_head" in theirs["exclude_modules"]
    assert not any("lm_head" in name for name in read_all_tensors(small.root / "theirs"))
    assert set(theirs["exclude_modules"]) <= set(plan.conversion.ignored)


def test_the_keep_list_of_0_47_is_that_of_the_installed_modelopt() -> None:
    """Every pattern that NVFP4_DEFAULT_CFG disables is in our list, and no other."""
    import modelopt.torch.quantization as mtq

    from carnice_build.models.kept import KEEP_LISTS

    disabled = {
        entry["quantizer_name"]
        for entry in mtq.NVFP4_DEFAULT_CFG["quant_cfg"]
        if entry.get("enable") is False and entry["quantizer_name"] != "*"
    }

    assert disabled == set(KEEP_LISTS["modelopt-0.47"])
