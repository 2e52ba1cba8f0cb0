"""`carnice verify` of NVFP4: what a build left passes, what was done to it since is named.

The model is the demo's; what verify measures is held against transformers' whole model with
weights that are dequantized here, from the published tables of E2M1 and E4M3.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from demo_model import heldout, whole_model
from qwen import BODY
from safetensors.torch import load_file
from tiny import read_json, write_json
from verifying import Copy

from carnice_build.commands.build import build_variants
from carnice_build.commands.options import Options
from carnice_build.commands.verify import VariantResult, VerifyResult, VerifySettings
from carnice_build.commands.verify import verify_variants as verify
from carnice_build.extras import pip_install
from carnice_build.formats.nvfp4.stored import allowance
from carnice_build.kernels import nvfp4
from carnice_build.report.verify_table import verify_json
from carnice_build.verification import run_torch
from carnice_build.verification.result import Check, Outcome
from carnice_build.verification.running import Drafts, too_large

VARIANT = "qwen-nvfp4-text-mtp"
LENGTH, SAMPLES = 160, 3
QUERY, KEY = (f"{BODY}layers.3.self_attn.{name}_proj" for name in "qk")
UP = f"{BODY}layers.1.mlp.up_proj"
WITH_ACTIVATIONS = f"{VARIANT}, activations in NVFP4"


@dataclass(frozen=True)
class Built:
    """A build of the variant, which tests do not change, and what verify says of it."""

    options: Options
    report: VerifyResult

    @property
    def folder(self) -> Path:
        """The variant's folder."""
        return self.options.out / VARIANT


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    root = tmp_path_factory.mktemp("nvfp4")
    options = Options(
        recipes=REPOSITORY / "recipes",
        out=root / "build",
        cache=root / "cache",
        jobs=2,
        overrides=("calibration.samples=2", "calibration.length=64"),
    )
    build_variants([VARIANT], options)
    settings = VerifySettings(samples=SAMPLES, lengths=(LENGTH,))
    return Built(options, verify([VARIANT], options, settings))


@pytest.fixture
def copied(built: Built, tmp_path: Path) -> Copy:
    return Copy.of(VARIANT, built.options, tmp_path)


def checks(result: VariantResult) -> Mapping[str, Check]:
    """The checks by name."""
    return {check.name: check for check in result.checks}


def test_a_fresh_build_passes_every_check(built: Built) -> None:
    """Nothing is skipped, and the figures can be written as JSON."""
    (result,) = built.report.variants

    assert {
        "digests": Outcome.PASSED,
        "structure": Outcome.PASSED,
        "chat": Outcome.PASSED,
        "round trip": Outcome.PASSED,
        "generate": Outcome.PASSED,
        "perplexity": Outcome.PASSED,
        "mtp": Outcome.PASSED,
        "fidelity": Outcome.PASSED,
        "calls": Outcome.PASSED,
    } == {check.name: check.outcome for check in result.checks}, result
    json.dumps(verify_json(built.report), allow_nan=False)


def test_errors_are_told_by_module_and_by_kind(built: Built) -> None:
    """Every quantized module has its relative error, about a tenth for weights like normal ones."""
    details = checks(built.report.variants[0])["round trip"].details

    assert 50 == len(details["modules"]) == sum(kind["modules"] for kind in details["kinds"])
    assert all(0.08 < error < 0.11 for error in details["modules"].values())
    assert {"mlp.up_proj", "self_attn.q_proj", "linear_attn.out_proj"} <= {
        kind["kind"] for kind in details["kinds"]
    }
    assert 0 == details["not_compared"]


E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])


