"""What no GGUF file can be made of ends in one error with exit code 2, before anything is read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY, Finished, Project
from gguf_project import stand_in
from test_bad_input import check_refused_at_once
from tiny import read_json, write_json

from carnice_build.commands.plan import plan_variants
from carnice_build.formats.gguf.table import table_of

Carnice = Callable[..., Finished]


@pytest.fixture
def project(project: Project) -> Project:
    """With the stand-in that ships, and shapes at full size."""
    stand_in(project)
    shutil.copy(REPOSITORY / "demo" / "heldout.txt", project.root / "demo")
    shutil.copy(REPOSITORY / "recipes" / "_profiles.yaml", project.recipes)
    (project.root / "benchmarks").symlink_to(REPOSITORY / "benchmarks")
    return project


RECIPE = """\
extends: _base/carnice-text.yaml
variant: {name}
description: A
quantize: {knobs}
"""


def write(project: Project, name: str, knobs: str = "{format: gguf}", more: str = "") -> None:
    """Write a recipe."""
    project.recipe(name, RECIPE.format(name=name, knobs=knobs) + more)


def refused(
    project: Project, carnice: Carnice, *parts: str, knobs: str = "{format: gguf}", more: str = ""
) -> None:
    """Neither planned nor built."""
    write(project, "bad", knobs, more)
    for command in ("plan", "build"):
        check_refused_at_once(carnice(command, "bad"), project, *parts)


KNOBS: dict[str, tuple[str, tuple[str, ...]]] = {
    "a mix that nobody has": (
        "{format: gguf, mix: Q4_K_N}",
        ("bad.yaml:4:31: quantize.mix: there is no mix 'Q4_K_N'; did you mean 'Q4_K",),
    ),
    "a mix like none": (
        "{format: gguf, mix: best}",
        ("quantize.mix: there is no mix 'best', expected F32, F16, BF16, Q8_0",),
    ),
    "a label that is taken for a projector's": (
        "{format: gguf, label: mmproj-Q8}",
        ("bad.yaml:4:33: quantize.label: 'mmproj-Q8' is no label by which llama.cpp would find",),
    ),
    "a type for products alone": (
        "{format: gguf, rules: [{match: lm_head, type: Q8_1}]}",
        ("quantize.rules.0.type: weights cannot have the type 'Q8_1'; did you mean 'Q8_0'?",),
    ),
    "a rule without a type": (
        "{format: gguf, rules: [{match: lm_head}]}",
        ("bad.yaml:4:34: says nothing; expected `type` or `skip`",),
    ),
    "a rule for no module": (
        "{format: gguf, rules: [{match: lm_haed, type: F16}]}",
        ("lm_haed matches no module; did you mean 'lm_head'?",),
    ),
    "a pre-tokenizer that nobody has": (
        "{format: gguf, tokenizer_pre: qwen53}",
        ("llama.cpp has no pre-tokenizer 'qwen53'", "did you mean 'qwen35'?"),
    ),
    "two bits without importance": (
        "{format: gguf, mix: IQ2_XS}",
        ("bad.yaml:4:31: IQ2_XS is of no use for blk.", "without its importance; expected `imatr"),
    ),
    "the same by a rule": (
        "{format: gguf, rules: [{match: '*.layers.1.mlp.down_proj', type: IQ2_XXS}]}",
        ("bad.yaml:4:76: IQ2_XXS is of no use for blk.1.ffn_down.weight without its importance",),
    ),
    "a type that a mix of floats does not give": (
        "{format: gguf, mix: BF16, rules: [{match: '*.down_proj', type: Q8_0}]}",
        ("blk.0.ffn_down.weight stays BF16: llama-quantize does not make it Q8_0",),
    ),
    "a type for norms alone": (
        "{format: gguf, rules: [{match: '*.input_layernorm', type: Q8_0}]}",
        ("blk.0.attn_norm.weight stays F32: llama-quantize does not make it Q8_0",),
    ),
    "a type for what has no weight": (
        "{format: gguf, rules: [{match: '*.layers.0.linear_attn', type: Q8_0}]}",
        ("bad.yaml:4:34: model.language_model.layers.0.linear_attn has no weight that could be Q",),
    ),
    "blocks that columns of the head do not fill": (
        "{format: gguf, rules: [{match: lm_head, type: Q6_K}]}",
        ("bad.yaml:4:33: output.weight cannot have the type Q6_K: its 128 columns are not whole",),
    ),
    "importance for floats": (
        "{format: gguf, mix: BF16, imatrix: {file: nowhere.gguf}}",
        ("bad.yaml:4:46: nothing is quantized by importance in BF16; expected no `imatrix`, or",),
    ),
    "a projector in blocks": (
        "{format: gguf, projector: Q8_0}",
        ("quantize.projector: Input should be 'F16', 'BF16' or 'F32' (got 'Q8_0')",),
    ),
    "importance of nothing": (
        "{format: gguf, imatrix: calibration}",
        ("bad.yaml:4:35: ", "needs a section `calibration`"),
    ),
    "importance that is a text": (
        "{format: gguf, imatrix: {file: demo/heldout.txt}}",
        ("bad.yaml:4:35: imatrix: ", "demo/heldout.txt: is no importance matrix"),
    ),
    "importance that is nowhere": (
        "{format: gguf, imatrix: {file: nowhere.gguf}}",
        ("bad.yaml:4:35: imatrix: ", "nowhere.gguf: cannot read the file"),
    ),
    "a file of importance by its name alone": (
        "{format: gguf, imatrix: some.gguf}",
        (
            "bad.yaml:4:35: quantize.imatrix: Input should be 'calibration', or a file as "
            "`{file: NAME.gguf}` (got 'some.gguf')",
        ),
    ),
    "importance from a calibration, misspelt": (
        "{format: gguf, imatrix: calibraton}",
        ("(got 'calibraton'); did you mean 'calibration'?",),
    ),
}


@pytest.mark.parametrize("case", KNOBS)
def test_knobs_that_say_nothing_are_refused(project: Project, carnice: Carnice, case: str) -> None:
    """Where they stand, with the nearest name that means something."""
    knobs, parts = KNOBS[case]
    refused(project, carnice, *parts, knobs=knobs)


def test_files_that_a_tensor_does_not_fit_into_are_refused(
    project: Project, carnice: Carnice
) -> None:
    """By the tensor's name and size; one of just that size is large enough."""
    refused(
        project,
        carnice,
        "bad.yaml:5:18: files of 100 kB are too small for output.weight; expected 279 kB or more",
        more="package: {shard: 100kB}\n",
    )
    write(project, "split", more="package: {shard: 278528}\n")
    (plan,) = plan_variants(["split"], project.options()).variants
    assert len(plan.packs) > 1


