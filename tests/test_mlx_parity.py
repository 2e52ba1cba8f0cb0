"""MLX folders hold what `mlx_lm.convert` makes of the same source, byte for byte."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import Project, TinyCheckpoint
from tiny import read_all_tensors

from carnice_build.commands.build import build_variants
from carnice_build.commands.diff import diff_folders

pytest.importorskip("mlx_lm")

REPAIRED = {"prefix": False, "mtp": True}
UNIFORM = {"mlx-4bit": 4, "mlx-6bit": 6}
MODES = {"mlx-mxfp4": "mxfp4", "mlx-nvfp4": "nvfp4", "mlx-mxfp8": "mxfp8"}
MIXED = ("mlx-mixed_2_6", "mlx-mixed_3_4", "mlx-mixed_3_6", "mlx-mixed_4_6")


def with_tokenizer(folder: Path) -> Path:
    """Add the smallest tokenizer that mlx_lm loads."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({"a": 0, "<eos>": 1}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)
    return folder


def converted(source: Path, target: Path, **settings: Any) -> Path:
    """The folder that mlx-lm makes of `source`."""
    from mlx_lm.convert import convert

    convert(str(source), str(target), quantize=True, **settings)
    return target


def settings_of(variant: str) -> dict[str, Any]:
    if variant in UNIFORM:
        return {"q_bits": UNIFORM[variant]}
    if variant in MODES:
        return {"q_mode": MODES[variant]}
    return {"quant_predicate": variant.removeprefix("mlx-")}


@pytest.mark.parametrize("variant", [*UNIFORM, *MODES, *MIXED])
@pytest.mark.parametrize("float32", [False, True])
def test_tensors_equal_those_of_mlx_lm(
    project: Project, tiny_checkpoint: TinyCheckpoint, variant: str, float32: bool
) -> None:
    """Names, types, shapes and bytes of all tensors agree, from a BF16 and from an F32 state."""
    source = with_tokenizer(tiny_checkpoint(project.root / "source", float32=float32, **REPAIRED))
    build_variants([variant], project.options(sources={"body": source}))
    theirs = converted(source, project.root / "theirs", **settings_of(variant))

    assert read_all_tensors(theirs) == read_all_tensors(project.out / variant)


@pytest.mark.parametrize(
    ("variant", "tied"),
    [
        ("mlx-4bit", False),
        ("mlx-mixed_3_6", False),
        ("mlx-4bit", True),
        *((variant, False) for variant in MODES),
    ],
)
def test_config_equals_that_of_mlx_lm(
    project: Project, tiny_checkpoint: TinyCheckpoint, variant: str, tied: bool
) -> None:
    """config.json agrees but for three things, of which mlx-lm's is wrong.

    It writes null group sizes, renames `rope_type` in passing, and goes on to announce the MTP
    head whose tensors it dropped.
    """
    source = with_tokenizer(tiny_checkpoint(project.root / "source", tied=tied, **REPAIRED))
    build_variants([variant], project.options(sources={"body": source}))
    theirs = converted(source, project.root / "theirs", **settings_of(variant))
    expected = json.loads((theirs / "config.json").read_text())
    found = json.loads((project.out / variant / "config.json").read_text())
    for key in ("quantization", "quantization_config"):
        for item in expected[key].values():
            if isinstance(item, dict):
                item["group_size"] = item["group_size"] or 64
    text = expected["text_config"]
    text["rope_parameters"]["rope_type"] = text["rope_parameters"].pop("type")

    assert 1 == text.pop("mtp_num_hidden_layers")
    assert 0 == found["text_config"].pop("mtp_num_hidden_layers")
    assert expected == found


@pytest.mark.parametrize("variant", ["mlx-4bit", "mlx-mixed_3_6"])
def test_a_tied_head_gives_mlx_lms_tensors(
    project: Project, tiny_checkpoint: TinyCheckpoint, variant: str
) -> None:
    """The embedding alone is there, with its own bits; a rule for the head has nothing to do."""
    source = with_tokenizer(tiny_checkpoint(project.root / "source", tied=True, **REPAIRED))
    build_variants([variant], project.options(sources={"body": source}))
    theirs = converted(source, project.root / "theirs", **settings_of(variant))

    assert read_all_tensors(theirs) == read_all_tensors(project.out / variant)


