"""The presets of schemes: what they make of any model, and of several groups."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import REPOSITORY
from family_builds import build_checked, write_family
from tiny import read_json

from carnice_build.commands.options import Options
from carnice_build.commands.plan import plan_variants
from carnice_build.formats.compressed_tensors.format import CompressedFormat
from carnice_build.formats.compressed_tensors.schemes import PRESETS, preset_of

NAMED = {
    "fp8-dynamic": ("FP8_DYNAMIC",),
    "fp8-block": ("FP8_BLOCK",),
    "w8a8": ("W8A8",),
    "w8a16": ("W8A16",),
    "w4a16": ("W4A16",),
    "w4a16-rtn": ("W4A16_ASYM",),
    "nvfp4a16": ("NVFP4A16",),
    "fp8-static": ("FP8",),
    "nvfp4-ct": ("NVFP4",),
    "mxfp4a16": ("MXFP4A16",),
    "mxfp4": ("MXFP4",),
    "mxfp8a16": ("MXFP8A16",),
    "mxfp8": ("MXFP8",),
    "fp8-nvfp4": ("NVFP4A16", "FP8_DYNAMIC"),
}


@pytest.mark.parametrize("variant", NAMED)
def test_a_variant_is_in_the_scheme_of_its_name(variant: str, tmp_path: Path) -> None:
    """All but head, embedding, MTP head and what steers linear attention is quantized."""
    options = Options(recipes=REPOSITORY / "recipes", out=tmp_path, cache=tmp_path / "cache")
    (plan,) = plan_variants([variant], options).variants
    number_format = plan.recipe.quantize

    assert isinstance(number_format, CompressedFormat)
    assert NAMED[variant] == number_format.schemes()
    quantized = plan.conversion.quantized
    assert all(".layers." in module for module in quantized)
    assert any(module.endswith("mlp.down_proj") for module in quantized)
    if variant not in ("fp8-dynamic", "w4a16-rtn"):
        narrow = (".in_proj_a", ".in_proj_b")
        assert not any(module.endswith(narrow) for module in quantized)
        assert any(module.endswith("linear_attn.out_proj") for module in quantized)


@pytest.mark.parametrize("name", PRESETS)
def test_a_group_is_of_the_preset_that_it_was_made_of(name: str) -> None:
    """Whoever finds its ranges."""
    knobs = {"format": "compressed-tensors", "scheme": name}
    (group,) = CompressedFormat.model_validate(knobs).groups.values()
    searched = group.weights.model_copy(update={"observer": "mse"})

    assert name == preset_of(group)
    assert name == preset_of(group.model_copy(update={"weights": searched}))


@pytest.mark.parametrize(
    ("weights", "name"),
    [
        ("{num_bits: 4, strategy: channel}", "W4A16"),
        ("{num_bits: 8, strategy: group, group_size: 32}", "W8A16"),
        ("{num_bits: 4, strategy: group, group_size: 64, symmetric: false}", "W4A16_ASYM"),
        ("{num_bits: 8, strategy: channel, symmetric: false}", "custom"),
    ],
)
def test_integers_of_another_group_size_are_of_the_nearest_preset(weights: str, name: str) -> None:
    """Engines run them by the same kernels; what no preset is like is none."""
    import yaml

    groups = {"a": {"targets": "Linear", "weights": yaml.safe_load(weights)}}
    knobs = {"format": "compressed-tensors", "config_groups": groups}

    assert (name,) == CompressedFormat.model_validate(knobs).schemes()


def test_groups_may_be_in_another_order_than_modules(tmp_path: Path) -> None:
    """The config has them as the model does, and verify finds nothing wrong with that."""
    source = write_family(tmp_path / "source", "qwen3", {})
    recipe = "extends: preset:fp8-nvfp4\n"
    folder = build_checked(tmp_path, source, "mine", recipe)
    groups = read_json(folder / "config.json")["quantization_config"]["config_groups"]

    assert [["Linear"], [r"re:.*\.mlp\..*"]] == [group["targets"] for group in groups.values()]
