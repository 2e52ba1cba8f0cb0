"""Checkpoints of families without a table: what their names and shapes alone allow."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import REPOSITORY, Finished, Project
from family_builds import INT4_WEIGHTS
from test_bad_input import check_refused_at_once
from tiny import Tensor, bf16, read_all_tensors, read_json, write_json, write_shards
from transformers import GPTJConfig, GPTJForCausalLM

from carnice_build.commands.build import build_variants
from carnice_build.commands.plan import plan_variants
from carnice_build.commands.verify import VerifySettings, verify_variants
from carnice_build.verification.result import Outcome

Carnice = Callable[..., Finished]

EXPERTS, LAYERS, HIDDEN, INNER = 3, 2, 128, 256
DEMO = REPOSITORY / "demo" / "qwen3.6-27b"

FP8 = "quantize: {format: compressed-tensors, scheme: FP8_DYNAMIC}"
INT4 = """
quantize:
  format: compressed-tensors
  algorithm: nearest
  targets: [Linear]
  config_groups:
    group_0:
      targets: [Linear]
      weights: {num_bits: 4, symmetric: false, strategy: group, group_size: 128}
  ignore: ['re:.*lm_head', 're:.*gate$', 're:.*vision.*']
"""
AUTOROUND = "quantize: {format: autoround, method: nearest}"
RECIPES = {"fp8": FP8, "w4a16": INT4, "int4": AUTOROUND}
CONFIG = {
    "architectures": ["MysteryForCausalLM"],
    "model_type": "mystery",
    "auto_map": {"AutoModelForCausalLM": "modeling_mystery.MysteryForCausalLM"},
    "dtype": "bfloat16",
    "hidden_size": HIDDEN,
    "vocab_size": 512,
}


def shapes(*, fused: bool = False) -> dict[str, tuple[int, ...]]:
    """A model with a router, experts, a vision tower and names of its own."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (512, HIDDEN)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        found[f"{prefix}norm.weight"] = (HIDDEN,)
        found[f"{prefix}attn.qkv.weight"] = (3 * HIDDEN, HIDDEN)
        found[f"{prefix}attn.qkv.bias"] = (3 * HIDDEN,)
        found[f"{prefix}moe.gate.weight"] = (EXPERTS, HIDDEN)
        if fused:
            found[f"{prefix}moe.experts.gate_up_proj"] = (EXPERTS, 2 * INNER, HIDDEN)
            found[f"{prefix}moe.experts.down_proj"] = (EXPERTS, HIDDEN, INNER)
            continue
        for expert in range(EXPERTS):
            for name in ("gate_proj", "up_proj"):
                found[f"{prefix}moe.experts.{expert}.{name}.weight"] = (INNER, HIDDEN)
            found[f"{prefix}moe.experts.{expert}.down_proj.weight"] = (HIDDEN, INNER)
    found["vision_tower.blocks.0.fc.weight"] = (HIDDEN, HIDDEN)
    found["lm_head.weight"] = (512, HIDDEN)
    return found


def write_mystery(folder: Path, *, fused: bool = False) -> Path:
    """A checkpoint with seeded random weights and the demo's tokenizer."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    tensors = {
        name: Tensor("BF16", shape, bf16(random.standard_normal(shape, dtype=np.float32)))
        for name, shape in shapes(fused=fused).items()
    }
    write_json(folder / "config.json", CONFIG)
    write_shards(folder, tensors, 1)
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
        shutil.copyfile(DEMO / name, folder / name)
    return folder


def recipes(project: Project, **more: str) -> None:
    """Recipes of each format for the model `mystery`."""
    for variant, quantize in {**RECIPES, **more}.items():
        text = f"variant: {variant}\ndescription: A\nsources: {{body: {{model: a/mystery}}}}\n"
        project.recipe(variant, text + quantize)


@pytest.fixture
def mystery(project: Project) -> Path:
    """The checkpoint, with one tensor an expert."""
    recipes(project)
    return write_mystery(project.root / "mystery")


def build(project: Project, folder: Path, *names: str) -> dict[str, dict[str, Tensor]]:
    """The tensors of variants, built from `folder`."""
    build_variants(list(names), project.options(sources={"body": folder}))
    return {name: read_all_tensors(project.out / name) for name in names}


def model_free(folder: Path, scheme: Any, ignore: list[str]) -> dict[str, Tensor]:
    """What llm-compressor makes of a checkpoint that it knows nothing of either."""
    from llmcompressor import model_free_ptq

    out = folder.with_name("model-free")
    model_free_ptq(folder, out, scheme=scheme, ignore=ignore)
    return read_all_tensors(out)


LEFT = ["lm_head", "re:.*embed_tokens", "re:.*gate$", "re:.*vision.*"]


@pytest.mark.parametrize("fused", [False, True])
def test_fp8_is_that_of_model_free_ptq(project: Project, fused: bool) -> None:
    """Every tensor, experts in one tensor taken apart as the library does."""
    recipes(project)
    folder = write_mystery(project.root / "mystery", fused=fused)
    ours = build(project, folder, "fp8")["fp8"]

    assert model_free(folder, "FP8_DYNAMIC", LEFT) == ours


@pytest.mark.parametrize("fused", [False, True])
def test_int4_is_that_of_model_free_ptq(project: Project, fused: bool) -> None:
    """The same, packed in groups with zero points."""
    from compressed_tensors.quantization import QuantizationScheme

    recipes(project)
    folder = write_mystery(project.root / "mystery", fused=fused)
    ours = build(project, folder, "w4a16")["w4a16"]
    scheme = QuantizationScheme.model_validate({"targets": ["Linear"], "weights": INT4_WEIGHTS})

    assert model_free(folder, scheme, LEFT) == ours


def test_both_spellings_of_experts_are_one_to_the_cache(project: Project, mystery: Path) -> None:
    """What one expert a tensor made is found for the same weights in one tensor."""
    build(project, mystery, "fp8", "int4")
    source = read_all_tensors(mystery)
    fused = project.root / "fused"
    shutil.copytree(mystery, fused)
    tensors = {name: item for name, item in source.items() if ".experts." not in name}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}.moe.experts."
        parts = {
            "gate_up_proj": ("gate_proj", "up_proj"),
            "down_proj": ("down_proj",),
        }
        for name, projections in parts.items():
            data = b"".join(
                source[f"{prefix}{expert}.{projection}.weight"].data
                for expert in range(EXPERTS)
                for projection in projections
            )
            shape = shapes(fused=True)[prefix + name]
            tensors[prefix + name] = Tensor("BF16", shape, data)
    write_shards(fused, tensors, 1)
    first = {name: project.built(name) for name in ("fp8", "int4")}
    result = build_variants(["fp8", "int4"], project.options(sources={"body": fused}))

    assert 0 == result.actions_run
    for variant, files in first.items():
        found = project.built(variant)
        shards = [name for name in files if name.endswith("safetensors")]
        assert {shard: files[shard] for shard in shards} == {
            shard: found[shard] for shard in shards
        }


def test_the_plan_says_what_is_not_checked(
    project: Project, carnice: Carnice, mystery: Path
) -> None:
    """In one line, and with the model's type."""
    said = carnice("plan", "fp8", "--source", f"body={mystery}")
    plan = plan_variants(["fp8"], project.options(sources={"body": mystery}))

    assert "mystery has no table here" in " ".join(said.out.split())
    assert 1 == len(plan.variants[0].notices)


