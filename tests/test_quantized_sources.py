"""Families that the hub has in FP8 or MXFP4 build as what the libraries make of them.

Checkpoints are tiny and random, in the layouts of the hub; `test_decode_step` has the methods one
by one, on one family.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from family_builds import INT4_WEIGHTS, options_of
from quantizing import decoded_folder, floats_of_gpt_oss
from safetensors.torch import load_file, save_file
from tiny import Tensor, read_all_tensors, read_json, write_json
from zoo import TOKENIZER_FILES, write_zoo

from carnice_build.checkpoint.quantized import of_activations, quantized_weights
from carnice_build.commands.build import BuildResult, build_variants
from carnice_build.commands.options import Options
from carnice_build.commands.plan import plan_and_survey, plan_variants
from carnice_build.commands.verify import VerifySettings, verify_variants
from carnice_build.errors import CheckpointError, PlanError
from carnice_build.verification.result import Outcome

QUANTS: dict[str, dict[str, Any]] = {
    "mlx": {"format": "mlx", "bits": 4},
    "fp8": {"format": "compressed-tensors", "scheme": "FP8_DYNAMIC"},
    "w4a16": {
        "format": "compressed-tensors",
        "algorithm": "nearest",
        "targets": ["Linear"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**INT4_WEIGHTS, "observer": "memoryless_minmax"},
            }
        },
        "ignore": ["re:.*lm_head", "re:.*embed_tokens"],
    },
    "int4": {"format": "autoround", "method": "nearest"},
}


@pytest.mark.parametrize("value", [[], ["gptq"], {"a": 1}, 1, True, 0.5], ids=str)
@pytest.mark.parametrize(
    ("method", "entry"),
    [
        ("gptq", "checkpoint_format"),
        ("auto-round", "packing_format"),
        ("compressed-tensors", "format"),
        ("modelopt", "quant_algo"),
        (None, "quant_method"),
    ],
)
def test_a_config_that_names_no_way_of_packing_says_so(
    method: str | None, entry: str, value: object
) -> None:
    """Whatever stands there; nothing at all may mean the method's own."""
    stated = {"quant_method": method, "bits": 4, entry: value}
    if value == [] and method == "gptq":
        assert {} == quantized_weights({}, stated, lambda name: None, "config.json")
    else:
        with pytest.raises(CheckpointError, match="cannot be decoded"):
            quantized_weights({}, stated, lambda name: None, "config.json")