def test_group_size_is_a_knob_too(project: Project, tiny_checkpoint: TinyCheckpoint) -> None:
    """Groups of 32 and of 128 agree with mlx-lm as well."""
    source = with_tokenizer(tiny_checkpoint(project.root / "source", **REPAIRED))
    for group in (32, 128):
        options = project.options(
            sources={"body": source}, overrides=(f"quantize.group_size={group}",)
        )
        build_variants(["mlx-4bit"], options)
        theirs = converted(source, project.root / f"theirs{group}", q_bits=4, q_group_size=group)

        assert read_all_tensors(theirs) == read_all_tensors(project.out / "mlx-4bit")


def test_a_repaired_prefix_gives_the_same_tensors(
    project: Project, tiny_checkpoint: TinyCheckpoint
) -> None:
    """The prefix quirk and its repair leave no trace in the output."""
    plain = tiny_checkpoint(seed=3, mtp=False)
    quirky = tiny_checkpoint(seed=3, mtp=False, prefix=True, shards=3)
    folders = []
    for source in (plain, quirky):
        build_variants(["mlx-mixed_3_6"], project.options(sources={"body": source}))
        folders.append(read_all_tensors(project.out / "mlx-mixed_3_6"))
        shutil.rmtree(project.out)

    assert folders[0] == folders[1]


def test_the_folder_loads_and_generates(project: Project, tiny_checkpoint: TinyCheckpoint) -> None:
    """mlx_lm loads a mixed variant strictly and runs it."""
    import mlx.core as mx
    from mlx_lm import load

    source = with_tokenizer(tiny_checkpoint(project.root / "source", **REPAIRED))
    build_variants(["mlx-mixed_3_6"], project.options(sources={"body": source}))
    model, _ = load(str(project.out / "mlx-mixed_3_6"))
    logits = model(mx.array([[1, 2, 3]]))

    assert logits.shape == (1, 3, 256)
    assert mx.isfinite(logits).all().item()


BY_RULE = (
    'quantize.rules=[{match: "*.down_proj", mode: mxfp8}, {match: lm_head, mode: affine, bits: 6}, '
    '{match: "*.v_proj", mode: nvfp4}, {match: "*.k_proj", skip: true}]'
)


def test_modes_by_rule_give_mlx_lms_folder_which_it_runs(
    project: Project, tiny_checkpoint: TinyCheckpoint
) -> None:
    """Of four modes and a module that is left alone, each module is listed as mlx-lm lists it."""
    import mlx.core as mx
    from mlx_lm import load

    chosen = {
        "down_proj": {"group_size": 32, "bits": 8, "mode": "mxfp8"},
        "v_proj": {"group_size": 16, "bits": 4, "mode": "nvfp4"},
        "lm_head": {"group_size": 64, "bits": 6, "mode": "affine"},
        "k_proj": False,
    }
    rest = {"group_size": 32, "bits": 4, "mode": "mxfp4"}
    source = with_tokenizer(tiny_checkpoint(project.root / "source", **REPAIRED))
    build_variants(["mlx-mxfp4"], project.options(sources={"body": source}, overrides=(BY_RULE,)))
    theirs = converted(
        source,
        project.root / "theirs",
        q_mode="mxfp4",
        quant_predicate=lambda path, _: chosen.get(path.rpartition(".")[2], rest),
    )
    ours = project.out / "mlx-mxfp4"

    assert read_all_tensors(theirs) == read_all_tensors(ours)
    sections = [
        json.loads((folder / "config.json").read_text())["quantization"]
        for folder in (theirs, ours)
    ]
    assert sections[0] == sections[1]
    stored = {(item.a.storage, item.state) for item in diff_folders(theirs, ours, jobs=1).modules}
    same = {"MXFP4 g32", "MXFP8 g32", "NVFP4 g16", "6-bit g64", "BF16", "F32"}
    assert {(storage, "same") for storage in same} == stored
    model, _ = load(str(ours))
    assert mx.isfinite(model(mx.array([[1, 2, 3]]))).all().item()
