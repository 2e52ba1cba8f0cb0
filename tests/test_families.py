"""A second family, plain Llama, by its table or by a package: all that is ours works for it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, Finished, Project
from llama import Llama, announce, llama_config, write_llama
from oneshot import run_oneshot
from tiny import read_all_tensors, read_json, write_json
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoTokenizer,
    LlamaForCausalLM,
)

from carnice_build.backends.compressed_layer import offset_norms
from carnice_build.calibration.driver import Arithmetic, LayerDriver
from carnice_build.calibration.text_model import ModelSource, OpenModel, ResidentModel
from carnice_build.commands.build import build_variants
from carnice_build.commands.verify import VerifySettings, verify_variants
from carnice_build.errors import CheckpointError
from carnice_build.models import architecture_of
from carnice_build.verification.result import Outcome

Carnice = Callable[..., Finished]

CALIBRATION = """
calibration:
  dataset: rows.jsonl
  subset: null
  samples: 3
  length: 48
  threads: 1
  roles: {gpt: assistant, human: user}
"""
AWQ = """
quantize:
  format: compressed-tensors
  algorithm: awq
  targets: [Linear]
  config_groups:
    group_0:
      targets: [Linear]
      weights: {num_bits: 4, symmetric: false, strategy: group, group_size: 128, observer: mse}
  ignore: ['re:.*lm_head']
"""
QUANTIZE = {
    "mlx": "quantize: {format: mlx, bits: 4}",
    "int4": "quantize: {format: autoround, method: nearest}",
    "tuned": "quantize: {format: autoround, method: tune, tune: {iters: 8, lr: 0.03}}",
    "nvfp4": "quantize: {format: nvfp4}",
    "awq": AWQ,
}
MORE = {"tuned": "  joined: true\n", "nvfp4": "", "awq": "  attention: eager\n"}
"""What the calibrated ones need beside the rest."""


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """A project whose variants of a tiny Llama are built, each named as its format."""
    project = Project(tmp_path_factory.mktemp("llama") / "project")
    write_llama(project.root / "source")
    project.recipes.mkdir()
    (project.recipes / "_profiles.yaml").write_text("demo:\n  tiny/llama: source\n")
    _write_dialogues(project.root / "rows.jsonl")
    for name, quantize in QUANTIZE.items():
        text = f"variant: {name}\ndescription: A tiny Llama\n{quantize}\n"
        text += "sources: {body: {model: tiny/llama}}\n"
        project.recipe(name, text + (CALIBRATION + MORE[name] if name in MORE else ""))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(project.root)
        build_variants(list(QUANTIZE), project.options(jobs=1))
        yield project


def _write_dialogues(path: Path) -> None:
    """The first of the demo's."""
    lines = (REPOSITORY / "demo" / "calibration.jsonl").read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join(lines[:12]) + "\n", encoding="utf-8")


def whole_model(project: Project, dtype: str = "bfloat16", attention: str = "sdpa") -> Any:
    """The source as transformers loads and runs it."""
    return LlamaForCausalLM.from_pretrained(
        project.root / "source", dtype=dtype, attn_implementation=attention
    ).eval()


def samples(project: Project) -> list[Tensor]:
    """The tokens that the calibrations see."""
    tokenizer = AutoTokenizer.from_pretrained(project.root / "source")
    roles = {"human": "user", "gpt": "assistant"}
    found = []
    for line in (project.root / "rows.jsonl").read_text().splitlines()[:3]:
        row = json.loads(line)
        turns = [
            {"role": roles.get(turn["from"], turn["from"]), "content": turn["value"]}
            for turn in row["conversations"]
        ]
        text = tokenizer.apply_chat_template(turns, tools=row["tools"] or None, tokenize=False)
        found.append(torch.tensor(tokenizer(text)["input_ids"][:48]))
    return found


def opened(project: Project, dtype: str, attention: str) -> OpenModel:
    weights = whole_model(project).state_dict()
    source = ModelSource(Llama(llama_config(), "llama"), weights.__getitem__)
    return OpenModel(source, Arithmetic(dtype, attention, threads=1))


SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 99,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LINEAR = {"linear_num_value_heads": 4, "linear_num_key_heads": 2}
KINDS = {
    "mistral": ({"sliding_window": 8}, {"full"}),
    "gemma2": ({"sliding_window": 8}, {"full", "sliding"}),
    "granite": ({"residual_multiplier": 0.5}, {"full"}),
    "qwen3_moe": (EXPERTS, {"full"}),
    "qwen3_next": ({**EXPERTS, **LINEAR}, {"full", "linear"}),
}