class Workshop:
    """A folder for recipes, sources and what is built of them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        write_json(_made(root / "recipes") / "_profiles.yaml", {"demo": {}})

    def options(self, source: Path) -> Options:
        """Where everything is."""
        return options_of(self.root, source)

    def build(self, source: Path, quant: str, *steps: Any) -> BuildResult:
        """Build a variant called `quant`, which passes its checks.

        What it reads are the weights as they are stored, each byte once, as the plan says.
        """
        recipe = {
            "variant": quant,
            "description": "A",
            "sources": {"body": {"model": "a/b"}},
            "steps": list(steps),
            "quantize": QUANTS[quant],
        }
        write_json(self.root / "recipes" / f"{quant}.yaml", recipe)
        expected = plan_and_survey([quant], self.options(source)).status.bytes_to_read
        report = build_variants([quant], self.options(source))
        settings = VerifySettings(run=False)
        (result,) = verify_variants([quant], self.options(source), settings).variants
        assert [] == [check for check in result.checks if check.outcome is Outcome.FAILED]
        stored = {name: len(item.data) for name, item in read_all_tensors(source).items()}
        left_out = of_activations(stored)
        wanted = sum(count for name, count in stored.items() if name not in left_out)
        assert wanted == expected == report.read_bytes
        return report

    def tensors(self, quant: str) -> dict[str, Tensor]:
        """Of a variant that was built."""
        return read_all_tensors(self.root / "out" / quant)

    def config(self, quant: str) -> dict[str, Any]:
        """The config of a variant that was built."""
        return read_json(self.root / "out" / quant / "config.json")


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture
def shop(tmp_path: Path) -> Workshop:
    """An empty one."""
    return Workshop(tmp_path)


def plain_modules(tensors: dict[str, Tensor]) -> list[str]:
    """The modules that were left as they are."""
    return [
        name.removesuffix(".weight")
        for name, tensor in tensors.items()
        if name.endswith(".weight") and tensor.dtype in ("BF16", "F16", "F32")
    ]


def differing(theirs: dict[str, Tensor], ours: dict[str, Tensor]) -> Iterator[str]:
    """Names of tensors that are not the same in both.

    A negative zero, of which FP8 sources have some, stays one in E4M3 by `model_free_ptq`; by
    `oneshot` and by us it becomes zero.
    """
    for name in sorted(theirs.keys() | ours.keys()):
        one, other = theirs.get(name), ours.get(name)
        if one and other and (one.dtype, one.shape) == (other.dtype, other.shape):
            pairs = set(zip(one.data, other.data, strict=True)) if one.data != other.data else ()
            if {pair for pair in pairs if pair[0] != pair[1]} <= {(0x80, 0)}:
                continue
        yield name


FP8 = ("deepseek_v3", "minimax_m2", "qwen3_moe_fp8")
DECODED_BY_MLX = ("deepseek_v3", "minimax_m2")
"""Families whose FP8 mlx-lm decodes itself; others it refuses."""


@pytest.mark.parametrize("family", FP8)
def test_mlx_of_a_model_in_fp8_is_what_mlx_lm_converts(shop: Workshop, family: str) -> None:
    """Every tensor, and what config.json says."""
    pytest.importorskip("mlx_lm")
    from mlx_families import converted

    source = write_zoo(shop.root / "source", family, "hub")
    shop.build(source, "mlx", {"decode": {}})
    if family not in DECODED_BY_MLX:
        with pytest.raises(ValueError, match="weight_scale_inv"):
            converted(source, shop.root / "refused")
        source = decoded_folder(source, shop.root / "decoded")
    theirs = converted(source, shop.root / "theirs")
    expected, found = read_json(theirs / "config.json"), shop.config("mlx")
    # Of a head that neither publishes, mlx-lm says that it is there.
    differ = {key for key in expected if expected[key] != found.get(key)}

    assert [] == list(differing(read_all_tensors(theirs), shop.tensors("mlx")))
    assert differ <= {"num_nextn_predict_layers"}


def theirs_of_fp8(folder: Path, target: Path, scheme: Any, ignore: list[str]) -> dict[str, Tensor]:
    """What llm-compressor makes of a checkpoint in FP8, which it decodes first."""
    from compressed_tensors.entrypoints.convert import FP8BlockDequantizer
    from llmcompressor import model_free_ptq

    stored = read_all_tensors(folder)
    scaled = [name.removesuffix(".weight_scale_inv") for name in stored if "_scale_inv" in name]
    converter = FP8BlockDequantizer(targets=scaled)
    model_free_ptq(folder, target, scheme=scheme, ignore=ignore, converter=converter)
    return read_all_tensors(target)


@pytest.mark.parametrize("family", FP8)
@pytest.mark.parametrize("quant", ["fp8", "w4a16"])
def test_a_model_in_fp8_is_what_llm_compressor_makes_of_it(
    shop: Workshop, family: str, quant: str
) -> None:
    """Every tensor is that of `model_free_ptq` behind the library's own decoder."""
    pytest.importorskip("llmcompressor")
    from compressed_tensors.quantization import QuantizationScheme

    source = write_zoo(shop.root / "source", family, "hub")
    shop.build(source, quant, {"decode": {}})
    ours = shop.tensors(quant)
    packed = QuantizationScheme.model_validate({"targets": ["Linear"], "weights": INT4_WEIGHTS})
    scheme = {"fp8": "FP8_DYNAMIC", "w4a16": packed}[quant]
    theirs = theirs_of_fp8(source, shop.root / "theirs", scheme, plain_modules(ours))

    assert [] == list(differing(theirs, ours))


@pytest.mark.parametrize("family", FP8)
def test_int4_of_a_model_in_fp8_is_that_of_its_floats(shop: Workshop, family: str) -> None:
    """A checkpoint of the floats has nothing left to do: every action is done, every byte equal."""
    pytest.importorskip("compressed_tensors")
    source = write_zoo(shop.root / "source", family, "hub")
    first = shop.build(source, "int4", {"decode": {}})
    ours, config = shop.tensors("int4"), shop.config("int4")
    second = shop.build(decoded_folder(source, shop.root / "decoded"), "int4")

    assert first.actions_run > 0
    assert 0 == second.actions_run
    assert ours == shop.tensors("int4")
    assert config == shop.config("int4")


# --- gpt-oss --------------------------------------------------------------------------------------


def by_oneshot(folder: Path, target: Path, scheme: Any) -> dict[str, Tensor]:
    """What llm-compressor's `oneshot` makes of a model, whose experts it takes apart, without data.

    `model_free_ptq` would cut gate and up in the middle, though their columns take turns.
    """
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype="bfloat16")
    groups = {"group_0": {"targets": ["Linear"], **scheme}}
    modifier = QuantizationModifier(config_groups=groups, ignore=["re:.*lm_head", "re:.*router"])
    oneshot(model=model, recipe=[modifier], pipeline="datafree")
    model.save_pretrained(target, save_compressed=True)
    return read_all_tensors(target)


