"""INT4 builds of the demo checkpoints, held against auto-round itself and against the grid."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from auto_round.utils.missing_tensors import quantize_weight_rtn
from calibrating import cut_demo
from conftest import REPOSITORY
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from carnice_build.backends.autoround import AutoRoundSettings, tune_layer
from carnice_build.calibration.driver import Arithmetic, LayerDriver
from carnice_build.calibration.tokenizing import tokenize
from carnice_build.commands.build import BuildResult, build_variants
from carnice_build.commands.options import Options
from carnice_build.formats.autoround.ops import SUFFIXES
from carnice_build.kernels.autoround_merge import merge_delta, merge_reround
from carnice_build.models import architecture_of

DEMO = REPOSITORY / "demo"
BODY, BASE, GRID = (
    DEMO / name for name in ("carnice-v2-27b", "qwen3.6-27b", "qwen3.6-27b-int4-autoround")
)
RTN, MERGE, TUNE = "int4-rtn", "int4-bf16-mtp", "int4-autoround"

Tensors = dict[str, Tensor]


def tensors_of(folder: Path) -> Tensors:
    """Every tensor of a folder by its canonical name."""
    shards = sorted(folder.glob("*.safetensors"))
    found = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    return {
        re.sub(r"^(model\.)?(language_model\.){2,}(lm_head)?", _canonical, name): tensor
        for name, tensor in found.items()
    }


def _canonical(match: re.Match[str]) -> str:
    return match[3] or "model.language_model."


def packed_modules(tensors: Tensors) -> list[str]:
    return [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Built:
    """Variants of the demo in one cache, and what building each of them took."""

    options: Options
    reports: Mapping[str, BuildResult]

    def folder(self, variant: str) -> Path:
        return self.options.out / variant


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Round to nearest and the merge, one after the other."""
    root = tmp_path_factory.mktemp("int4")
    options = Options(recipes=REPOSITORY / "recipes", out=root / "build", cache=root / "cache")
    return Built(options, {name: build_variants([name], options) for name in (RTN, MERGE)})


@pytest.fixture(scope="module")
def source() -> Tensors:
    """The fine-tune."""
    return tensors_of(BODY)


@pytest.fixture(scope="module")
def grid() -> Tensors:
    """The quantized base."""
    return tensors_of(GRID)


# --- round to nearest ----------------------------------------------------------------------------


def test_round_to_nearest_is_auto_rounds(built: Built, source: Tensors) -> None:
    """qweight, qzeros and scales of every linear are those that auto-round packs, bit for bit."""
    ours = tensors_of(built.folder(RTN))
    modules = packed_modules(ours)

    assert 50 == len(modules)
    for module in modules:
        theirs = quantize_weight_rtn(source[f"{module}.weight"], 4, 128)
        for part, tensor in zip(SUFFIXES, theirs, strict=True):
            assert torch.equal(tensor, ours[f"{module}.{part}"]), f"{module}.{part}"


@pytest.mark.parametrize("variant", [RTN, MERGE])
def test_what_is_not_packed_is_the_fine_tunes(built: Built, source: Tensors, variant: str) -> None:
    """Everything else has the bytes of the fine-tune, and those of the MTP head the base's."""
    ours = tensors_of(built.folder(variant))
    packed = packed_modules(ours)
    rest = {n: t for n, t in ours.items() if n.rpartition(".")[0] not in packed}
    expected = source | {n: t for n, t in tensors_of(BASE).items() if n.startswith("mtp.")}

    assert {torch.bfloat16} == {tensor.dtype for tensor in rest.values()}
    assert all(torch.equal(expected[name], tensor) for name, tensor in rest.items())
    assert {n for n in expected if ".visual." not in n} == rest.keys() | {
        f"{module}.weight" for module in packed
    }


def test_the_mtp_head_has_its_15_tensors(built: Built, grid: Tensors) -> None:
    """Of the grid's 29, 21 of them packed, the BF16 ones of the base are left, `fc` included."""
    head = {n: t for n, t in tensors_of(built.folder(MERGE)).items() if n.startswith("mtp.")}

    assert 29 == len([name for name in grid if name.startswith("mtp.")])
    assert 15 == len(head)
    assert {torch.bfloat16} == {tensor.dtype for tensor in head.values()}
    assert "mtp.fc.weight" in head


