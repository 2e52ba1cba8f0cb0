"""INT4 builds of every family, held against auto-round itself."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from auto_round import AutoRound, RTNConfig, SignRoundConfig
from auto_round.algorithms.composer import AlgorithmComposer
from auto_round.special_model_handler import _attach_gemma4_rotary_emb
from driving import Checkpoint
from family_builds import build_checked, options_of, write_family
from oneshot import tokenizer
from tiny import Tensor, bf16, read_all_tensors, read_json
from transformers import AutoTokenizer, set_seed
from zoo import FAMILIES, TOKENIZER, Layout, write_zoo

from carnice_build.calibration.driver import Arithmetic
from carnice_build.checkpoint.checkpoint import open_checkpoint
from carnice_build.commands.plan import plan_variants
from carnice_build.errors import PlanError
from carnice_build.models import architecture_of, known_types
from carnice_build.models.base import Part, Role
from carnice_build.recipe.patterns import Patterns

NEAREST = "quantize: {format: autoround, method: nearest}\n"
KEPT = {
    "gemma4": "quantize: {format: autoround, method: nearest, keep: ['*.per_layer_projection.*']}\n"
}
"""Of the tiny Gemma 4, what is too narrow for groups of 128."""

OFTEN = ("llama", "qwen3_moe")
"""What is compared every time; the rest is by `make test-wide`."""

DECODED = {
    ("deepseek_v3", "hub"),
    ("gpt_oss", "hub"),
    ("minimax_m2", "hub"),
    ("qwen3_moe_fp8", "hub"),
}
"""What the hub has in FP8 or MXFP4; `test_quantized_sources` builds from these."""

RENAMED = {("gemma3", "transformers")}
"""What needs a step, for transformers spells the tower in another way than the hub."""

LOADED = ("gpt_oss",)
"""Whose experts the library's mode without a model takes for what they are not: it halves gate and
up where they take turns, and rows where there are columns.  It is right when it loads the model."""


def marked(family: str, *values: Any, often: Sequence[str] = OFTEN) -> Any:
    """The parameters of a case, of which few are run every time."""
    marks = () if family in often else pytest.mark.wide
    return pytest.param(family, *values, marks=marks)


TUNE = """
calibration: {dataset: rows.jsonl, samples: 4, length: 32, threads: 1}
quantize: {format: autoround, method: tune, tune: {iters: 4, lr: 0.03, batch_size: 2}}
"""
TEXTS, LENGTH = 4, 32

TUNED = [
    marked(family, often=["qwen3_moe"])
    for family in (
        "llama",
        "qwen3",
        "qwen3_moe",
        "qwen2",
        "mistral3",
        "gemma3_text",
        "phi3",
        "glm4_moe",
        "deepseek_v3",
        "qwen3_5_moe",
        "qwen3_next",
        "mixtral",
        "minimax_m2",
        "gemma4_moe",
    )
]

ALIKE = {"gemma3_text": 5}
"""How many layers the library runs as the model does, where not all: it calls each with what it saw
the first called with, and the sixth of Gemma 3 is the first of another kind, with other angles."""

CASES = [
    marked(family, layout)
    for family, entry in FAMILIES.items()
    if entry.model_type in known_types()
    for layout in ("transformers", "hub")
    if (family, layout) not in DECODED | RENAMED
]


def plain_linears(folder: Path) -> list[str]:
    """What the config of a folder leaves at 16 bits."""
    stated = read_json(folder / "config.json")["quantization_config"]
    return [name for name, entry in stated["extra_config"].items() if entry["bits"] == 16]


@pytest.mark.parametrize(("family", "layout"), CASES)
def test_round_to_nearest_is_auto_rounds(tmp_path: Path, family: str, layout: Layout) -> None:
    """Every tensor that it makes without a model, shard by shard, told to leave alone the same.

    Experts are one by one on both sides, whichever way they come.
    """
    source = write_zoo(tmp_path / "source", family, layout)
    ours = build_checked(tmp_path, source, "int4", KEPT.get(family, NEAREST))
    plain = plain_linears(ours)
    library = AutoRound(
        str(source),
        scheme="W4A16",
        alg_configs=RTNConfig(disable_opt_rtn=True),
        layer_config={name: {"bits": 16} for name in plain},
        # What cannot be compiled, for want of memory say, it leaves unquantized, with a warning.
        enable_torch_compile=False,
        **{"disable_model_free" if family in LOADED else "model_free": True},
    )
    library.quantize_and_save(str(tmp_path / "theirs"), format="auto_round")
    (written,) = {path.parent for path in (tmp_path / "theirs").rglob("*.safetensors")}

    assert [] == differing(read_all_tensors(written), read_all_tensors(ours))


def differing(theirs: dict[str, Tensor], ours: dict[str, Tensor]) -> list[str]:
    """Names of tensors that are not the same in both.

    Of norms in F32 in a BF16 model we make BF16, as the library when it loads the model; and it
    makes F16 of the biases of what it packs, where ours are as all that is plain.
    """
    names = theirs.keys() | ours.keys()
    return sorted(name for name in names if not same(name, theirs.get(name), ours.get(name)))


def same(name: str, theirs: Tensor | None, ours: Tensor | None) -> bool:
    if theirs is None or ours is None:
        return False
    match name.rpartition(".")[2], theirs.dtype, ours.dtype:
        case "weight", "F32", "BF16":
            return bf16(floats(theirs)) == ours.data
        case "bias", "F16", "BF16":
            return floats(ours).astype(np.float16).tobytes() == theirs.data
    return theirs == ours


def floats(tensor: Tensor) -> np.ndarray[Any, Any]:
    """The numbers of a tensor in BF16 or F32."""
    if tensor.dtype == "F32":
        return np.frombuffer(tensor.data, np.float32)
    return (np.frombuffer(tensor.data, np.uint16).astype(np.uint32) << 16).view(np.float32)


# --- tuned blocks --------------------------------------------------------------------------------


@pytest.mark.parametrize("family", TUNED)
def test_tuned_blocks_are_those_of_a_run_of_the_whole_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, switches: None, family: str
) -> None:
    """Codes and scales of every linear and every expert's, when every layer draws anew."""
    monkeypatch.chdir(tmp_path)
    source = Checkpoint(write_family(tmp_path / "source", family, {}))
    texts = write_long_texts(tmp_path / "texts.json")
    model, rows = tuned_by_the_library(source, tmp_path, monkeypatch, plain_of(source))
    ordered = sorted(texts, key=lambda text: place_of(text, rows))[:TEXTS]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in ordered))
    ours = read_all_tensors(build_checked(tmp_path, source.folder, "tuned", TUNE))

    modules = [item for item in model.named_modules() if isinstance(item[1], torch.nn.Linear)]
    linears = {name: module for name, module in modules if hasattr(module, "scale")}
    packed = [name.removesuffix(".qweight") for name in ours if name.endswith(".qweight")]
    assert len(linears) == len(packed)
    later = tuple(f"{source.prefix}layers.{n}." for n in range(ALIKE.get(family, 99), 99))
    for name in packed:
        if name.startswith(later):
            continue
        linear: Any = linears[library_path(name, source.prefix)]
        scales = floats16(ours[f"{name}.scales"])
        assert np.array_equal(linear.scale.float().T.numpy(), scales), name
        step = linear.scale.float().repeat_interleave(128, dim=1)
        codes = (linear.weight.float() / step).round() + 8
        assert np.array_equal(codes.numpy(), codes_of(ours[f"{name}.qweight"])), name


