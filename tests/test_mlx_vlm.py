"""With `target: mlx-vlm`, a variant is what `mlx_vlm.convert --mtp` makes: a model, and a drafter.

What mlx-vlm itself has to say is in `test_mlx_vlm_parity`; nothing here needs it.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from conftest import REPOSITORY, Project
from mlx_vlm_families import Zoo, built, config_of, families, options_for
from tiny import Tensor, read_all_tensors, write_json

from carnice_build.commands.build import build_variants
from carnice_build.commands.explain import explain_variants
from carnice_build.commands.verify import VerifySettings, verify_variants
from carnice_build.dtypes import TensorSpec
from carnice_build.errors import PlanError
from carnice_build.formats.mlx.names import drafter_table
from carnice_build.formats.mlx.table import FOLDERS, table_of, trace_of
from carnice_build.formats.mlx.target import Target
from carnice_build.formats.mlx.trace import as_params
from carnice_build.keys import canonical_json
from carnice_build.models import architecture_of
from carnice_build.store.digests import digest_bytes

pytest.importorskip("transformers")


def test_one_recipe_makes_model_and_drafter(project: Project, vlm_zoo: Zoo) -> None:
    """The tower is with the model, the head alone in the other folder, under bare names."""
    model, drafter = map(read_all_tensors, built(project, vlm_zoo("qwen3_5")))

    assert "vision_tower.blocks.0.attn.qkv.weight" in model
    assert not [name for name in model if "mtp" in name]
    assert {"fc", "layers", "norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden"} == {
        name.partition(".")[0] for name in drafter
    }


def test_both_folders_are_listed_and_found_again(project: Project, vlm_zoo: Zoo) -> None:
    """A build tells of both, and a second one has nothing to do for either."""
    options = options_for(project, vlm_zoo("qwen3_5"))
    first = build_variants(["seeing"], options)
    second = build_variants(["seeing"], options)

    assert ["seeing", "seeing-mtp"] == [item.variant for item in first.variants]
    assert [True, True] == [item.packaged for item in first.variants]
    assert [False, False] == [item.packaged for item in second.variants]
    assert 0 == second.actions_run


def test_another_number_of_bits_for_the_head_makes_the_drafter_alone_anew(
    project: Project, vlm_zoo: Zoo
) -> None:
    """What the model is made of stays as it is."""
    folder = vlm_zoo("qwen3_5")
    built(project, folder)
    result = build_variants(["seeing"], options_for(project, folder, quantize={"mtp": 8}))
    runs = {item.variant: item.actions_run for item in result.variants}

    assert 0 == runs["seeing"]
    assert 0 < runs["seeing-mtp"]
    assert 8 == config_of(project.out / "seeing-mtp")["quantization"]["bits"]


def test_the_key_that_says_the_drafters_bits_explains_them(project: Project, vlm_zoo: Zoo) -> None:
    """Not that of the model's bits, from which they were taken before."""
    folder = vlm_zoo("qwen3_5")
    built(project, folder)
    options = replace(options_for(project, folder), overrides=("quantize.mtp=8",))
    _, drafter = explain_variants(["seeing"], options)

    assert ["bits 4 -> 8"] == [reason.cause for reason in drafter.reasons]
    assert ["--set quantize.mtp=8"] == [reason.where for reason in drafter.reasons]


def test_a_plain_head_keeps_its_numbers(project: Project, vlm_zoo: Zoo) -> None:
    """Nothing of it is quantized, and config.json says nothing of that."""
    folder = vlm_zoo("qwen3_5")
    _, drafter = built(project, folder, quantize={"mtp": "plain"})
    source, found = read_all_tensors(folder), read_all_tensors(drafter)

    assert source["mtp.fc.weight"] == found["fc.weight"]
    assert 15 == len(found)
    assert "quantization" not in config_of(drafter)


@pytest.mark.parametrize("case", ["qwen3_5", "qwen3_5_moe", "gemma3", "gemma4", "gemma4_moe"])
def test_folders_verify(project: Project, vlm_zoo: Zoo, case: str) -> None:
    """Structure, digests and round trip of all folders."""
    options = options_for(project, vlm_zoo(case))
    build_variants(["seeing"], options)
    result = verify_variants(["seeing"], options, VerifySettings(run=False))

    assert result.passed, [check for variant in result.variants for check in variant.checks]
    drafted = case.startswith("qwen")
    assert ["seeing", *(["seeing-mtp"] if drafted else [])] == [
        variant.variant for variant in result.variants
    ]