# --- the merge -----------------------------------------------------------------------------------


def left_alone(source: Tensors, modules: Sequence[str]) -> list[str]:
    base = tensors_of(BASE)
    return [m for m in modules if torch.equal(source[f"{m}.weight"], base[f"{m}.weight"])]


def test_modules_that_the_fine_tune_left_alone_keep_the_grids_bytes(
    built: Built, source: Tensors, grid: Tensors
) -> None:
    """12 of 50 are not changed: their three tensors are the grid's, and no merge runs for them."""
    ours = tensors_of(built.folder(MERGE))
    alone = left_alone(source, packed_modules(ours))

    assert 12 == len(alone)
    assert 38 == built.reports[MERGE].actions_run
    for module in alone:
        for part in SUFFIXES:
            assert torch.equal(grid[f"{module}.{part}"], ours[f"{module}.{part}"])


def test_a_merge_moves_codes_alone(built: Built, grid: Tensors) -> None:
    """Scales and zero points of every module are the grid's; the codes of 38 differ."""
    ours = tensors_of(built.folder(MERGE))
    modules = packed_modules(ours)
    moved = [m for m in modules if not torch.equal(grid[f"{m}.qweight"], ours[f"{m}.qweight"])]

    assert 38 == len(moved)
    for module in modules:
        for part in SUFFIXES[1:]:
            assert torch.equal(grid[f"{module}.{part}"], ours[f"{module}.{part}"])


@pytest.mark.parametrize("rounding", ["nearest", "delta"])
def test_codes_and_clipped_codes_are_the_kernels(
    built: Built, source: Tensors, grid: Tensors, rounding: str, tmp_path: Path
) -> None:
    """Either rounding gives what its kernel gives, and build.json states what it clipped."""
    overrides = (f"quantize.grid.rounding={rounding}",)
    build_variants(
        [MERGE], Options(**{**vars(built.options), "out": tmp_path, "overrides": overrides})
    )
    ours, base = tensors_of(tmp_path / MERGE), tensors_of(BASE)
    figures = read_json(tmp_path / MERGE / "build.json")["figures"]
    modules = packed_modules(ours)

    assert {f"clipped codes of {module}" for module in modules} == figures.keys()
    for module in modules:
        weight, before = (_bits(tensors[f"{module}.weight"]) for tensors in (source, base))
        qweight, qzeros, scales = (grid[f"{module}.{part}"].numpy() for part in SUFFIXES)
        codes = np.empty_like(qweight)
        if rounding == "delta":
            merged = merge_delta(weight, before, "BF16", 0, qweight, qzeros, scales, codes)
        else:
            merged = merge_reround(weight, "BF16", 0, qweight, qzeros, scales, codes)
        if np.array_equal(weight, before):
            codes, merged = qweight, merged._replace(clipped=0)
        assert np.array_equal(codes, ours[f"{module}.qweight"].numpy()), module
        assert [merged.clipped] == figures[f"clipped codes of {module}"]
    assert sum(figure[0] for figure in figures.values()) > 0


def _bits(tensor: Tensor) -> np.ndarray[Any, Any]:
    return tensor.view(torch.uint16).numpy()


# --- folders -------------------------------------------------------------------------------------


def load(folder: Path) -> tuple[Any, dict[str, Any]]:
    """The model in transformers, and what was missing or left over."""
    loader: Any = AutoModelForCausalLM
    model, report = loader.from_pretrained(folder, output_loading_info=True)
    return model, report


