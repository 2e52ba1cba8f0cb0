"""Schemes of compressed-tensors by name and by group, held against llm-compressor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from family_builds import build_checked, options_of, write_family, write_texts
from oneshot import run_modifiers, tokenizer
from tiny import Tensor, read_all_tensors, read_json, write_json

from carnice_build.commands.plan import plan_and_survey, plan_variants
from carnice_build.commands.verify import VerifySettings, verify_variants
from carnice_build.errors import CarniceError
from carnice_build.formats.compressed_tensors.checks import CompressedReader
from carnice_build.formats.compressed_tensors.format import CompressedFormat
from carnice_build.formats.compressed_tensors.schemes import ALIASES, PRESETS, preset
from carnice_build.planning.status import Status

CALIBRATED = ("FP8", "NVFP4")
"""Schemes whose inputs have stored scales, which `model_free_ptq` does not make."""

FREE = [name for name in PRESETS if name not in CALIBRATED]
WIDTHS = ("W4A16", "W4A16_ASYM", "W4AFP8", "W8A8", "W8A16")
"""Of the schemes of integers, those that are built here; kernels are tested for each width."""

BUILT = [name for name in FREE if not name.startswith("W") or name in WIDTHS]

ATTENTION, MLP = "*.self_attn.*", "*.mlp.*"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of a family whose linears engines fuse."""
    return write_family(tmp_path_factory.mktemp("source") / "source", "qwen3", {})


def library(source: Path, folder: Path, **config: Any) -> dict[str, Tensor]:
    """What `model_free_ptq` makes of all but the head."""
    from llmcompressor import model_free_ptq

    model_free_ptq(source, folder, ignore=["lm_head", "re:.*embed_tokens"], **config)
    return read_all_tensors(folder)


def quantization(folder: Path) -> dict[str, Any]:
    """What config.json states."""
    found: dict[str, Any] = read_json(folder / "config.json")["quantization_config"]
    return found


@pytest.mark.parametrize("name", [*PRESETS, *ALIASES])
def test_a_preset_is_the_librarys(name: str) -> None:
    """Every argument of weights and inputs, as the library dumps them."""
    from compressed_tensors.quantization import preset_name_to_scheme

    theirs = preset_name_to_scheme(name, ["Linear"]).model_dump(mode="json")
    knobs = CompressedFormat(format="compressed-tensors", scheme=name)
    ours = knobs.stated(preset(name, ["Linear"])).entry()

    for part in ("weights", "input_activations"):
        mine, wanted = dict(ours[part] or {}), dict(theirs[part] or {})
        # Who finds the ranges of weights, and the type of zero points, follow when it runs.
        for loose in ("zp_dtype", *(["observer"] if part == "weights" else [])):
            mine.pop(loose, None)
            wanted.pop(loose, None)
        assert wanted == mine, part


def test_the_library_has_no_other_presets_that_could_be_made() -> None:
    """Beside those whose inputs have four bits, which no engine runs."""
    from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES

    others = set(PRESET_SCHEMES) - set(PRESETS) - set(ALIASES)
    assert {"UNQUANTIZED", "W2A4", "W3A4", "W4A4"} == others


@pytest.mark.parametrize("name", BUILT)
def test_a_scheme_by_name_is_what_model_free_ptq_makes(
    source: Path, tmp_path: Path, name: str
) -> None:
    """Every tensor, and what config.json says of them; verify finds nothing wrong."""
    recipe = f"quantize: {{format: compressed-tensors, scheme: {name}}}\n"
    folder = build_checked(tmp_path, source, "mine", recipe)
    theirs = library(source, tmp_path / "theirs", scheme=name)
    ours = quantization(folder)
    (group,) = ours["config_groups"].values()

    assert theirs == read_all_tensors(folder)
    assert ours["format"] == group["format"]
    (wanted,) = quantization(tmp_path / "theirs")["config_groups"].values()
    assert {**wanted, "weights": None} == {**group, "weights": None}
    reader = CompressedReader(read_json(folder / "config.json"))
    assert reader.scheme("model.layers.0.mlp.up_proj") == preset(name, ["Linear"]).weights.scheme


CALIBRATION = """
quantize: {{format: compressed-tensors, scheme: {}}}
calibration: {{dataset: rows.jsonl, samples: 3, threads: 1, attention: eager}}
"""


