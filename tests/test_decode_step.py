"""Quantized checkpoints, as libraries write them, build as what the libraries decode them to."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Finished, TinyCheckpoint
from quantizing import METHODS, part_name, quantize
from safetensors.torch import load_file, save_file
from tiny import read_json, write_json

from carnice_build.commands.build import build_variants
from carnice_build.commands.options import Options
from carnice_build.commands.plan import plan_variants
from carnice_build.errors import CarniceError, CheckpointError, PlanError

RECIPE = """
variant: {name}
description: A model that was quantized before
sources: {{body: {{model: owner/{source}}}}}
steps: [{steps}]
quantize: {{format: {format}}}
"""
FORMATS = {"mlx": "mlx, bits: 4, group_size: 64", "fp8": "compressed-tensors, scheme: FP8_DYNAMIC"}


def linear(module: str) -> bool:
    """Whether libraries quantize the module: the linears of decoder layers."""
    return bool(re.search(r"layers\.\d+\.(mlp|self_attn)\.\w+_proj$", module))


class Recipes:
    """A folder with a quantized checkpoint, its floats, and recipes of both."""

    def __init__(self, root: Path, method: str, tiny: TinyCheckpoint) -> None:
        self.root = root
        self.quantized = tiny(root / "quantized", layers=4)
        quantize(self.quantized, method, linear)
        (root / "recipes").mkdir()
        write_json(
            root / "recipes" / "_profiles.yaml",
            {"demo": {"owner/quantized": "quantized", "owner/plain": "quantized-decoded"}},
        )

    def recipe(self, name: str, source: str, quant: str, steps: str = "") -> str:
        """Write a recipe."""
        text = RECIPE.format(name=name, source=source, format=quant, steps=steps)
        (self.root / "recipes" / f"{name}.yaml").write_text(text, encoding="utf-8")
        return name

    @property
    def options(self) -> Options:
        """Where everything is."""
        root = self.root
        return Options(recipes=root / "recipes", cache=root / "cache", out=root / "build", jobs=2)

    def weights(self, name: str) -> dict[str, bytes]:
        """The shards of a built variant, and its config."""
        folder = self.root / "build" / name
        return {
            path.name: path.read_bytes()
            for path in [*folder.glob("*.safetensors"), folder / "config.json"]
        }


@pytest.fixture(scope="module")
def made(
    tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: TinyCheckpoint
) -> Callable[[str], Recipes]:
    """A folder for each method, made once; not to be changed."""
    folders: dict[str, Recipes] = {}

    def make(method: str) -> Recipes:
        if method not in folders:
            root = tmp_path_factory.mktemp("quantized")
            folders[method] = Recipes(root, method, tiny_checkpoint)
        return folders[method]

    return make


@pytest.mark.parametrize("method", METHODS)
def test_a_quantized_checkpoint_builds_as_what_it_stands_for(
    made: Callable[[str], Recipes], method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both formats make of it what they make of the library's own floats: no action runs for
    these any more, and the folders have the same weights and config."""
    recipes = made(method)
    monkeypatch.chdir(recipes.root)
    quants = FORMATS.items()
    ours = [recipes.recipe(f"our-{k}", "quantized", quant, "decode: {}") for k, quant in quants]
    plain = [recipes.recipe(f"plain-{k}", "plain", quant) for k, quant in quants]
    first = build_variants(ours, recipes.options)
    second = build_variants(plain, recipes.options)

    assert first.actions_run > 0
    assert 0 == second.actions_run
    for our, other in zip(ours, plain, strict=True):
        assert recipes.weights(our) == recipes.weights(other)
        assert "quantized" not in read_json(recipes.root / "build" / our / "config.json")