def test_a_tower_that_was_dropped_is_not_missed(project: Project, vlm_zoo: Zoo) -> None:
    """mlx-vlm runs the text model without, with the drafter."""
    steps = [{"drop": {"match": "model.visual.*"}}]
    options = options_for(project, vlm_zoo("qwen3_5"), steps=steps)
    build_variants(["seeing"], options)

    assert verify_variants(["seeing"], options, VerifySettings(run=False)).passed
    tensors = read_all_tensors(project.out / "seeing")
    assert not [name for name in tensors if name.startswith("vision_tower")]


def test_without_a_head_there_is_no_drafter(project: Project, vlm_zoo: Zoo) -> None:
    """A recipe that says what becomes of the head is refused then, where it says so."""
    steps = [{"drop": {"match": "mtp.*"}}]
    _, drafter = built(project, vlm_zoo("qwen3_5"), steps=steps)

    assert not drafter.exists()
    with pytest.raises(PlanError, match="there is no MTP head") as caught:
        built(project, vlm_zoo("qwen3_5"), steps=steps, quantize={"mtp": 4})
    assert "seeing.yaml" in str(caught.value)


@pytest.mark.parametrize(
    ("case", "quantize", "words"),
    [
        ("qwen3_5", {"target": "mlx-lm", "mtp": 4}, "mlx-lm has no use for an MTP head"),
        ("gemma3", {"mtp": 4}, "mlx-vlm makes no drafter of a model of gemma3"),
    ],
)
def test_a_head_that_cannot_draft_is_refused(
    project: Project, vlm_zoo: Zoo, case: str, quantize: dict[str, Any], words: str
) -> None:
    """In one sentence."""
    with pytest.raises(PlanError, match=words):
        built(project, vlm_zoo(case), quantize=quantize)


def test_a_recipe_of_the_drafters_name_is_refused(project: Project, vlm_zoo: Zoo) -> None:
    """Both would be one folder."""
    options = options_for(project, vlm_zoo("qwen3_5"))
    (project.recipes / "seeing-mtp.yaml").write_text("variant: seeing-mtp\n")
    with pytest.raises(PlanError, match="there is a recipe of that name"):
        build_variants(["seeing"], options)


def test_a_model_that_mlx_vlm_cannot_load_is_refused(project: Project, vlm_zoo: Zoo) -> None:
    """Its Gemma 4 is none without a tower."""
    folder = vlm_zoo("gemma4")
    config = config_of(folder)
    source = project.root / "blind"
    source.mkdir()
    for path in folder.iterdir():
        (source / path.name).symlink_to(path)
    (source / "config.json").unlink()
    write_json(source / "config.json", {**config, "vision_config": None, "audio_config": None})
    match = ["model.vision_tower.*", "model.embed_vision.*", "model.audio_tower.*"]
    steps = [{"drop": {"match": [*match, "model.embed_audio.*"]}}]
    with pytest.raises(PlanError, match="no section vision_config"):
        built(project, source, steps=steps)


def test_a_head_that_is_never_tied_is_the_embedding(project: Project, vlm_zoo: Zoo) -> None:
    """mlx-vlm's Gemma 3 has a head of its own, of the same numbers."""
    model, _ = built(project, vlm_zoo("gemma3"))
    tensors = read_all_tensors(model)

    def module(name: str) -> list[Tensor]:
        return [tensors[f"language_model.{name}.{part}"] for part in ("weight", "scales", "biases")]

    assert module("model.embed_tokens") == module("lm_head")


GOLDEN = json.loads((REPOSITORY / "tests" / "golden" / "mlx_vlm.json").read_text())


@pytest.mark.parametrize("name", GOLDEN)
def test_tables_say_what_they_said_when_they_were_held_against_mlx_vlm(name: str) -> None:
    """Of models at full size: names, types, shapes, steps and modules, as one digest.

    To be renewed only where `test_mlx_vlm_parity` passes.
    """
    shapes = json.loads((REPOSITORY / "benchmarks" / "shapes" / f"{name}.json").read_text())
    architecture = architecture_of(shapes["config"], name)
    specs = {key: TensorSpec("BF16", fact.shape) for key, fact in architecture.tensors.items()}
    found = {}
    tables = {
        "model": table_of(architecture.name, Target.MLX_VLM),
        "drafter": drafter_table(architecture),
    }
    for kind, table in tables.items():
        if table is None:
            continue
        trace = trace_of(table, specs, architecture.tensors, architecture.dtype)
        rows = [
            [item.name, item.spec.dtype, list(item.spec.shape), as_params(item.steps)]
            for item in trace.tensors
        ]
        found[kind] = digest_bytes(canonical_json([rows, trace.modules]).encode())

    assert GOLDEN[name] == found


def test_cases_are_of_the_families_that_are_promised() -> None:
    """Every one that has a table is tried."""
    tables = {path.stem for path in FOLDERS[Target.MLX_VLM].glob("*.yaml")}

    assert tables - {"qwen3_5_mtp"} == {item.model_type for item in families().values()}