@pytest.mark.parametrize("name", ["FP8", pytest.param("NVFP4", marks=pytest.mark.wide)])
def test_scales_of_inputs_are_those_of_oneshot(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """From the passes that NVFP4 of modelopt has too; every tensor, and config.json."""
    import torch
    from driving import Checkpoint
    from llmcompressor.modifiers.quantization import QuantizationModifier

    from carnice_build.calibration.driver import Arithmetic, decoder_layers

    monkeypatch.chdir(tmp_path)
    texts = write_texts(tmp_path / "rows.jsonl")
    folder = build_checked(tmp_path, source, "mine", CALIBRATION.format(name))
    model = Checkpoint(source).whole(Arithmetic("bfloat16", "eager", threads=1))
    run_modifiers(
        [QuantizationModifier(scheme=name, ignore=["lm_head"])],
        tmp_path / "theirs",
        [torch.tensor(tokenizer()(text)["input_ids"]) for text in texts],
        model,
        type(decoder_layers(model)[1][0]).__name__,
    )

    assert read_all_tensors(tmp_path / "theirs") == read_all_tensors(folder)
    assert quantization(tmp_path / "theirs") == quantization(folder)


MIXED = f"""
quantize:
  format: compressed-tensors
  scheme:
    FP8_DYNAMIC: ['{ATTENTION}']
    NVFP4A16: ['{MLP}']
"""


def test_modules_are_given_to_schemes_by_pattern(source: Path, tmp_path: Path) -> None:
    """FP8 attention beside NVFP4 MLPs, each as the library makes it."""
    from compressed_tensors.quantization import QuantizationConfig, preset_name_to_scheme

    folder = build_checked(tmp_path, source, "mine", MIXED)
    groups = {
        "group_0": preset_name_to_scheme("FP8_DYNAMIC", [r"re:.*\.self_attn\..*"]),
        "group_1": preset_name_to_scheme("NVFP4A16", [r"re:.*\.mlp\..*"]),
    }
    config = QuantizationConfig(config_groups=groups)
    ours = quantization(folder)

    assert library(source, tmp_path / "theirs", config=config) == read_all_tensors(folder)
    assert "mixed-precision" == ours["format"]
    assert ["float-quantized", "nvfp4-pack-quantized"] == [
        group["format"] for group in ours["config_groups"].values()
    ]
    assert [[r"re:.*\.self_attn\..*"], [r"re:.*\.mlp\..*"]] == [
        group["targets"] for group in ours["config_groups"].values()
    ]
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    modifier = recipe["default_stage"]["default_modifiers"]["QuantizationModifier"]
    assert {
        "FP8_DYNAMIC": [r"re:.*\.self_attn\..*"],
        "NVFP4A16": [r"re:.*\.mlp\..*"],
    } == modifier["scheme"]


MODELOPT = """
quantize: {format: nvfp4}
calibration: {dataset: rows.jsonl, samples: 3, threads: 1, attention: eager}
"""


def test_modelopts_codes_are_published_without_quantizing_again(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal codes and scales, under the inverse of its scale; and no weight is read for it."""
    monkeypatch.chdir(tmp_path)
    write_texts(tmp_path / "rows.jsonl")
    first = build_checked(tmp_path, source, "first", MODELOPT)
    recipe = CALIBRATION.format("NVFP4").replace("NVFP4}", "NVFP4, nvfp4: modelopt}")
    (tmp_path / "recipes" / "second.yaml").write_text(
        f"variant: second\ndescription: A\nsources: {{body: {{model: a/b}}}}\n{recipe}"
    )
    options = options_of(tmp_path, source)
    result = plan_and_survey(["second"], options)
    ran = {
        action.op.name
        for action in result.plan.graph
        if result.status.actions.get(action.identity) in (Status.RUN, Status.READ)
    }
    second = build_checked(tmp_path, source, "second", recipe)
    theirs, ours = read_all_tensors(first), read_all_tensors(second)
    module = "model.layers.0.mlp.up_proj"
    scales = [
        np.frombuffer(tensors[f"{module}.{end}"].data, np.float32)[0]
        for tensors, end in ((theirs, "weight_scale_2"), (ours, "weight_global_scale"))
    ]

    assert {"nvfp4.inverse", "compressed.input_scales"} == ran
    assert theirs[f"{module}.weight"].data == ours[f"{module}.weight_packed"].data
    assert theirs[f"{module}.weight_scale"] == ours[f"{module}.weight_scale"]
    assert np.float32(1) / scales[0] == scales[1]


def test_verify_tells_a_group_that_engines_would_not_find(source: Path, tmp_path: Path) -> None:
    """Groups are in the order of the model, and each module in the one whose scheme it has."""
    recipe = MIXED.replace("    FP8_DYNAMIC", "    X").replace("NVFP4A16", "FP8_DYNAMIC")
    folder = build_checked(tmp_path, source, "mine", recipe.replace("X", "NVFP4A16"))
    config = read_json(folder / "config.json")
    groups = config["quantization_config"]["config_groups"]
    assert ["nvfp4-pack-quantized", "float-quantized"] == [one["format"] for one in groups.values()]
    groups["group_1"]["targets"] = ["re:nothing"]
    (folder / "config.json").unlink()
    write_json(folder / "config.json", config)
    (result,) = verify_variants(
        ["mine"], options_of(tmp_path, source), VerifySettings(run=False)
    ).variants
    said = "\n".join(line for check in result.checks for line in check.problems)

    assert "config.json does not give model.layers.0.mlp.gate_proj to group_1" in said


def test_a_group_for_linears_takes_what_no_other_names(source: Path, tmp_path: Path) -> None:
    """As the library does, whichever is first; and fragile modules stay as they are."""
    (tmp_path / "recipes").mkdir()
    recipe = (
        "quantize:\n  format: compressed-tensors\n"
        "  scheme: {W4A16: Linear, W8A16: '*.layers.0.mlp.*'}\n  ignore: '*.layers.1.mlp.*'\n"
    )
    build_checked(tmp_path, source, "mine", recipe)
    (plan,) = plan_variants(["mine"], options_of(tmp_path, source)).variants
    bits = {module: scheme.bits for module, scheme in plan.conversion.quantized.items()}

    assert 8 == bits["model.layers.0.mlp.down_proj"]
    assert 4 == bits["model.layers.0.self_attn.q_proj"]
    assert "model.layers.1.mlp.down_proj" not in bits


REFUSED = [
    ("scheme: FP8_DYNAMC", "is no scheme that is made here; did you mean 'FP8_DYNAMIC'?"),
    ("scheme: fp8_dynamic", "did you mean 'FP8_DYNAMIC'?"),
    ("scheme: [FP8_DYNAMIC]", "quantize.scheme: Input should be a valid string"),
    ("scheme: {}", "quantize.scheme: Dictionary should have at least 1 item"),
    ("scheme: {FP8_DYNAMIC: []}", "quantize.scheme.FP8_DYNAMIC: List should have at least 1 item"),
    ("scheme: {FP8_DYNAMIC: ''}", "quantize.scheme.FP8_DYNAMIC: '' is an empty pattern"),
    ("scheme: {FP8_DYNAMIC: 're:'}", "quantize.scheme.FP8_DYNAMIC: 're:' is an empty pattern"),
    ("scheme: {FP8_DYNAMIC: 're:(a'}", "quantize.scheme.FP8_DYNAMIC: 're:(a' is not a valid"),
    ("scheme: {FP8_DYNAMIC: 're:^([a-z.]+)+$!'}", "could take too long on some names"),
    ("scheme: {FP8_DYNAMIC: '*.mpl.*'}", "no linear of decoder layers; did you mean 'mlp'?"),
    ("scheme: {FP8_DYNAMIC: Linear}, targets: Linear", "`targets` is for a single scheme"),
    ("scheme: FP8_DYNAMIC, nvfp4: modelopt", "`nvfp4` is for a `scheme` of NVFP4"),
    ("scheme: NVFP4", "the format needs a section `calibration`"),
    ("scheme: W8A8, kv_cache: {format: fp8}", "`kv_cache` needs a section `calibration`"),
    ("config_groups: {}", "quantize.config_groups: Dictionary should have at least 1 item"),
    ("config_groups: {a: }", "quantize.config_groups.a: Input should be a mapping"),
    (
        "config_groups: {a: {targets: Linear, weights: {num_bits: 8, type: float, "
        "strategy: block, block_structure: [128, 0]}}}",
        "block_structure.1: Input should be greater than 0",
    ),
    ("ignore: '*.q_proj'", "needs either `scheme` or `config_groups`"),
    ("scheme: {FP8_BLOCK: Linear, W8A8: Linear}", "two groups are for Linear"),
    (
        "scheme: {FP8_BLOCK: '*.mlp.*', W8A8: '*_proj'}",
        "is named by two groups, scheme.FP8_BLOCK and scheme.W8A8",
    ),
    (
        "scheme: {FP8_BLOCK: '*.q_proj', W8A8: Linear}",
        "have different schemes; expected one, because serving engines fuse them",
    ),
    ("scheme: {FP8_BLOCK: '*.q_prj'}", "did you mean 'q_proj'?"),
    ("{scheme: MXFP4A16, algorithm: awq}", "scheme: AWQ is for integers in groups without inputs"),
    (
        "config_groups: {a: {targets: Linear, weights: {num_bits: 4, type: float, "
        "strategy: channel}}}",
        "config_groups.a: weights of this scheme are not made here",
    ),
    (
        "config_groups: {a: {targets: Linear, weights: {num_bits: 8, strategy: block}}}",
        "strategy block needs a block_structure",
    ),
]


@pytest.mark.parametrize(("knobs", "reason"), REFUSED)
def test_what_cannot_be_is_refused_when_it_is_planned(
    source: Path, tmp_path: Path, knobs: str, reason: str
) -> None:
    """With the reason, before any weight is read."""
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "_profiles.yaml").write_text("demo: {}\n")
    inner = knobs[1:-1] if knobs.startswith("{") else knobs
    (tmp_path / "recipes" / "mine.yaml").write_text(
        "variant: mine\ndescription: A\nsources: {body: {model: a/b}}\n"
        f"quantize: {{format: compressed-tensors, {inner}}}\n"
    )
    with pytest.raises(CarniceError) as error:
        plan_variants(["mine"], options_of(tmp_path, source))
    assert reason in str(error.value)