@pytest.mark.parametrize("variant", [RTN, MERGE])
def test_transformers_loads_and_runs_it(built: Built, variant: str) -> None:
    """auto-round's loader finds every tensor, packs none anew, and the logits are numbers."""
    folder = built.folder(variant)
    model, report = load(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = torch.tensor([tokenizer.encode("def main() -> None:")])
    with torch.no_grad():
        logits = model(input_ids=tokens).logits
        longer = model.generate(tokens, max_new_tokens=4, do_sample=False)

    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    assert "QuantLinear" == type(model.model.layers[0].mlp.up_proj).__name__
    assert "Linear" == type(model.model.layers[0].linear_attn.in_proj_a).__name__
    assert logits.isfinite().all()
    assert tokens.shape[1] + 1 <= longer.shape[1]


@pytest.mark.parametrize("variant", [RTN, MERGE])
def test_the_config_names_what_is_packed_as_the_tensors_do(built: Built, variant: str) -> None:
    """Of the blocks that are listed, exactly the linears that `extra_config` does not name.

    It names the tower besides, which an engine builds although the recipe dropped its tensors.
    """
    folder = built.folder(variant)
    stated = read_json(folder / "config.json")["quantization_config"]
    tensors = tensors_of(folder)
    architecture = architecture_of(read_json(folder / "config.json"), str(folder))
    fused = {item.module: item.parts for item in architecture.fusions}
    excepted = {
        name: entry
        for name, entry in stated["extra_config"].items()
        if not name.startswith("model.visual.")
    }
    plain = {n.removesuffix(".weight") for n, t in tensors.items() if n.endswith(".weight")}
    blocks = tuple(f"{block}." for block in stated["block_name_to_quantize"].split(","))

    assert ("model.language_model.layers.",) == blocks
    assert all(module.startswith(blocks) for module in packed_modules(tensors))
    assert all(name in plain or set(fused[name]) <= plain for name in excepted)
    # What is a matrix, is not packed and is not named is the embedding alone.
    unnamed = {m for m in plain - excepted.keys() if tensors[f"{m}.weight"].ndim == 2}
    assert {"model.language_model.embed_tokens"} == unnamed
    assert {16} == {entry["bits"] for entry in excepted.values()}
    assert {
        "lm_head",
        "mtp.fc",
        "mtp.layers.0.self_attn.qkv_proj",
        "mtp.layers.0.mlp.gate_up_proj",
        "model.language_model.layers.0.linear_attn.in_proj_ba",
    } <= excepted.keys()


def test_plain_tensors_can_be_f16(built: Built, tmp_path: Path) -> None:
    """With `plain: float16` everything that is not packed is F16, and the packed bytes stay."""
    overrides = ("quantize.plain=float16",)
    build_variants(
        [RTN], Options(**{**vars(built.options), "out": tmp_path, "overrides": overrides})
    )
    ours, usual = tensors_of(tmp_path / RTN), tensors_of(built.folder(RTN))
    packed = {f"{module}.{part}" for module in packed_modules(usual) for part in SUFFIXES}

    assert usual.keys() == ours.keys()
    for name, tensor in usual.items():
        expected = tensor if name in packed else tensor.to(torch.float16)
        assert torch.equal(expected, ours[name]), name


def test_the_template_and_the_flags_are_hermes(built: Built) -> None:
    """Calls are rendered as JSON, and every launch of vLLM names the parser for that."""
    folder = built.folder(MERGE)
    launches = [
        path.read_text()
        for path in (folder / "serve").glob("*.sh")
        if "vllm serve" in path.read_text() or "--model" in path.read_text()
    ]

    assert "tojson" in (folder / "chat_template.jinja").read_text()
    assert "<function=" not in (folder / "chat_template.jinja").read_text()
    assert 2 == len(launches)
    assert all("--tool-call-parser hermes" in launch for launch in launches)


# --- AutoRound -----------------------------------------------------------------------------------

SAMPLES, LENGTH = 4, 48
KNOBS = (
    "quantize.tune.iters=8",
    "quantize.tune.lr=0.03",
    f"quantize.tune.batch_size={SAMPLES}",
    f"calibration.samples={SAMPLES}",
    f"calibration.length={LENGTH}",
    "calibration.threads=1",
)
# In a batch of all samples the library's choice of the best iteration knows the whole error.
SETTINGS = AutoRoundSettings(iters=8, lr=0.03, batch_size=SAMPLES)
NARROW = dict.fromkeys(("linear_attn.in_proj_a", "linear_attn.in_proj_b"), 16)
KINDS: Sequence[str] = ("linear", "full")


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """AutoRound on two layers of the fine-tune, of one kind each; the project's folder."""
    root = tmp_path_factory.mktemp("tuned")
    for folder in (BODY, BASE):
        cut_demo(folder.name, root / "demo" / folder.name, (2, 7))
    options = Options(
        recipes=REPOSITORY / "recipes",
        out=root / "build",
        cache=root / "cache",
        sources={"body": root / "demo" / BODY.name, "base": root / "demo" / BASE.name},
        overrides=(*KNOBS, f"calibration.samples={SAMPLES}"),
    )
    build_variants([TUNE], options)
    return root


def test_autoround_gives_what_the_library_gives_block_by_block(tuned: Path) -> None:
    """Codes, scales and losses are those of `tune_layer` on the states it made before, by bits."""
    folder = tuned / "build" / TUNE
    ours, source = tensors_of(folder), tensors_of(tuned / "demo" / BODY.name)
    config = read_json(tuned / "demo" / BODY.name / "config.json")["text_config"]
    table = source["model.language_model.embed_tokens.weight"]
    given = [table[tokens].unsqueeze(0) for tokens in _tokens(folder)]
    effective: Sequence[Tensor] | None = None
    losses = []
    for index, kind in enumerate(KINDS):
        prefix = f"model.language_model.layers.{index}."
        weights = {n.removeprefix(prefix): t for n, t in source.items() if n.startswith(prefix)}
        bits = NARROW if kind == "linear" else {}
        settings = AutoRoundSettings(**{**vars(SETTINGS), "layer_bits": bits})
        runner = LayerDriver(config, index, Arithmetic(settings.dtype, "sdpa", threads=1))
        layer = tune_layer(runner, weights, given, effective, settings)
        given, effective = layer.outputs, layer.quantized_outputs
        losses.append([layer.nearest_loss, layer.loss])
        for name, linear in layer.linears.items():
            scales = ours[f"{prefix}{name}.scales"]
            assert torch.equal(linear.scale.T, scales), name
            codes = _codes(ours[f"{prefix}{name}.qweight"])
            step = linear.scale.float().repeat_interleave(128, dim=1)
            assert torch.equal((linear.weight.float() / step).round() + 8, codes), name
    figures = list(read_json(folder / "build.json")["figures"].values())

    assert np.array(losses, np.float32).tolist() == figures


def _tokens(folder: Path) -> Tensor:
    params = {
        "samples": SAMPLES,
        "length": LENGTH,
        "rows": "jsonl",
        "joined": True,
        "roles": {"human": "user", "gpt": "assistant"},
        "template": (folder / "chat_template.jinja").read_text(encoding="utf-8"),
        "special_tokens": {},
    }
    content = np.frombuffer((folder / "tokenizer.json").read_bytes(), np.uint8)
    return torch.tensor(tokenize(params, content, str(DEMO / "calibration.jsonl")))


def _codes(qweight: Tensor) -> Tensor:
    """Float32 [out, in] of 0..15, unpacked without our kernels."""
    nibbles = torch.stack([qweight >> shift & 15 for shift in range(0, 32, 4)], dim=1)
    return nibbles.reshape(-1, qweight.shape[1]).T.float()


def test_tuning_lowers_the_error_of_every_layer(tuned: Path) -> None:
    """build.json states for each layer an error over all samples that is below the nearest's."""
    figures = read_json(tuned / "build" / TUNE / "build.json")["figures"]

    assert [f"loss of layer {index}, nearest and tuned" for index in range(2)] == list(figures)
    assert all(0 < after < before for before, after in figures.values())


def test_a_tuned_folder_loads_and_says_how_it_was_tuned(tuned: Path) -> None:
    """transformers finds every tensor, and the config states iterations, batches and seed."""
    folder = tuned / "build" / TUNE
    model, report = load(folder)
    stated = read_json(folder / "config.json")["quantization_config"]
    with torch.no_grad():
        logits = model(input_ids=torch.arange(20)[None]).logits

    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert logits.isfinite().all()
    assert (8, SAMPLES, 42) == tuple(stated[key] for key in ("iters", "batch_size", "seed"))