@pytest.mark.parametrize(
    ("family", "said"),
    [
        ("nemotron_h", r"cannot tune layer \d: it runs no experts without a gate"),
        ("gpt_oss", "needs attention sdpa, which transformers does not have for gpt_oss"),
        ("gemma4", "cannot tune layer 0, for layers are given per_layer_input"),
    ],
)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_what_the_library_cannot_tune_is_refused_by_the_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, said: str, attention: str
) -> None:
    """Experts that it has no forward pass for, an attention that transformers lacks, and more.

    What to do instead works, and another attention, which tuning does not have, is no way out.
    """
    monkeypatch.chdir(tmp_path)
    source = write_family(tmp_path / "source", family, {})
    (tmp_path / "rows.jsonl").write_text('{"text": "a text"}\n')
    # Too narrow for groups of 128.
    kept = ", keep: ['*.per_layer_projection.*']" if family == "gemma4" else ""
    tuned = TUNE.replace("method: tune", f"method: tune{kept}")
    tuned = tuned.replace("threads: 1", f"threads: 1, attention: {attention}")
    eager = attention == "eager" and family != "gpt_oss"

    with pytest.raises(PlanError, match="attention eager.* expected sdpa" if eager else said):
        plan(tmp_path, source, tuned)
    plan(tmp_path, source, f"quantize: {{format: autoround, method: nearest{kept}}}")


