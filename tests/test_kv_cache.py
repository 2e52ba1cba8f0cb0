"""Scales of keys and values for a cache of FP8, held against llm-compressor and modelopt."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from family_builds import build_checked, options_of, write_family, write_texts
from oneshot import run_modifiers, tokenizer
from tiny import read_all_tensors, read_json, read_safetensors, write_safetensors

from carnice_build.calibration.passes import Forward
from carnice_build.commands.plan import plan_variants
from carnice_build.commands.verify import VerifySettings, verify_variants
from carnice_build.errors import CarniceError

SCHEME = {
    "num_bits": 8,
    "type": "float",
    "strategy": "tensor",
    "dynamic": False,
    "symmetric": True,
}
CALIBRATION = """
calibration: {{dataset: rows.jsonl, samples: 3, threads: 1, attention: eager{}}}
"""
COMPRESSED = (
    """
quantize: {{format: compressed-tensors, scheme: {}, kv_cache: {{format: fp8{}}}}}
"""
    + CALIBRATION
)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of a family whose layers all have full attention."""
    return write_family(tmp_path_factory.mktemp("source") / "source", "qwen3", {})


def quantization(folder: Path) -> dict[str, Any]:
    """What config.json states."""
    found: dict[str, Any] = read_json(folder / "config.json")["quantization_config"]
    return found


def oneshot_of(source: Path, folder: Path, texts: list[str], scheme: str, **cache: Any) -> Path:
    """What the library makes of the same texts."""
    import torch
    from driving import Checkpoint
    from llmcompressor.modifiers.quantization import QuantizationModifier

    from carnice_build.calibration.driver import Arithmetic, decoder_layers

    model = Checkpoint(source).whole(Arithmetic("bfloat16", "eager", threads=1))
    modifier = QuantizationModifier(
        scheme=scheme, ignore=["lm_head"], kv_cache_scheme={**SCHEME, **cache}
    )
    run_modifiers(
        [modifier],
        folder,
        [torch.tensor(tokenizer()(text)["input_ids"]) for text in texts],
        model,
        type(decoder_layers(model)[1][0]).__name__,
    )
    return folder


@pytest.mark.parametrize("observer", ["minmax", "static_minmax"])
def test_scales_are_those_of_oneshot(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, observer: str
) -> None:
    """Every tensor and config.json; the samples pass in another order than the library's."""
    monkeypatch.chdir(tmp_path)
    texts = write_texts(tmp_path / "rows.jsonl")
    more = "" if observer == "minmax" else f", observer: {observer}"
    folder = build_checked(tmp_path, source, "mine", COMPRESSED.format("FP8_DYNAMIC", more, ""))
    named = {} if observer == "minmax" else {"observer": observer}
    theirs = oneshot_of(source, tmp_path / "theirs", texts, "FP8_DYNAMIC", **named)
    ours = read_all_tensors(folder)

    assert read_all_tensors(theirs) == ours
    assert quantization(theirs) == quantization(folder)
    assert 8 == sum(name.endswith((".k_scale", ".v_scale")) for name in ours)


def planned(root: Path, source: Path, name: str, recipe: str) -> Any:
    """The plan of a recipe that is written to `root`."""
    recipes = root / "recipes"
    recipes.mkdir(exist_ok=True)
    (recipes / "_profiles.yaml").write_text("demo: {}\n")
    (recipes / f"{name}.yaml").write_text(
        f"variant: {name}\ndescription: A\nsources: {{body: {{model: a/b}}}}\n{recipe}"
    )
    if not (root / "rows.jsonl").exists():
        write_texts(root / "rows.jsonl")
    return plan_variants([name], options_of(root, source))


def passes(plan: Any) -> set[str]:
    """The passes through decoder layers that a plan has."""
    return {action.identity for action in plan.graph if isinstance(action.op, Forward)}


def scales(plan: Any) -> list[str]:
    """The names of the scales that are published."""
    (variant,) = plan.variants
    names = (tensor.name for tensor in variant.conversion.tensors)
    return [name for name in names if name.endswith((".k_scale", ".v_scale"))]


NVFP4 = "quantize: {{format: nvfp4{}}}\n" + CALIBRATION
CACHE = ", kv_cache: {format: fp8}"


def test_no_pass_is_for_the_scales_alone(source: Path, tmp_path: Path) -> None:
    """Recipes with and without them, of both formats, have the same passes."""
    recipes = {
        "plain": NVFP4.format("", ""),
        "cached": NVFP4.format(CACHE, ""),
        "compressed": COMPRESSED.format("NVFP4", "", ""),
        "widest": COMPRESSED.format("FP8_DYNAMIC", ", observer: static_minmax", ""),
    }
    plans = [planned(tmp_path, source, name, recipe) for name, recipe in recipes.items()]

    assert 1 == len({frozenset(passes(plan)) for plan in plans})
    assert 4 == len(passes(plans[0]))
    assert [0, 8, 8, 8] == [len(scales(plan)) for plan in plans]


