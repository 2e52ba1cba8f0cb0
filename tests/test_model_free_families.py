"""Formats without calibration on every family, held against llm-compressor's `model_free_ptq`.

Checkpoints are tiny and random, in the layouts of transformers and of the hub; vision towers and
MTP heads are kept.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from family_builds import INT4_WEIGHTS, build_checked
from tiny import Tensor, read_all_tensors, read_json, write_json
from zoo import FAMILIES, Layout, write_zoo

from carnice_build.commands.options import Options
from carnice_build.models import known_types

RECIPES = {
    "fp8": "{format: compressed-tensors, scheme: FP8_DYNAMIC}",
    "w4a16": "{format: compressed-tensors, algorithm: nearest, targets: [Linear], config_groups: "
    "{group_0: {targets: [Linear], weights: {num_bits: 4, symmetric: false, strategy: group, "
    "group_size: 128}}}, ignore: "
    "['re:.*lm_head', 're:.*(visual|vision_tower|vision_embedder|multi_modal_projector|"
    "embed_vision|per_layer|mtp).*', 're:.*embed_tokens', 're:model.layers.4.*']}",
    "int4": "{format: autoround, method: nearest}",
}

QUANTIZED_SOURCES = {("deepseek_v3", "hub"), ("gpt_oss", "hub"), ("minimax_m2", "hub")}
"""What the hub has in FP8 or MXFP4; `test_quantized_sources` builds from these."""

CASES = [
    (family, layout)
    for family in FAMILIES
    if family in known_types()
    for layout in ("transformers", "hub")
    if (family, layout) not in QUANTIZED_SOURCES
    # The library cuts its experts in the middle, though gate and up take turns;
    # `test_quantized_sources` holds them against `oneshot`.
    and family != "gpt_oss"
    # This one takes a `rename` step, for transformers 5.17 names the tower otherwise than the hub.
    and (family, layout) != ("gemma3", "transformers")
]


def build(root: Path, family: str, layout: Layout, variant: str) -> Path:
    """The folder of a variant of a tiny checkpoint, which passes its checks."""
    source = write_zoo(root / "source", family, layout)
    return build_checked(root, source, variant, f"quantize: {RECIPES[variant]}\n")


def plain_modules(tensors: dict[str, Tensor]) -> list[str]:
    """The modules that were left as they are."""
    floats = ("BF16", "F16", "F32")
    return [
        name.removesuffix(".weight")
        for name, tensor in tensors.items()
        if name.endswith(".weight") and tensor.dtype in floats
    ]


def model_free(root: Path, scheme: Any, ignore: list[str]) -> dict[str, Tensor]:
    """What the library makes of the same checkpoint when it leaves the same modules alone."""
    from llmcompressor import model_free_ptq

    model_free_ptq(root / "source", root / "theirs", scheme=scheme, ignore=ignore)
    return read_all_tensors(root / "theirs")


def differing(theirs: dict[str, Tensor], ours: dict[str, Tensor]) -> list[str]:
    """Names of tensors that are not the same in both.

    Of what is F32 in a BF16 model the library's `oneshot` makes BF16 when it loads it, and so do
    we; `model_free_ptq` does not load it.
    """
    narrowed = {
        name
        for name, tensor in theirs.items()
        if tensor.dtype == "F32" and name in ours and ours[name].dtype == "BF16"
    }
    assert all(name.endswith("norm.weight") for name in narrowed)
    names = (set(theirs) | set(ours)) - narrowed
    return sorted(name for name in names if theirs.get(name) != ours.get(name))


@pytest.mark.parametrize(("family", "layout"), CASES)
def test_fp8(tmp_path: Path, family: str, layout: Layout) -> None:
    """Every tensor of the folder is the library's."""
    ours = read_all_tensors(build(tmp_path, family, layout, "fp8"))

    assert [] == differing(model_free(tmp_path, "FP8_DYNAMIC", plain_modules(ours)), ours)


@pytest.mark.parametrize(("family", "layout"), CASES)
def test_w4a16(tmp_path: Path, family: str, layout: Layout) -> None:
    """Every tensor of the folder is the library's."""
    from compressed_tensors.quantization import QuantizationScheme

    ours = read_all_tensors(build(tmp_path, family, layout, "w4a16"))
    scheme = QuantizationScheme.model_validate({"targets": ["Linear"], "weights": INT4_WEIGHTS})

    assert [] == differing(model_free(tmp_path, scheme, plain_modules(ours)), ours)


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen3_5_moe"])
def test_experts_that_the_config_counts_and_nobody_holds(tmp_path: Path, family: str) -> None:
    """With one more the router's shape contradicts; with one less the last one is a stranger."""
    from carnice_build.commands.plan import plan_variants
    from carnice_build.errors import PlanError

    build(tmp_path, family, "transformers", "fp8")
    source = tmp_path / "source"
    config = read_json(source / "config.json")
    text = config.get("text_config", config)
    key = "num_local_experts" if "num_local_experts" in text else "num_experts"
    options = Options(recipes=tmp_path / "recipes", sources={"body": source}, cache=tmp_path / "c")
    for change, said in ((1, r"expected \[5, 256\] by its config"), (-1, "experts 0 to 2")):
        changed = {**text, key: text[key] + change}
        whole = {**config, "text_config": changed} if text is not config else changed
        write_json(source / "config.json", whole)
        with pytest.raises(PlanError, match=said):
            plan_variants(["fp8"], options)
        write_json(source / "config.json", config)