def test_an_attention_that_a_family_lacks_is_refused_by_the_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the other one, which it names, is taken."""
    monkeypatch.chdir(tmp_path)
    source = write_family(tmp_path / "source", "gpt_oss", {})
    (tmp_path / "rows.jsonl").write_text('{"text": "a text"}\n')
    recipe = "calibration: {{dataset: rows.jsonl, samples: 1, length: 16, attention: {}}}\n"
    recipe += "quantize: {{format: nvfp4}}"

    with pytest.raises(PlanError, match="no attention sdpa for gpt_oss") as raised:
        plan(tmp_path, source, recipe.format("sdpa"))
    assert "calibration.attention: eager" == raised.value.expected
    plan(tmp_path, source, recipe.format("eager"))


def plan(root: Path, source: Path, recipe: str) -> None:
    """Plan a variant of the checkpoint `source`; no pass runs."""
    (root / "recipes").mkdir(exist_ok=True)
    (root / "recipes" / "_profiles.yaml").write_text("demo: {}\n")
    (root / "recipes" / "v.yaml").write_text(
        f"variant: v\ndescription: A\nsources: {{body: {{model: a/b}}}}\n{recipe}"
    )
    plan_variants(["v"], options_of(root, source))


@pytest.fixture
def switches() -> Iterator[None]:
    """Sets back what the library's constructor switches on."""
    yield
    torch.use_deterministic_algorithms(False)


def plain_of(source: Checkpoint) -> list[str]:
    """Modules of decoder layers that our format leaves alone, as the library's model has them."""
    opened = open_checkpoint(source.folder)
    architecture = architecture_of(opened.config, opened.where)
    narrow = Patterns(list(architecture.narrow_linears))
    return [
        library_path(fact.module, source.prefix)
        for name, fact in architecture.tensors.items()
        if fact.part is Part.LAYERS and (fact.role is Role.ROUTER or narrow.matches(name))
    ]


def tuned_by_the_library(
    source: Checkpoint, folder: Path, monkeypatch: pytest.MonkeyPatch, plain: list[str]
) -> tuple[Any, list[list[int]]]:
    """The whole model that auto-round tuned, and the samples that it took."""
    compress = AlgorithmComposer.compress_block

    def compress_anew(self: AlgorithmComposer, *args: Any, **options: Any) -> Any:
        set_seed(42)
        return compress(self, *args, **{**options, "input_ids": None})

    monkeypatch.setattr(AlgorithmComposer, "compress_block", compress_anew)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "datasets")
    monkeypatch.setenv("AR_DISABLE_DATASET_SUBPROCESS", "1")
    model = source.whole(Arithmetic("bfloat16", "sdpa", threads=1))
    # Where it reads that the model is text alone, whatever tower the checkpoint has.
    model.config.save_pretrained(folder / "text")
    model.name_or_path = str(folder / "text")
    rows: list[list[int]] = []
    model.get_input_embeddings().register_forward_pre_hook(
        lambda module, inputs: rows.extend(inputs[0].tolist())
    )
    torch.set_num_threads(1)
    if model.config.model_type == "gemma4_text":
        # It does so itself for the class with towers: angles follow the kind of a layer.
        _attach_gemma4_rotary_emb(model)
    library = AutoRound(
        model,
        tokenizer=AutoTokenizer.from_pretrained(source.folder),
        alg_configs=SignRoundConfig(iters=4, lr=0.03),
        layer_config={name: {"bits": 16} for name in plain},
        dataset=str(folder / "texts.json"),
        nsamples=TEXTS,
        seqlen=LENGTH,
        batch_size=2,
        enable_torch_compile=False,
        low_cpu_mem_usage=False,
    )
    quantized, _ = library.quantize()
    return quantized, rows


def write_long_texts(path: Path) -> list[str]:
    """Texts of more than a sample's length, where the library looks for them."""
    text = (TOKENIZER.parent / "heldout.txt").read_text(encoding="utf-8")
    texts = [text[start : start + 1000] for start in range(0, 10_000, 1000)]
    path.write_text(json.dumps([{"text": item} for item in texts]), encoding="utf-8")
    return texts


def place_of(text: str, rows: list[list[int]]) -> int:
    """Which of the samples a text became, behind all of them for none."""
    tokens = tokenizer()(text)["input_ids"][:LENGTH]
    return rows.index(tokens) if tokens in rows else len(rows)


def library_path(name: str, prefix: str) -> str:
    """A module's path in transformers' text model."""
    path = "model." + name.removeprefix(prefix)
    for ours, theirs in (("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj")):
        path = re.sub(rf"(\.experts\.\d+)\.{ours}$", rf"\1.{theirs}", path)
    return path.replace(".block_sparse_moe.", ".mlp.")


def codes_of(qweight: Tensor) -> np.ndarray[Any, Any]:
    """Codes 0 to 15 [out, in], unpacked without our kernels."""
    words = np.frombuffer(qweight.data, np.uint32).reshape(qweight.shape)
    nibbles = np.stack([words >> shift & 15 for shift in range(0, 32, 4)], axis=1)
    return nibbles.reshape(-1, words.shape[1]).T


def floats16(tensor: Tensor) -> np.ndarray[Any, Any]:
    return np.frombuffer(tensor.data, np.float16).reshape(tensor.shape).astype(np.float32)