def test_the_size_that_is_expected_is_enough(project: Project, carnice: Carnice) -> None:
    """Also where three digits of it, 524 kB, would be less."""
    path = project.recipes / "bad.yaml"
    write(project, "bad", "{format: gguf, mix: BF16}", "package: {shard: 500kB}\n")
    first = carnice("plan", "bad")
    path.write_text(path.read_text().replace("500kB", "524288 B"))

    assert "expected 524288 B or more" in first.err
    assert 0 == carnice("plan", "bad").code


def tokenizer(project: Project, change: Callable[[dict[str, Any]], None]) -> Path:
    """Change the tokenizer of the Carnice stand-in."""
    path = project.checkpoint / "tokenizer.json"
    content = read_json(path)
    change(content)
    write_json(path, content)
    return path


def test_a_tokenizer_that_splits_as_no_other_is_refused(project: Project, carnice: Carnice) -> None:
    """Unless the recipe says what llama.cpp calls it."""

    def split_otherwise(content: dict[str, Any]) -> None:
        text = json.dumps(content["pre_tokenizer"]).replace("(?i:'s|", "(?i:'z|")
        assert "(?i:'z|" in text
        content["pre_tokenizer"] = json.loads(text)

    tokenizer(project, split_otherwise)
    refused(project, carnice, "tokenizer.json", "tokenizer_pre")
    write(project, "told", "{format: gguf, tokenizer_pre: qwen35}")

    assert 0 == carnice("plan", "told").code


def test_a_tokenizer_without_merges_is_refused(project: Project, carnice: Carnice) -> None:
    """As a vocabulary alone would be read otherwise by llama.cpp."""
    tokenizer(project, lambda content: content["model"].update(merges=[]))
    refused(project, carnice, "tokenizer.json: has no merges")


def test_a_checkpoint_without_a_tokenizer_is_refused(project: Project, carnice: Carnice) -> None:
    """The file has to hold one; of shapes alone the size is told without it."""
    (project.checkpoint / "tokenizer.json").unlink()
    refused(project, carnice, "tokenizer.json")


def test_a_family_without_names_is_refused(
    project: Project, carnice: Carnice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its name, with the families that have some."""
    monkeypatch.setattr("carnice_build.formats.gguf.table.families", lambda: ["llama"])
    table_of.cache_clear()
    said = "GGUF has no names for tensors of qwen3_5; expected a model of llama"
    refused(project, carnice, said)


def test_columns_that_are_no_whole_blocks_are_told_of(project: Project) -> None:
    """As one notice for all that get the same other type, which llama-quantize gives them."""
    write(project, "notes", "{format: gguf, mix: Q6_K}")
    (plan,) = plan_variants(["notes"], project.options()).variants
    (notice,) = plan.notices

    assert notice.startswith(("output.weight and ", "token_embd.weight and "))
    assert notice.endswith(
        "more: 128 columns are not whole blocks of 256, as Q6_K has them; they get Q8_0"
    )


def test_shapes_alone_are_planned_without_a_vocabulary(project: Project, carnice: Carnice) -> None:
    """At full size, with a notice that it comes on top."""
    write(project, "bad", "{format: gguf, mix: Q5_K_M}")
    finished = carnice("plan", "bad", "--profile", "shapes", "--json")
    (variant,) = json.loads(finished.out)["variants"]

    assert 5.6 < variant["bits_per_weight"] < 5.8
    assert [True] == ["has no vocabulary" in notice for notice in variant["notices"]]