SCHEMES = {
    "fp8": {
        "weights": {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True},
        "input_activations": {
            "num_bits": 8,
            "type": "float",
            "strategy": "token",
            "dynamic": True,
            "symmetric": True,
        },
    },
    "w4a16": {"weights": INT4_WEIGHTS},
}


@pytest.mark.parametrize("quant", SCHEMES)
def test_gpt_oss_is_what_llm_compressor_makes_of_its_floats(shop: Workshop, quant: str) -> None:
    """Each expert's gate, up and down projection, with biases; and so from transformers' floats."""
    pytest.importorskip("llmcompressor")
    source = write_zoo(shop.root / "source", "gpt_oss", "hub")
    shop.build(source, quant, {"decode": {}})
    ours = shop.tensors(quant)
    floats = floats_of_gpt_oss(source, shop.root / "floats")
    shop.build(floats, quant)

    assert "model.layers.0.mlp.experts.3.up_proj.bias" in ours
    assert [] == list(differing(by_oneshot(floats, shop.root / "theirs", SCHEMES[quant]), ours))
    assert ours == shop.tensors(quant)


def test_int4_of_gpt_oss_is_that_of_its_floats(shop: Workshop) -> None:
    """Their columns lie as rows in the file, and both folders are equal."""
    pytest.importorskip("transformers")
    source = write_zoo(shop.root / "source", "gpt_oss", "hub")
    shop.build(source, "int4", {"decode": {}})
    ours = shop.tensors("int4")
    shop.build(floats_of_gpt_oss(source, shop.root / "floats"), "int4")

    assert ours == shop.tensors("int4")
    assert "model.layers.0.mlp.experts.3.up_proj.qweight" in ours


def test_mlx_of_decoded_gpt_oss_is_what_mlx_lm_converts(shop: Workshop) -> None:
    """Of the floats in the layout that mlx-lm knows: rows for outputs."""
    pytest.importorskip("mlx_lm")
    from mlx_families import converted

    source = write_zoo(shop.root / "source", "gpt_oss", "hub")
    shop.build(source, "mlx", {"decode": {}})
    folder = floats_of_gpt_oss(source, shop.root / "floats")
    stored = load_file(folder / "model.safetensors")
    for name in [name for name in stored if name.endswith(("experts.gate_up_proj", "down_proj"))]:
        stored[f"{name}.weight"] = stored.pop(name).transpose(1, 2).contiguous()
    save_file(stored, folder / "model.safetensors")
    theirs = converted(folder, shop.root / "theirs")

    assert [] == list(differing(read_all_tensors(theirs), shop.tensors("mlx")))
    assert read_json(theirs / "config.json") == shop.config("mlx")


def test_mlx_keeps_the_experts_of_gpt_oss_as_they_are(shop: Workshop) -> None:
    """Without a step `decode`; the rest is quantized, and tensors and config are mlx-lm's."""
    pytest.importorskip("mlx_lm")
    from mlx_families import converted

    source = write_zoo(shop.root / "source", "gpt_oss", "hub")
    shop.build(source, "mlx")
    theirs = converted(source, shop.root / "theirs")
    (plan,) = plan_variants(["mlx"], shop.options(source)).variants

    assert [] == list(differing(read_all_tensors(theirs), shop.tensors("mlx")))
    assert read_json(theirs / "config.json") == shop.config("mlx")
    assert any("stay quantized as they are" in notice for notice in plan.notices)
    assert {"FP4 g32", "4-bit g64", "8-bit g64"} == set(
        map(str, plan.conversion.quantized.values())
    )


@pytest.mark.parametrize("quant", ["fp8", "w4a16", "int4"])
def test_other_formats_must_decode_gpt_oss(shop: Workshop, quant: str) -> None:
    """They have no MXFP4 to keep the experts in, so quantizing them anew must be meant."""
    pytest.importorskip("transformers")
    source = write_zoo(shop.root / "source", "gpt_oss", "hub")

    with pytest.raises(PlanError, match=r"is quantized already \(mxfp4\); expected a step `- dec"):
        shop.build(source, quant)


# --- checkpoints of libraries ---------------------------------------------------------------------


def by_model_free(scheme: Any) -> Callable[[Path, Path], None]:
    """Quantized by llm-compressor."""

    def make(folder: Path, target: Path) -> None:
        from llmcompressor import model_free_ptq

        model_free_ptq(folder, target, scheme=scheme, ignore=["lm_head", "re:.*embed_tokens"])

    return make