@pytest.mark.parametrize("model_type", KINDS)
def test_layers_of_any_model_are_run_as_by_their_model(model_type: str) -> None:
    """Whatever a model calls its layers with, each alone has the outputs that it has there."""
    options, kinds = KINDS[model_type]
    config = CONFIG_MAPPING[model_type](**SIZES, **options)
    config._attn_implementation = "eager"
    # By default transformers runs the experts of a layer in one go, with other roundings.
    config._experts_implementation = "eager"
    whole: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config).eval()
    types = getattr(config, "layer_types", None) or ["full_attention"] * 4
    calls: list[tuple[Tensor, Tensor]] = []

    def watch(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        calls.append((inputs[0], output))

    for layer in whole.model.layers:
        layer.register_forward_hook(watch)
    with torch.no_grad():
        whole(torch.arange(1, 18)[None], use_cache=False)
    arithmetic = Arithmetic("float32", "eager", threads=torch.get_num_threads())

    assert {name.removesuffix("_attention") for name in types} == kinds
    for index, (hidden, output) in enumerate(calls):
        driver, layer = LayerDriver(config.to_dict(), index, arithmetic), whole.model.layers[index]
        assert torch.equal(output, driver.run(driver.layer(layer.state_dict()), hidden))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_hidden_states_and_logits_are_those_of_the_whole_model(
    llama: Project, dtype: str, attention: str
) -> None:
    """One layer at a time gives every hidden state and every logit by the bits."""
    whole, model = whole_model(llama, dtype, attention), opened(llama, dtype, attention)
    tokens = samples(llama)[0]
    with torch.no_grad():
        expected = whole(tokens[None], use_cache=False, output_hidden_states=True)

    (state,) = model.embedded([tokens])
    found = [state.hidden]
    for index in range(model.architecture.num_layers):
        state = model.layer(index)(state)
        found.append(state.hidden)
    ending = model.ending()
    found[-1] = ending.states(found[-1])

    assert all(map(torch.equal, expected.hidden_states, found))
    assert torch.equal(expected.logits, ending.scores(found[-1]))


def test_a_continuation_is_that_of_transformers(llama: Project) -> None:
    """The model that verify runs writes what greedy `generate` writes."""
    prompt = samples(llama)[0]
    generated = whole_model(llama, "float32").generate(
        prompt[None],
        attention_mask=torch.ones_like(prompt[None]),
        max_new_tokens=8,
        min_new_tokens=8,
        do_sample=False,
    )

    said = ResidentModel(opened(llama, "float32", "sdpa")).continue_greedily(prompt, 8)

    assert torch.equal(generated[0], said.tokens)


def test_mlx_folders_are_those_of_mlx_lm(llama: Project, tmp_path: Path) -> None:
    """Tensors and config.json are what `mlx_lm.convert` writes."""
    from mlx_lm.convert import convert

    convert(str(llama.root / "source"), str(tmp_path / "theirs"), quantize=True, q_bits=4)

    assert read_all_tensors(tmp_path / "theirs") == read_all_tensors(llama.out / "mlx")
    assert read_json(tmp_path / "theirs" / "config.json") == read_json(
        llama.out / "mlx" / "config.json"
    )


def test_input_scales_are_those_of_the_whole_model(llama: Project) -> None:
    """Each is the largest input that hooks on transformers' model see, over 2688, by the bits."""
    whole = whole_model(llama)
    amax: dict[str, float] = {}

    def watch(name: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            amax[name] = max(amax.get(name, 0.0), inputs[0].abs().max().item())

        return hook

    for name, module in whole.model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(watch(f"model.{name}"))
    for tokens in samples(llama):
        with torch.no_grad():
            whole(tokens[None], use_cache=False)
    built = read_all_tensors(llama.out / "nvfp4")
    found = {
        name.removesuffix(".input_scale"): np.frombuffer(tensor.data, "<f4")[0]
        for name, tensor in built.items()
        if name.endswith(".input_scale")
    }

    assert 7 * 3 == len(found)
    assert found == {name: np.float32(amax[name]) / np.float32(2688) for name in found}


def test_awq_folders_are_those_of_oneshot(llama: Project, tmp_path: Path) -> None:
    """Every tensor that llm-compressor writes has our bits, gains without an offset among them."""
    rows = sorted(samples(llama), key=len, reverse=True)
    reference = run_oneshot(
        "mse",
        tmp_path,
        rows,
        model=whole_model(llama, attention="eager"),
        layer="LlamaDecoderLayer",
    )

    assert read_all_tensors(reference.folder) == read_all_tensors(llama.out / "awq")
    theirs = read_json(tmp_path / "config.json")["quantization_config"]
    ours = read_json(llama.out / "awq" / "config.json")["quantization_config"]
    assert theirs["ignore"] == ours["ignore"]


def test_the_table_knows_the_norms_that_the_library_converts() -> None:
    """A Llama's gains are stored as they are, which the table and llm-compressor agree on."""
    arithmetic = Arithmetic("bfloat16", "eager", threads=1)
    driver = LayerDriver(llama_config(), 0, arithmetic)
    facts = Llama(llama_config(), "llama").tensors.values()
    layer = driver.layer(
        {
            fact.name.removeprefix("model.layers.0."): torch.ones(fact.shape)
            for fact in facts
            if fact.layer == 0
        }
    )

    assert [] == offset_norms(layer)


def test_tuning_beats_rounding_to_nearest(llama: Project) -> None:
    """auto-round tunes every layer, and each is nearer to the given one than when rounded."""
    figures = read_json(llama.out / "tuned" / "build.json")["figures"]
    losses = [value for name, value in figures.items() if name.startswith("loss of layer")]

    assert 3 == len(losses)
    assert all(tuned < nearest for nearest, tuned in losses)


@pytest.mark.parametrize("variant", QUANTIZE)
def test_what_is_built_verifies(llama: Project, variant: str) -> None:
    """No check of the files of any format fails, and their weights are near the source's."""
    (result,) = verify_variants([variant], llama.options(), VerifySettings(run=False)).variants

    assert [] == [check for check in result.checks if check.outcome is Outcome.FAILED]
    assert "round trip" in {check.name for check in result.checks}


@pytest.mark.parametrize("variant", ["nvfp4", "awq"])
def test_what_is_built_runs(llama: Project, carnice: Carnice, variant: str) -> None:
    """In a process of its own the model generates and is measured, and drafts nothing."""
    text = REPOSITORY / "demo" / "heldout.txt"
    finished = carnice("verify", variant, "--text", text, "--samples", 2, "--json")
    (result,) = json.loads(finished.out)["variants"]
    found = {check["name"]: check for check in result["checks"]}

    assert "passed" == found["generate"]["outcome"], found["generate"]
    assert "passed" == found["perplexity"]["outcome"]
    assert "skipped" == found["mtp"]["outcome"]


def test_variants_are_explained_and_compared(llama: Project, carnice: Carnice) -> None:
    """`explain` names what would run, and `diff` pairs the modules of two formats."""
    explained = carnice("explain", "nvfp4", "--set", "calibration.length=32")
    compared = carnice("diff", "build/int4", "build/nvfp4", "--json")

    assert (0, 0) == (explained.code, compared.code), explained.err + compared.err
    assert "calibration.tokens: length 48 -> 32" in explained.out
    names = {fact.module for fact in Llama(llama_config(), "llama").tensors.values()}
    assert names == set(json.loads(compared.out)["modules"])


def test_grouped_queries_are_smoothed_as_far_as_they_fit() -> None:
    """Without as many keys as queries, values cannot be smoothed into what reads them."""
    grouped = Llama(llama_config(kv_heads=1), "llama")

    assert "self_attn.v_proj" not in {mapping.smooth for mapping in grouped.smoothing}


def test_a_packages_family_is_among_those_that_are_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error for an unknown model type names the types of packages, too."""
    announce(tmp_path, "llama:Llama", monkeypatch, name="plain_llama")

    with pytest.raises(CheckpointError, match=r"such as .*plain_llama"):
        architecture_of({"model_type": "lama"}, "here")


def test_a_packages_family_builds_as_ours(
    llama: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint of a type that only a package knows gives the tensors that our table gives."""
    announce(tmp_path / "site", "llama:Llama", monkeypatch, name="plain_llama")
    project = Project(tmp_path / "project")
    shutil.copytree(llama.root / "source", project.root / "source")
    config = {**llama_config(), "model_type": "plain_llama"}
    write_json(project.root / "source" / "config.json", config)
    shutil.copytree(llama.recipes, project.recipes)
    monkeypatch.chdir(project.root)
    build_variants(["int4"], project.options(jobs=1))

    assert read_all_tensors(llama.out / "int4") == read_all_tensors(project.out / "int4")


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("no_such_module:Llama", "cannot be loaded: ModuleNotFoundError"),
        ("llama:NoSuchClass", "cannot be loaded: AttributeError"),
        ("llama:ConfigReader", "makes a ConfigReader"),
        ("llama:Architecture", "is no family: TypeError"),
        ("llama:announce", "is no family"),
    ],
)
def test_a_broken_family_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str, said: str
) -> None:
    """It names the package and what is wrong with it; our own families go on working."""
    announce(tmp_path, value, monkeypatch, name="broken")

    with pytest.raises(CheckpointError, match=f"'broken' of plain-llama, .*{said}"):
        architecture_of({"model_type": "broken"}, "here")
