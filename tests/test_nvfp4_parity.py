"""NVFP4 builds of the demo checkpoints, held against modelopt's own quantization and export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from calibrating import QUICK, tie
from conftest import REPOSITORY, Project
from tiny import read_all_tensors, read_json

from carnice_build.commands.build import build_variants
from carnice_build.commands.options import Options
from carnice_build.commands.plan import plan_variants

pytest_plugins = ["calibrating"]

VARIANT = "qwen-nvfp4-text-mtp"
SAMPLES, LENGTH = 3, 96
BASE = REPOSITORY / "demo" / "qwen3.6-27b"

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
    """Our folder and modelopt's, of one checkpoint, one list of exceptions and one calibration."""
    root = tmp_path_factory.mktemp(request.param)
    overrides = (
        f"calibration.samples={SAMPLES}",
        f"calibration.length={LENGTH}",
        f"quantize.defaults={request.param}",
    )
    options = Options(
        recipes=REPOSITORY / "recipes", out=root / "ours", cache=root / "cache", overrides=overrides
    )
    if request.param == "modelopt-0.43":
        options = Options(**{**vars(options), "overrides": (*overrides, "quantize.keep=mtp.*")})
    build_variants(["qwen-nvfp4-text-mtp"], options)
    _export(root / "theirs", None if request.param == "modelopt-0.47" else KEEP_043)
    return root / "ours" / "qwen-nvfp4-text-mtp", root / "theirs"


def _export(folder: Path, keep: list[str] | None, base: Path = BASE) -> None:
    import modelopt.torch.quantization as mtq
    import torch
    from modelopt.torch.export import export_hf_checkpoint
    from transformers import AutoConfig, AutoTokenizer
    from transformers.models.qwen3_5 import Qwen3_5ForCausalLM

    config = AutoConfig.from_pretrained(base).text_config
    config.architectures = ["Qwen3_5ForCausalLM"]
    model = Qwen3_5ForCausalLM.from_pretrained(
        base,
        config=config,
        key_mapping={r"^model\.language_model\.": "model."},
        dtype=torch.bfloat16,
    )
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    lines = (REPOSITORY / "demo" / "calibration.jsonl").read_text().splitlines()[:SAMPLES]

    def loop(model: Any) -> None:
        for line in lines:
            row = json.loads(line)
            roles = {"human": "user", "gpt": "assistant"}
            turns = [
                {"role": roles.get(turn["from"], turn["from"]), "content": turn["value"]}
                for turn in row["conversations"]
            ]
            ids = tokenizer.apply_chat_template(turns, tools=row["tools"], return_dict=False)
            model(torch.tensor([ids[:LENGTH]]))

    settings = mtq.NVFP4_DEFAULT_CFG
    if keep is not None:
        enabled = [
            entry
            for entry in settings["quant_cfg"]
            if entry.get("enable", True) or entry["quantizer_name"] == "*"
        ]
        disabled = [{"quantizer_name": name, "enable": False} for name in keep]
        embedding = {"parent_class": "nn.Embedding", "quantizer_name": "*", "enable": False}
        settings = {**settings, "quant_cfg": [*enabled, *disabled, embedding]}
    mtq.quantize(model, settings, loop)
    export_hf_checkpoint(model, export_dir=folder)


def test_every_tensor_of_modelopts_export_is_ours_bit_for_bit(pair: tuple[Path, Path]) -> None:
    """Weights, block scales, second-level scales, input scales and what stays plain are equal."""
    ours, theirs = map(read_all_tensors, pair)
    different = [name for name, tensor in theirs.items() if ours.get(name) != tensor]

    assert [] == different
    assert len(theirs) >= 259


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
    _export(small.root / "theirs", None, small.base)
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