def dequantized(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder, the quantized ones as what they stand for."""
    stored: dict[str, torch.Tensor] = {}
    for shard in folder.glob("*.safetensors"):
        stored |= load_file(shard)
    found = {}
    for name, tensor in stored.items():
        if tensor.dtype is torch.uint8:
            codes = torch.stack([tensor & 15, tensor >> 4], dim=-1).flatten(1)
            scales = stored[f"{name}_scale"].float() * stored[f"{name}_scale_2"]
            tensor = E2M1[codes.int()] * scales.repeat_interleave(16, dim=1)
        if not name.endswith("_scale") and not name.endswith("_scale_2"):
            found[name] = tensor
    return found


def log_probabilities(weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Float64 [samples, length - 1, vocabulary] by transformers' whole model with `weights`."""
    model = whole_model("float32", "sdpa")
    renamed = {
        name.replace("language_model.", ""): tensor
        for name, tensor in weights.items()
        if not name.startswith("mtp.")
    }
    assert not model.load_state_dict(renamed, strict=False).unexpected_keys
    with torch.no_grad():
        logits = [
            model(row[None], use_cache=False).logits[:, :-1] for row in heldout(SAMPLES, LENGTH)
        ]
    return torch.cat(logits).double().log_softmax(-1)


def test_figures_are_those_of_transformers_model_with_dequantized_weights(built: Built) -> None:
    """Perplexity and KL are what the whole model gives on the same tokens."""
    exact, rounded = log_probabilities({}), log_probabilities(dequantized(built.folder))
    targets = heldout(SAMPLES, LENGTH)[:, 1:, None]
    perplexities = [(-item.gather(-1, targets)).mean().exp().item() for item in (exact, rounded)]
    divergence = (exact.exp() * (exact - rounded)).sum(-1).mean().item()

    rows = {row.name: row.found[0] for row in built.report.perplexities}

    assert pytest.approx(perplexities[0], rel=1e-5) == rows["BF16"].mean
    assert pytest.approx(perplexities[1], rel=1e-5) == rows[VARIANT].mean
    assert pytest.approx(divergence, rel=1e-3) == rows[VARIANT].kl


def test_rounded_activations_cost_more(built: Built) -> None:
    """The source comes first and diverges by nothing; activations in NVFP4 add to the weights."""
    rows = {row.name: row.found[0] for row in built.report.perplexities}

    assert ["BF16", VARIANT, WITH_ACTIVATIONS] == list(rows)
    source, weights, activations = (rows[name].kl for name in rows)
    assert source is not None and weights is not None and activations is not None
    assert 0 == source < weights < activations


def test_the_head_is_worth_grafting(built: Built) -> None:
    """With its head the model yields more tokens a step, and more with more drafts."""
    packaged, quantized, none = (row.drafts for row in built.report.acceptances)

    assert 1 == none[1].mean_length == none[3].mean_length
    for head in (packaged, quantized):
        assert 1.4 < head[1].mean_length < 2
        assert head[1].mean_length < head[3].mean_length < 4
        assert sorted(head[3].rates, reverse=True) == list(head[3].rates)
    assert packaged != quantized


def test_the_error_of_a_mean_length_is_that_of_its_steps() -> None:
    """From the rates alone follows the standard error of the accepted drafts' mean."""
    accepted = np.array([0, 1, 3, 3, 2, 0, 3, 1])
    rates = [float((accepted > k).mean()) for k in range(3)]

    drafts = Drafts(len(accepted), rates)

    assert pytest.approx(1 + accepted.mean()) == drafts.mean_length
    assert pytest.approx(accepted.std() / len(accepted) ** 0.5) == drafts.error


def test_one_wrong_code_is_out_of_bounds(copied: Copy) -> None:
    """A single weight with another code is further from its source than NVFP4 allows."""
    copied.flip(f"{UP}.weight", 17, 4)

    found = copied.problems()

    assert {"digests", "round trip"} == set(found)
    assert f"{UP}: 1 weights" in found["round trip"]


def test_members_of_a_fusion_must_share_their_scale(copied: Copy) -> None:
    """Another weight_scale_2 in one of q, k and v is told, and the weights are off too."""
    copied.edit(f"{KEY}.weight_scale_2", double)

    found = copied.problems()

    assert {"digests", "structure", "round trip"} == set(found)
    assert "fused linears differ in weight_scale_2" in found["structure"]
    assert KEY in found["round trip"] and QUERY not in found["round trip"]


def test_members_of_a_fusion_must_share_their_input_scale(copied: Copy) -> None:
    """Another input_scale in one of them is told, though no weight depends on it."""
    copied.edit(f"{KEY}.input_scale", double)

    found = copied.problems()

    assert {"digests", "structure"} == set(found)
    assert "fused linears differ in input_scale" in found["structure"]


def test_a_scale_that_is_no_number_is_named(copied: Copy) -> None:
    """An input_scale of zero would divide by zero in the engine."""
    name = f"{UP}.input_scale"
    copied.edit(name, lambda data: data.__setitem__(slice(4), bytes(4)))

    assert f"tensor {name} is no positive number" in copied.problems()["structure"]


def double(data: bytearray) -> None:
    """Twice the float32."""
    data[:] = (2 * np.frombuffer(data, "<f4")).tobytes()


FUSED = "mtp.layers.0.self_attn.qkv_proj"


@pytest.mark.parametrize(
    ("removed", "added", "problem"),
    [
        ("mtp.fc", None, "does not list mtp.fc"),
        (FUSED, None, f"does not list {FUSED}"),
        ("lm_head", None, "does not list lm_head"),
        (f"{BODY}layers.0.linear_attn.conv1d", None, "layers.0.linear_attn.conv1d"),
        (None, UP, f"lists {UP}, which is quantized"),
        (None, UP.replace("up_proj", "gate_up_proj"), "gate_up_proj, which is quantized"),
        (None, "mtp.layers.1.mlp.up_proj", "which is no module of the model"),
    ],
)
def test_the_ignore_list_must_be_exact(
    copied: Copy, removed: str | None, added: str | None, problem: str
) -> None:
    """What is plain is ignored, and nothing else, under the names of modules and of fused ones."""
    for file, path in (
        ("config.json", ("quantization_config", "ignore")),
        ("hf_quant_config.json", ("quantization", "exclude_modules")),
    ):
        content = read_json(copied.folder / file)
        section, key = path
        names = set(content[section][key])
        content[section][key] = sorted((names - {removed}) | ({added} if added else set()))
        write_json(copied.folder / file, content)

    found = copied.problems()["structure"]

    assert problem in found
    assert 1 == len(found.splitlines())


@pytest.mark.parametrize(
    ("file", "change", "problem"),
    [
        ("config.json", {"quant_algo": "FP8"}, "states quant_algo 'FP8' instead of 'NVFP4'"),
        ("config.json", {"quant_method": None}, "states quant_method None"),
        ("hf_quant_config.json", {"group_size": 32}, "states group_size 32 instead of 16"),
        ("hf_quant_config.json", {"exclude_modules": ["lm_head"]}, "ignores other modules"),
    ],
)
def test_both_configs_must_agree(
    copied: Copy, file: str, change: Mapping[str, Any], problem: str
) -> None:
    """config.json and its twin state one format of one list of modules."""
    content = read_json(copied.folder / file)
    content["quantization_config" if file == "config.json" else "quantization"].update(change)
    write_json(copied.folder / file, content)

    assert problem in copied.problems()["structure"]


def test_a_missing_mtp_tensor_is_named(copied: Copy) -> None:
    """A head without one of its 15 tensors fails by that tensor's name."""
    name = "mtp.layers.0.self_attn.k_proj.weight"
    copied.rewrite(name, lambda tensors: tensors.__delitem__(name))

    assert f"tensor {name} is missing" in copied.problems()["structure"]


def test_a_plain_tensor_must_equal_its_source(copied: Copy) -> None:
    """The BF16 head of the build is the source's, byte for byte."""
    copied.flip("mtp.fc.weight", 0, 1)

    assert "tensor mtp.fc.weight is not equal to its source" == copied.problems()["round trip"]


def test_launches_must_name_the_templates_parser(copied: Copy) -> None:
    """A launch with another tool-call parser would read none of the model's calls."""
    for name in ("production.sh", "compose.yaml"):
        path = copied.folder / "serve" / name
        text = path.read_text(encoding="utf-8")
        path.write_text(text.replace("qwen3_xml", "hermes"), encoding="utf-8")

    found = copied.problems()

    assert {"digests", "chat"} == set(found)
    assert "serve/production.sh says --tool-call-parser hermes" in found["chat"]
    assert "serve/compose.yaml says --tool-call-parser hermes" in found["chat"]


def test_a_template_that_loses_arguments_is_told(copied: Copy) -> None:
    """Each task of the five that does not come back is named."""
    path = copied.folder / "chat_template.jinja"
    text = path.read_text(encoding="utf-8")
    damaged = text.replace("value if value is string else value | tojson", "value")
    assert text != damaged
    path.write_text(damaged, encoding="utf-8")

    found = copied.problems()

    assert {"digests", "chat"} == set(found)
    assert "single tool call" in found["chat"]


def test_without_torch_the_rest_is_verified(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    """Running the model is skipped with the way to install what it needs."""
    monkeypatch.setattr(run_torch, "installed", lambda library: False)

    report = verify([VARIANT], built.options)

    assert report.passed
    found = [checks(report.variants[0])[name] for name in run_torch.NAMES]
    assert {Outcome.SKIPPED} == {item.outcome for item in found}
    assert pip_install("torch") in found[-1].summary


def test_a_model_that_does_not_fit_is_not_run(
    built: Built, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What needs more memory than there is is skipped, and says how much."""
    monkeypatch.setattr(run_torch, "too_large", lambda size: too_large(size * 10**9))

    # What was measured where there was memory is known.
    report = verify([VARIANT], built.options, VerifySettings(again=True))
    found = checks(report.variants[0])

    for name in run_torch.NAMES:
        assert found[name].outcome is Outcome.SKIPPED
        assert "of memory; this machine has" in found[name].summary


BLOCKS: dict[str, Callable[[np.random.Generator], np.ndarray[Any, Any]]] = {
    "normal": lambda random: random.standard_normal((128, 512)),
    "signs": lambda random: np.sign(random.standard_normal((128, 512))),
    "outliers": lambda random: random.standard_t(1, (128, 512)).clip(-1e3, 1e3),
    "many magnitudes": lambda random: (
        random.standard_normal((128, 512))
        * np.exp2(random.integers(-30, 0, (128, 32))).repeat(16, axis=1)
    ),
    "tiny": lambda random: random.standard_normal((128, 512)) * 1e-30,
    "zeros": lambda random: np.zeros((128, 512)),
}


@pytest.mark.parametrize("kind", BLOCKS)
def test_the_bound_holds_for_every_weight(kind: str) -> None:
    """No weight that the quantizer made is outside, whatever its block looks like."""
    values = BLOCKS[kind](np.random.default_rng(0)).astype(np.float32)
    scale_2 = nvfp4.weight_scale_2(np.abs(values).max())
    off, allowed = round_trip(values, scale_2)

    assert (off <= allowed).all()


def test_the_bound_is_nearly_reached() -> None:
    """Some weights are off by almost as much as the bound says, so it could not be much less."""
    values = np.random.default_rng(0).standard_normal((512, 512)).astype(np.float32)
    off, allowed = round_trip(values, nvfp4.weight_scale_2(np.abs(values).max()))

    assert (off / allowed).max() > 0.9


def round_trip(values: Any, scale_2: Any) -> tuple[Any, Any]:
    """How far each weight is off after the kernels, and how far it may be."""
    rows, columns = values.shape
    packed = np.empty((rows, columns // 2), np.uint8)
    scales = np.empty((rows, columns // 16), np.uint8)
    nvfp4.quantize_rows(values, "F32", scale_2, packed, scales)
    restored = np.empty_like(values)
    nvfp4.dequantize_rows(packed, scales, scale_2, restored)
    off = np.abs(restored - values).reshape(-1, 16)
    return off, allowance(values.reshape(-1, 16), float(scale_2))