def test_a_stack_of_experts_is_one_action(project: Project, mystery: Path) -> None:
    """However many there are."""
    (variant,) = plan_variants(["fp8"], project.options(sources={"body": mystery})).variants
    quantized = [item for item in variant.actions.values() if item.op.name.startswith("fp8")]

    assert LAYERS * 4 == len(quantized)


def test_what_is_built_passes_its_checks(project: Project, mystery: Path) -> None:
    """All but running it, which takes a table."""
    build(project, mystery, *RECIPES)
    options = project.options(sources={"body": mystery})
    result = verify_variants(list(RECIPES), options, VerifySettings(run=True))

    for variant in result.variants:
        outcomes = {check.name: check.outcome for check in variant.checks}
        assert Outcome.FAILED not in outcomes.values(), variant.checks
        assert Outcome.PASSED is outcomes["round trip"]
        assert Outcome.PASSED is outcomes["structure"]


def test_listed_blocks_are_those_of_auto_round(project: Project) -> None:
    """Whatever a model calls its layers: those of GPT-J are `transformer.h`."""
    from auto_round.utils import get_block_names

    recipes(project)
    folder = project.root / "gptj"
    sizes = {"n_layer": LAYERS, "n_embd": HIDDEN, "n_head": 2, "vocab_size": 512}
    model = GPTJForCausalLM(GPTJConfig(**sizes, rotary_dim=16, dtype="bfloat16")).bfloat16()
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(DEMO / name, folder / name)
    build(project, folder, "int4")
    options = project.options(sources={"body": folder})
    (result,) = verify_variants(["int4"], options, VerifySettings(run=False)).variants
    skips = [check.summary for check in result.checks if check.name in ("generate", "perplexity")]
    assert ["--no-run"] * 2 == skips
    (blocks,) = get_block_names(model)
    config = read_json(project.out / "int4" / "config.json")

    assert blocks == [
        f"{config['quantization_config']['block_name_to_quantize']}.{layer}"
        for layer in range(LAYERS)
    ]
    assert [] == [check for check in result.checks if check.outcome is Outcome.FAILED]


def test_formats_that_need_a_table_say_how_to_make_one(
    project: Project, carnice: Carnice, mystery: Path
) -> None:
    """Which command, and that the model brings code of its own."""
    quantize = "quantize: {format: nvfp4}\ncalibration: {dataset: a/b, samples: 1, length: 8}"
    recipes(project, other=quantize)
    said = carnice("plan", "other", "--source", f"body={mystery}")

    check_refused_at_once(
        said,
        project,
        "unknown model_type 'mystery', whose code is not transformers' own",
        "carnice family mystery",
    )


@pytest.mark.parametrize("missing", [1, EXPERTS - 1])
def test_an_expert_that_is_missing_is_noticed_where_it_can_be(
    project: Project, missing: int
) -> None:
    """Without the one in the middle experts are no stack: each stands for itself."""
    recipes(project)
    folder = write_mystery(project.root / "mystery")
    tensors = read_all_tensors(folder)
    name = f"model.layers.0.moe.experts.{missing}.gate_proj.weight"
    del tensors[name]
    write_shards(folder, tensors, 1)
    ours = build(project, folder, "fp8")["fp8"]

    assert name not in ours
    assert "model.layers.0.moe.experts.0.gate_proj.weight_scale" in ours