def by_modelopt(folder: Path, target: Path) -> None:
    """Quantized to FP8, one scale for a weight, which is calibrated on a few tokens."""
    import modelopt.torch.quantization as mtq
    import torch
    from modelopt.torch.export import export_hf_checkpoint
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype="bfloat16")
    tokens = torch.arange(64)[None]
    mtq.quantize(model, mtq.FP8_DEFAULT_CFG, lambda model: model(tokens))
    with torch.no_grad():
        export_hf_checkpoint(model, export_dir=target)


def by_autoround(packing: str) -> Callable[[Path, Path], None]:
    """Rounded to nearest, in groups of 128."""

    def make(folder: Path, target: Path) -> None:
        from auto_round import AutoRound
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(folder, dtype="bfloat16")
        tokenizer = AutoTokenizer.from_pretrained(folder)
        rounded = AutoRound(model, tokenizer, bits=4, group_size=128, iters=0, disable_opt_rtn=True)
        rounded.quantize_and_save(f"{target}-made", format=packing)
        # It may make a folder in the folder.
        (config,) = Path(f"{target}-made").rglob("config.json")
        config.parent.rename(target)

    return make


def decoded_by_compressed_tensors(folder: Path, target: Path) -> None:
    """In BF16, by the library's own decoder."""
    from compressed_tensors.entrypoints.convert import (
        CompressedTensorsDequantizer,
        convert_checkpoint,
    )

    # Without it the library would look for the scales of norms.
    converter = CompressedTensorsDequantizer(folder, ignore=["re:.*norm"])
    convert_checkpoint(folder, target, converter)


def decoded_by_formula(folder: Path, target: Path) -> None:
    """In BF16: code, less its zero point, times scale, rounded once."""
    shutil.copytree(folder, target)
    stored, floats = {}, {}
    for path in target.glob("*.safetensors*"):
        stored |= load_file(path) if path.suffix == ".safetensors" else {}
        path.unlink()
    for name, tensor in stored.items():
        module, _, end = name.rpartition(".")
        if end == "qweight":
            codes, scales = _unpacked(tensor, dim=0), stored[f"{module}.scales"].float()
            zeros = _unpacked(stored[f"{module}.qzeros"], dim=1) + 1
            rows = [item.repeat_interleave(128, 0) for item in (zeros, scales)]
            floats[f"{module}.weight"] = ((codes - rows[0]) * rows[1]).T
        elif f"{module}.weight_scale" in stored and end == "weight":
            floats[name] = tensor.float() * stored[f"{module}.weight_scale"]
        elif f"{module}.scales" not in stored and not end.endswith("_scale"):
            floats[name] = tensor
    made = {name: item.bfloat16().contiguous() for name, item in floats.items()}
    save_file(made, target / "model.safetensors")
    config = read_json(target / "config.json")
    write_json(
        target / "config.json", {k: v for k, v in config.items() if k != "quantization_config"}
    )


def _unpacked(words: Any, dim: int) -> Any:
    """Codes of 4 bits along an axis, the lowest first."""
    import torch

    shifts = torch.arange(0, 32, 4)
    found = words[..., None] >> shifts & 15
    return found.transpose(1, 2).flatten(0, 1) if dim == 0 else found.flatten(1)


Make = Callable[[Path, Path], None]
LIBRARIES: dict[str, tuple[Make, Make]] = {
    "compressed-tensors, fp8": (by_model_free("FP8_DYNAMIC"), decoded_by_compressed_tensors),
    "compressed-tensors, blocks": (by_model_free("FP8_BLOCK"), decoded_by_compressed_tensors),
    "compressed-tensors, int4": (by_model_free("W4A16"), decoded_by_compressed_tensors),
    "modelopt": (by_modelopt, decoded_by_formula),
    "auto-round": (by_autoround("auto_round"), decoded_by_formula),
    "auto-round, gptq": (by_autoround("auto_gptq"), decoded_by_formula),
}


@pytest.mark.wide
@pytest.mark.parametrize("quant", ["mlx", "int4"])
@pytest.mark.parametrize("library", LIBRARIES)
def test_a_checkpoint_of_a_library_builds_as_its_floats(
    shop: Workshop, library: str, quant: str
) -> None:
    """As the libraries write it, files and config."""
    pytest.importorskip(library.partition(",")[0].replace("-", "_"))
    make, decode = LIBRARIES[library]
    source = write_zoo(shop.root / "source", "qwen3", "hub")
    quantized, plain = shop.root / "quantized", shop.root / "plain"
    make(source, quantized)
    for name in TOKENIZER_FILES:
        shutil.copy(source / name, quantized / name)
    decode(quantized, plain)
    shop.build(quantized, quant, {"decode": {}})
    ours, config = shop.tensors(quant), shop.config(quant)
    shop.build(plain, quant)

    assert ours == shop.tensors(quant)
    assert config == shop.config(quant)
