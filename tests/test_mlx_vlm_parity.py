"""Folders for mlx-vlm hold what `mlx_vlm.convert --mtp` makes of the same source, byte for byte."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY, Project
from mlx_families import model_of
from mlx_vlm_families import Zoo, built, config_of, converted, families
from tiny import read_all_tensors

from carnice_build.commands.build import build_variants
from carnice_build.commands.verify import VerifySettings, verify_variants
from carnice_build.dtypes import TensorSpec
from carnice_build.formats.mlx.conversion import Fused, Numbered, told
from carnice_build.formats.mlx.table import table_of, trace_of
from carnice_build.formats.mlx.target import Target
from carnice_build.formats.mlx.trace import Trace, parsed
from carnice_build.models import architecture_of

pytest.importorskip("mlx_vlm")

DRAFTED = ("qwen3_5", "qwen3_5_moe")

every_case = pytest.mark.parametrize("case", families())


@every_case
def test_tensors_equal_those_of_mlx_vlm(project: Project, vlm_zoo: Zoo, case: str) -> None:
    """Names, types, shapes and bytes of all tensors agree, of the drafter too."""
    source = vlm_zoo(case)
    model, drafter = built(project, source)
    theirs = converted(source, project.root / "theirs")

    assert read_all_tensors(theirs) == read_all_tensors(model)
    assert (case in DRAFTED) == drafter.exists()
    if case in DRAFTED:
        assert read_all_tensors(project.root / "theirs-mtp") == read_all_tensors(drafter)


@every_case
def test_config_equals_that_of_mlx_vlm(project: Project, vlm_zoo: Zoo, case: str) -> None:
    """config.json agrees, but for what the source says in another way than transformers does.

    mlx-vlm goes on to announce the MTP head, whose tensors are in the other folder.
    """
    source = vlm_zoo(case)
    model, drafter = built(project, source)
    theirs = converted(source, project.root / "theirs")
    expected, found = config_of(theirs), config_of(model)
    if case in DRAFTED:
        assert 1 == expected["text_config"].pop("mtp_num_hidden_layers")
        assert 0 == found["text_config"].pop("mtp_num_hidden_layers")
    for section in (expected, expected["text_config"]):
        if "torch_dtype" in section:
            section["dtype"] = section.pop("torch_dtype")

    assert plain(expected) == plain(found)
    if case in DRAFTED:
        expected, found = config_of(project.root / "theirs-mtp"), config_of(drafter)
        assert plain(expected) == plain(found)


def plain(config: dict[str, Any]) -> dict[str, Any]:
    """A config without what our own spelling adds to the source's, or leaves out, of no weight."""
    ours = ("tie_word_embeddings", "partial_rotary_factor", "full_attention_interval", "dtype")
    return {
        key: plain(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in ours and value is not None
    }


@pytest.mark.parametrize("case", ["qwen3_5", "gemma3"])
def test_mixed_bits_are_those_of_mlx_vlm(project: Project, vlm_zoo: Zoo, case: str) -> None:
    """The preset's rules choose as its predicate does, and the head stays as it is."""
    source = vlm_zoo(case)
    knobs = {"mtp": "plain"} if case in DRAFTED else {}
    extends = "preset:mlx-vlm-mixed_3_6"
    model, _ = built(project, source, extends=extends, quantize={"bits": 3, **knobs})
    settings = {"q_bits": None, "quant_predicate": "mixed_3_6"}
    theirs = converted(source, project.root / "theirs", **settings)

    assert read_all_tensors(theirs) == read_all_tensors(model)
    assert config_of(theirs)["quantization"] == config_of(model)["quantization"]
    if case in DRAFTED:
        drafter = project.out / "seeing-mtp"
        assert read_all_tensors(project.root / "theirs-mtp") == read_all_tensors(drafter)
        assert "quantization" not in config_of(drafter)


@pytest.mark.parametrize(
    ("case", "mode", "mtp"), [("qwen3_5_moe", "nvfp4", 4), ("gemma3", "mxfp8", None)]
)
def test_floats_are_those_of_mlx_vlm(
    project: Project, vlm_zoo: Zoo, case: str, mode: str, mtp: int | None
) -> None:
    """The model is of the mode; drafters are affine, of the bits that are said, or plain."""
    source = vlm_zoo(case)
    model, drafter = built(project, source, quantize={"bits": None, "mode": mode, "mtp": mtp})
    settings = {"q_bits": mtp, "q_mode": mode, "q_group_size": None}
    theirs = converted(source, project.root / "theirs", **settings)

    assert read_all_tensors(theirs) == read_all_tensors(model)
    assert config_of(theirs)["quantization"] == config_of(model)["quantization"]
    if case in DRAFTED:
        their_drafter = project.root / "theirs-mtp"
        assert read_all_tensors(their_drafter) == read_all_tensors(drafter)
        assert plain(config_of(their_drafter)) == plain(config_of(drafter))


def test_the_demo_is_what_mlx_vlm_makes_of_it(project: Project) -> None:
    """From the demo's base, with a processor that mlx-vlm loads."""
    source = REPOSITORY / "demo" / "qwen3.6-27b"
    model, drafter = built(project, source)
    theirs = converted(source, project.root / "theirs")

    assert read_all_tensors(theirs) == read_all_tensors(model)
    assert read_all_tensors(project.root / "theirs-mtp") == read_all_tensors(drafter)


@every_case
def test_a_table_equals_the_trace_of_its_family(vlm_zoo: Zoo, case: str) -> None:
    """Tensors, steps, types, and what is quantized how."""
    from carnice_build.backends.mlx_vlm_trace import trace

    config, architecture, specs = model_of(vlm_zoo(case))
    table = table_of(architecture.name, Target.MLX_VLM)
    assert table is not None
    ours = trace_of(table, specs, architecture.tensors, architecture.dtype)
    config = {**config, "torch_dtype": architecture.dtype}
    answer = parsed(trace(config, Numbered(specs).tensors))
    theirs = told(answer, {}) if isinstance(answer, Trace) else None
    if theirs is None:
        fused = Fused(specs, [architecture.tensors[name] for name in specs])
        second = parsed(trace(config, fused.tensors))
        assert isinstance(second, Trace)
        theirs = told(second, fused.parts)

    assert {item.name: item for item in theirs.tensors} == {
        item.name: item for item in ours.tensors
    }
    assert theirs.modules == ours.modules


@pytest.mark.parametrize("name", ["qwen3.6-27b", "qwen3.6-35b-a3b", "gemma-4-31b"])
def test_a_table_equals_the_trace_of_a_model_at_full_size(name: str) -> None:
    """The one whose digest `test_mlx_vlm` knows."""
    from carnice_build.backends.mlx_vlm_trace import trace

    path = REPOSITORY / "benchmarks" / "shapes" / f"{name}.json"
    config = json.loads(path.read_text())["config"]
    architecture = architecture_of(config, name)
    facts = architecture.tensors
    specs = {key: TensorSpec("BF16", fact.shape) for key, fact in facts.items()}
    table = table_of(architecture.name, Target.MLX_VLM)
    assert table is not None
    ours = trace_of(table, specs, facts, architecture.dtype)
    fused = Fused(specs, facts.values())
    answer = parsed(trace({**config, "torch_dtype": architecture.dtype}, fused.tensors))
    assert isinstance(answer, Trace)
    theirs = told(answer, fused.parts)

    assert {item.name: item for item in theirs.tensors} == {
        item.name: item for item in ours.tensors
    }
    assert theirs.modules == ours.modules


def test_a_family_without_a_table_is_asked_about(project: Project, tmp_path: Path) -> None:
    """mlx-vlm itself says what becomes of a model, as mlx-lm does."""
    from zoo import write_zoo

    source = write_zoo(tmp_path / "llama", "llama", "hub")
    model, _ = built(project, source)
    theirs = converted(source, project.root / "theirs")

    assert read_all_tensors(theirs) == read_all_tensors(model)


def test_model_and_drafter_run(project: Project) -> None:
    """mlx-vlm generates with both, its count of accepted drafts beside ours, which is near."""
    source = REPOSITORY / "demo" / "qwen3.6-27b"
    _, drafter = built(project, source, quantize={"mtp": "plain"})
    options = project.options(sources={"body": source})
    text = REPOSITORY / "demo" / "heldout.txt"
    settings = VerifySettings(text=text, samples=1, lengths=(256,))
    result = verify_variants(["seeing"], options, settings)

    assert drafter.exists()
    assert result.passed, [check for variant in result.variants for check in variant.checks]
    rows = {row.head: row.drafts[2].mean_length for row in result.acceptances}
    assert 1 == rows["no head"]
    assert 1 < rows["head as packaged"] <= 3
    # Some 25 rounds: the two begin alike, and the drafter's context differs a little later.
    assert abs(rows["prompt in one piece"] - rows["our own count"]) < 0.3


def test_the_tower_sees(project: Project) -> None:
    """mlx-vlm answers about a picture, with finite logits."""
    from importlib import import_module

    import mlx.core as mx
    import numpy as np
    from PIL import Image

    source = REPOSITORY / "demo" / "qwen3.6-27b"
    folder, _ = built(project, source)
    utils: Any = import_module("mlx_vlm.utils")
    model, processor = utils.load(str(folder))
    picture = Image.fromarray(np.arange(64 * 64 * 3, dtype=np.uint8).reshape(64, 64, 3))
    prompt = "<|vision_start|><|image_pad|><|vision_end|>What is this?"
    inputs = utils.prepare_inputs(processor, images=[picture], prompts=prompt)
    known = {key: value for key, value in inputs.items() if key != "attention_mask"}
    found = model(known.pop("input_ids"), known.pop("pixel_values"), None, **known)

    assert mx.isfinite(found.logits).all().item()


def test_a_second_build_asks_nobody(project: Project, vlm_zoo: Zoo) -> None:
    """What mlx-vlm was asked is remembered; a table asks never."""
    from carnice_build.commands.asking import Asking

    _, _ = built(project, vlm_zoo("qwen3_5"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Asking, "__call__", lambda *_: pytest.fail("mlx-vlm was asked"))
        options = project.options(sources={"body": vlm_zoo("qwen3_5")})
        assert 0 == build_variants(["seeing"], options).actions_run