def test_parts_find_the_same_scales(source: Path, tmp_path: Path) -> None:
    """In the order of the library, whatever parts the samples are in."""
    write_texts(tmp_path / "rows.jsonl")
    whole, cut = (
        read_all_tensors(
            build_checked(tmp_path, source, name, COMPRESSED.format("FP8_DYNAMIC", "", more))
        )
        for name, more in (("whole", ""), ("cut", ", parts: 2"))
    )
    assert whole == cut


def test_a_layer_that_is_given_anothers_keys_has_no_scales(tmp_path: Path) -> None:
    """Gemma 4's last layers, as in llm-compressor, which finds no `k_proj` in them.

    modelopt has those of the layer whose keys they are.
    """
    source = write_family(tmp_path / "source", "gemma4", {})
    plan = planned(tmp_path, source, "a", COMPRESSED.format("FP8_DYNAMIC", "", ""))
    config = read_json(source / "config.json")["text_config"]
    own = config["num_hidden_layers"] - config["num_kv_shared_layers"]

    assert config["num_kv_shared_layers"] > 0
    assert 2 * own == len(scales(plan))
    plan = planned(tmp_path, source, "b", NVFP4.format(CACHE, ""))
    (variant,) = plan.variants
    refs = {t.name: t.ref.identity for t in variant.conversion.tensors if t.name in scales(plan)}
    assert (2 * config["num_hidden_layers"], 2 * own) == (len(refs), len({*refs.values()}))


def test_a_model_that_caches_latent_vectors_is_refused(tmp_path: Path) -> None:
    """What an engine caches of it is not what the libraries observe."""
    source = write_family(tmp_path / "source", "deepseek_v3", {})
    with pytest.raises(CarniceError, match=r"no layer of .* caches keys and values of its own"):
        planned(tmp_path, source, "a", NVFP4.format(CACHE, ""))


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (NVFP4.format(", kv_cache: {format: int8}", ""), "fp8"),
        (COMPRESSED.format("FP8_DYNAMIC", ", observer: mse", ""), "minmax"),
        (COMPRESSED.format("FP8_DYNAMIC", "", "").partition("calibration:")[0], "calibration"),
        (COMPRESSED.format("W4A16, algorithm: awq", "", ""), "beside algorithm awq"),
    ],
)
def test_what_cannot_be_is_refused(source: Path, tmp_path: Path, recipe: str, message: str) -> None:
    """An unknown type or observer, no calibration, and weights that change after the passes."""
    with pytest.raises(CarniceError) as raised:
        planned(tmp_path, source, "a", recipe)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    "recipe", [COMPRESSED.format("FP8_DYNAMIC", "", ""), NVFP4.format(CACHE, "")]
)
def test_verify_finds_a_scale_that_is_no_positive_number(
    source: Path, tmp_path: Path, recipe: str
) -> None:
    """In either format."""
    write_texts(tmp_path / "rows.jsonl")
    folder = build_checked(tmp_path, source, "mine", recipe)
    shards = {path: read_safetensors(path) for path in folder.glob("*.safetensors")}
    shard, tensors, name = next(
        (path, tensors, name)
        for path, tensors in shards.items()
        for name in tensors
        if name.endswith("k_scale")
    )
    zero = bytes(len(tensors[name].data))
    shard.unlink()
    write_safetensors(shard, {**tensors, name: replace(tensors[name], data=zero)})
    options = options_of(tmp_path, source)
    (result,) = verify_variants(["mine"], options, VerifySettings(run=False)).variants
    found = [line for check in result.checks for line in check.problems]

    assert any(f"{name} is no positive number" in line for line in found)


def test_vllm_takes_stored_scales_for_e4m3_alone(tmp_path: Path) -> None:
    """A launch for cards that lack it is refused, unless the recipe gives it another cache."""
    sizes = {"max_position_embeddings": 262144, "intermediate_size": 512}
    source = write_family(tmp_path / "source", "qwen3", sizes)
    recipe = COMPRESSED.format("W4A16", "", "")
    served = "package: {{serve: {{profile: w4a16-vllm{}}}}}\n"
    with pytest.raises(CarniceError, match="E4M3"):
        planned(tmp_path, source, "a", recipe + served.format(""))
    other = ", launches: {ampere: {flags: {kv-cache-dtype: bfloat16}}}"

    assert 8 == len(scales(planned(tmp_path, source, "b", recipe + served.format(other))))


def test_infinite_keys_end_a_pass() -> None:
    """With the name of the attention."""
    import torch

    from carnice_build.calibration.watch import Caches, NonFiniteInput

    keys = torch.tensor([[1.0, float("inf")]])
    with pytest.raises(NonFiniteInput, match="self_attn"):
        Caches().see("self_attn", keys, torch.ones(1, 2))