def test_no_byte_of_the_floats_is_on_disk(
    made: Callable[[str], Recipes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a build writes is the output, and what it reads is read once."""
    recipes = made("fp8")
    monkeypatch.chdir(recipes.root)
    name = recipes.recipe("disk", "quantized", FORMATS["mlx"], "decode: {}")
    options = recipes.options
    result = build_variants([name], Options(**{**vars(options), "cache": recipes.root / "other"}))
    written = sum(path.stat().st_size for path in (recipes.root / "other").rglob("*.safetensors"))

    assert result.written_bytes <= written
    again = build_variants([name], Options(**{**vars(options), "cache": recipes.root / "other"}))
    assert (0, 0) == (again.actions_run, again.read_bytes)


@pytest.mark.parametrize("method", ["fp8", "gptq"])
@pytest.mark.parametrize("quant", FORMATS)
def test_a_built_folder_is_verified_against_the_floats(
    made: Callable[[str], Recipes],
    method: str,
    quant: str,
    monkeypatch: pytest.MonkeyPatch,
    carnice: Callable[..., Finished],
) -> None:
    """`carnice verify` compares what was published with what the codes stand for."""
    recipes = made(method)
    monkeypatch.chdir(recipes.root)
    name = recipes.recipe(f"our-{quant}", "quantized", FORMATS[quant], "decode: {}")
    build_variants([name], recipes.options)
    finished = carnice("verify", name, "--no-run")

    assert 0 == finished.code, finished.out + finished.err


def plan(recipes: Recipes, name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The plan of one recipe."""
    monkeypatch.chdir(recipes.root)
    return plan_variants([name], recipes.options).variants[0]


def test_quantizing_a_quantized_model_must_be_meant(
    made: Callable[[str], Recipes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the step, the error says how to say so."""
    recipes = made("fp8")
    name = recipes.recipe("without", "quantized", FORMATS["mlx"])

    with pytest.raises(PlanError, match=r"is quantized already \(fp8\); expected a step `- decode"):
        plan(recipes, name, monkeypatch)


def test_a_model_that_is_not_quantized_has_nothing_to_decode(
    made: Callable[[str], Recipes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step is no habit: where it does nothing, it is an error."""
    recipes = made("fp8")
    name = recipes.recipe("plain", "plain", FORMATS["mlx"], "decode: {}")

    with pytest.raises(PlanError, match="there is nothing to decode"):
        plan(recipes, name, monkeypatch)


def test_the_published_config_says_nothing_of_the_source_s_quantization(
    made: Callable[[str], Recipes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only that of the format is in config.json."""
    recipes = made("int4 zeros")
    name = recipes.recipe("config", "quantized", FORMATS["fp8"], "decode: {}")
    found = plan(recipes, name, monkeypatch)

    assert "quantization_config" in found.body.config
    assert not any(key.startswith("quantization") for key in found.config)


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ("decode: {expect: 5}", "matches 23 tensors; expected 5"),
        ("decode: {match: '*.mlp.down_prj.weight'}", "matches no quantized weight; did you mean"),
        ("decode: {match: '*.mlp.*'}", "k_proj.weight_scale_inv"),
    ],
)
def test_what_is_decoded_is_what_the_step_says(
    made: Callable[[str], Recipes], monkeypatch: pytest.MonkeyPatch, steps: str, words: str
) -> None:
    """A wrong count, a name with a slip, and weights that stay quantized stop the plan."""
    recipes = made("fp8")
    name = recipes.recipe("wrong", "quantized", FORMATS["mlx"], steps)

    with pytest.raises(CarniceError, match=re.escape(words)):
        plan(recipes, name, monkeypatch)


# --- damaged checkpoints --------------------------------------------------------------------------

PROJ = "model.language_model.layers.3.self_attn.k_proj"
Change = Callable[[dict[str, Any]], object]


def rename(old: str, new: str) -> Change:
    return lambda tensors: tensors.update({f"{PROJ}.{new}": tensors.pop(f"{PROJ}.{old}")})


def put(name: str, value: Callable[[Any], Any]) -> Change:
    return lambda tensors: tensors.update(
        {part_name(PROJ, name): value(tensors[part_name(PROJ, name)])}
    )


def drop(name: str) -> Change:
    return lambda tensors: tensors.pop(part_name(PROJ, name))


def filled(value: float) -> Callable[[Any], Any]:
    def fill(tensor: Any) -> Any:
        changed = tensor.clone()
        changed.reshape(-1)[0] = value
        return changed

    return fill


DAMAGES: dict[str, tuple[str, Change, str]] = {
    "no scales": ("fp8", drop("weight_scale_inv"), f"lacks '{PROJ}.weight_scale_inv'"),
    "misspelt scales": (
        "fp8",
        rename("weight_scale_inv", "weight_scale_in"),
        f"did you mean '{PROJ}.weight_scale_in'",
    ),
    "scales of another shape": (
        "fp8",
        put("weight_scale_inv", lambda item: item.repeat(2, 1)),
        f"tensor '{PROJ}.weight_scale_inv' is F32 [2, 1]; expected [1, 1], a scale for each 128",
    ),
    "scales of another type": (
        "fp8",
        put("weight_scale_inv", lambda item: item.to(torch.int32)),
        f"tensor '{PROJ}.weight_scale_inv' is I32 [1, 1]; expected F32 or BF16",
    ),
    "NaN as a scale": (
        "fp8",
        put("weight_scale_inv", filled(float("nan"))),
        f"tensor '{PROJ}.weight_scale_inv' holds nan at element 0; expected finite scales",
    ),
    "infinity as a scale": (
        "int4 group",
        put("weight_scale", filled(float("inf"))),
        f"tensor '{PROJ}.weight_scale' holds inf at element 0; expected finite scales",
    ),
    "a negative scale": (
        "float channel",
        put("weight_scale", filled(-1.0)),
        f"tensor '{PROJ}.weight_scale' holds -1 at element 0; expected finite scales, none",
    ),
    "a code that is no number": (
        "float channel",
        put("weight", lambda item: filled(0x7F)(item.view(torch.uint8)).view(item.dtype)),
        f"tensor '{PROJ}.weight' holds NaN or infinity at element 0",
    ),
    "E8M0 that is no number": (
        "mxfp4",
        put("_scales", filled(255)),
        f"tensor '{PROJ}_scales' holds NaN at element 0",
    ),
    "no shape": ("int4 group", drop("weight_shape"), f"lacks '{PROJ}.weight_shape'"),
    "another shape": (
        "int4 group",
        put("weight_shape", filled(7)),
        f"tensor '{PROJ}.weight_shape' says [7, 128]; expected [64, 128]",
    ),
    "no zero points": (
        "int4 zeros",
        drop("weight_zero_point"),
        f"lacks '{PROJ}.weight_zero_point'",
    ),
    "zero points of another shape": (
        "int4 zeros",
        put("weight_zero_point", lambda item: item.T.contiguous()),
        f"tensor '{PROJ}.weight_zero_point' is I32 [2, 8]; expected I32 [8, 2]",
    ),
    "a packed weight that fits no scheme": (
        "int4 group",
        put("weight_packed", lambda item: item.repeat(1, 2)),
        "expected what one of `config_groups` makes of a weight",
    ),
    "no blocks": ("mxfp4", drop("_blocks"), f"lacks '{PROJ}_blocks'"),
    "scales of other groups": (
        "mxfp4",
        put("_scales", lambda item: item[:, :2].contiguous()),
        f"tensor '{PROJ}_scales' is U8 [64, 2]; expected U8 [64, 4]",
    ),
    "columns in another order": (
        "gptq",
        put("g_idx", lambda item: item.flip(0)),
        f"tensor '{PROJ}.g_idx' reorders columns by their activations",
    ),
    "no scales of GPTQ": ("gptq", drop("scales"), f"lacks '{PROJ}.scales'"),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_a_damaged_weight_is_named(
    what: str, tmp_path: Path, tiny_checkpoint: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tensor, its file and what was expected, at the plan where headers tell."""
    method, change, words = DAMAGES[what]
    recipes = Recipes(tmp_path, method, tiny_checkpoint)
    monkeypatch.chdir(tmp_path)
    shard = recipes.quantized / "model.safetensors"
    tensors = load_file(shard)
    change(tensors)
    save_file(tensors, shard)
    name = recipes.recipe("damaged", "quantized", FORMATS["fp8"], "decode: {}")

    with pytest.raises(CheckpointError) as caught:
        build_variants([name], recipes.options)
    assert words in str(caught.value)
    assert str(caught.value.where).endswith("quantized/model.safetensors")


METHODS_REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "method": ({"quant_method": "awq"}, "is quantized already (awq); expected the weights that"),
    "storage": (
        {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"},
        "stores weights as 'nvfp4-pack-quantized', which cannot be decoded; expected float-quant",
    ),
    "algorithm": (
        {"quant_method": "modelopt", "quant_algo": "NVFP4"},
        "is quantized by modelopt as 'NVFP4', which cannot be decoded; expected FP8",
    ),
    "packing": (
        {"quant_method": "auto-round", "packing_format": "auto_round:auto_awq"},
        "packs weights as 'auto_round:auto_awq', which cannot be decoded; expected gptq",
    ),
    "groups": (
        {"quant_method": "compressed-tensors", "config_groups": ["Linear"]},
        "weight' is of a quantized weight that lacks",
    ),
    "blocks": (
        {"quant_method": "fp8", "weight_block_size": [128, 0]},
        "states blocks of [128, 0]; expected two sizes",
    ),
}


@pytest.mark.parametrize("what", METHODS_REFUSED)
def test_what_cannot_be_decoded_is_said(
    what: str, tmp_path: Path, tiny_checkpoint: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the name that the config gives it."""
    stated, words = METHODS_REFUSED[what]
    recipes = Recipes(tmp_path, "fp8", tiny_checkpoint)
    config = recipes.quantized / "config.json"
    write_json(config, {**read_json(config), "quantization_config": stated})
    steps = "" if what == "method" else "decode: {}"
    name = recipes.recipe("refused", "quantized", FORMATS["mlx"], steps)

    with pytest.raises(CarniceError, match=re.escape(words)):
        plan(recipes, name, monkeypatch)
