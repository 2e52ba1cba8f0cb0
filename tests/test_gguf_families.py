"""GGUF folders of all families that have tables: each passes its checks, and meets its source."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import REPOSITORY
from family_builds import build_checked, options_of, write_family, write_recipe
from gguf_families import CONFIGS, write_checkpoint
from test_cards import pages
from tiny import write_json
from verifying import Copy
from vocabularies import byte_level, sentencepiece_json

from carnice_build.commands.diff import ModuleDiff, State, diff_folders
from carnice_build.commands.plan import plan_variants
from carnice_build.errors import CheckpointError
from carnice_build.formats.folder import open_folder
from carnice_build.formats.gguf.checks import GgufChecks, block_values
from carnice_build.formats.layout import PackLayout
from carnice_build.formats.values import PlainValues

VOCABULARY = 512
SPECIAL = ("[gMASK]", "<|endoftext|>", "<|user|>", "<|observation|>", "[IMG_BREAK]")
"""Those that the converter looks for in some family."""

WIDTH = 256
"""Of hidden states: a block of K-quants."""

UNLIKE = (
    "llama scaled",
    "mixtral",
    "gemma3",
    "gemma4",
    "gemma4 experts",
    "gpt_oss",
    "deepseek_v3",
    "nemotron_h",
)
"""Those that have between them all that is done to tensors."""

LEFT_OUT = {"gemma3": "vision_tower.vision_model.head.", "deepseek_v3": "model.layers.2."}
"""What names begin with of what no file of a family has."""

REST = [name for name in CONFIGS if name not in UNLIKE]


def build(root: Path, name: str, mix: str) -> tuple[Path, Path]:
    """A checkpoint of a config, and the folder of a mix of it, which passes its checks."""
    model = root / "model"
    if not model.is_dir():
        write_source(model, name)
    pre = "" if name.startswith("gemma4") else ", tokenizer_pre: qwen2"
    recipe = f"quantize: {{format: gguf, mix: {mix}{pre}}}\n"
    return model, build_checked(root, model, mix.lower(), recipe)


def write_source(folder: Path, name: str) -> None:
    """The checkpoint, with a tokenizer of its family's kind."""
    changes = {"vocab_size": VOCABULARY, "hidden_size": WIDTH}
    config = CONFIGS[name]
    text = config.get("text_config")
    changed = {**config, **changes} if text is None else {"text_config": {**text, **changes}}
    write_checkpoint(folder, {**config, **changed})
    gemma = name.startswith("gemma4")
    tokenizer = sentencepiece_json(gemma=True) if gemma else byte_level(*SPECIAL)
    write_json(folder / "tokenizer.json", tokenizer)
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "GPT2Tokenizer"})


def compared(folder: Path, model: Path) -> Mapping[str, ModuleDiff]:
    """What diff says, module by module."""
    return {item.module: item for item in diff_folders(folder, model, 2).modules}


def check_compared(found: Mapping[str, ModuleDiff], most: float, left_out: str = "") -> None:
    """What both have differs by no more than `most`, and nothing is in one of them alone.

    But for what the config alone decides, rows without tokens, and a head that llama.cpp lacks,
    whose names begin with what is `left_out`.
    """
    alone = {name for name, item in found.items() if item.state is State.ONLY_A}
    missing = [name for name, item in found.items() if item.state is State.ONLY_B]
    unread = {name for name, item in found.items() if item.state is State.INCOMPARABLE}
    apart = {name: item.relative for name, item in found.items() if (item.relative or 0) > most}
    constants = {"rope_freqs", "rope_factors_long", "rope_factors_short"}
    assert alone <= {*constants, "v.token_embd.img_break"}
    assert all(left_out and name.startswith(left_out) for name in missing)
    assert all(name.endswith("embed_tokens") for name in unread)
    assert {} == apart


@pytest.mark.parametrize("name", UNLIKE)
def test_a_build_passes_and_every_module_is_found(tmp_path: Path, name: str) -> None:
    """All weights are within their bounds, and meet those of the source by their names."""
    mix = "MXFP4_MOE" if name == "gpt_oss" else "Q4_K_M"
    model, folder = build(tmp_path, name, mix)
    check_compared(compared(folder, model), 0.1, LEFT_OUT.get(name, ""))


@pytest.mark.parametrize(
    ("name", "card", "serve"),
    [
        ("gemma4", "the towers, for images and sounds", "images and sounds are"),
        ("gemma4 experts", "the vision tower, for images", "images are"),
    ],
)
def test_pages_tell_what_towers_are_for(tmp_path: Path, name: str, card: str, serve: str) -> None:
    """One file has those for images and for sounds."""
    write_source(tmp_path / "model", name)
    recipe = "quantize: {format: gguf, mix: BF16}\npackage: {serve: llama-server}\n"
    write_recipe(tmp_path / "recipes", "towers", recipe)
    (plan,) = plan_variants(["towers"], options_of(tmp_path, tmp_path / "model")).variants
    found = dict(pages(plan))

    assert f"| {card}: `--mmproj` |" in found["README.md"]
    assert (
        f"The Modelfile is of the text model; {serve} `llama-server`'s."
        in (found["serve/README.md"])
    )
    assert "/mmproj-b-F16.gguf" in found["serve/vision.sh"]


@pytest.mark.wide
@pytest.mark.parametrize("name", REST)
def test_a_build_of_another_family_passes(tmp_path: Path, name: str) -> None:
    """So it is of families that are like those."""
    model, folder = build(tmp_path, name, "Q4_K_M")
    check_compared(compared(folder, model), 0.1, LEFT_OUT.get(name, ""))


@pytest.mark.wide
@pytest.mark.parametrize(("mix", "most"), [("Q8_0", 0.01), ("BF16", 1e-3)])
@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "gpt_oss"])
def test_a_build_of_another_mix_passes(tmp_path: Path, name: str, mix: str, most: float) -> None:
    """As are those that change less, or nothing but the floats of a projector."""
    model, folder = build(tmp_path, name, mix)
    check_compared(compared(folder, model), most, LEFT_OUT.get(name, ""))


def planned(root: Path, name: str, tokenizer: Mapping[str, Any]) -> PackLayout:
    """The file that would be made of a checkpoint with that tokenizer."""
    write_source(root / "model", name)
    write_json(root / "model" / "tokenizer.json", tokenizer)
    write_json(root / "_profiles.yaml", {"demo": {}})
    recipe = {"variant": "a", "description": "A", "sources": {"body": {"model": "a/b"}}}
    write_json(root / "a.yaml", {**recipe, "quantize": {"format": "gguf", "mix": "Q8_0"}})
    options = replace(options_of(root, root / "model"), recipes=root)
    return plan_variants(["a"], options).variants[0].packs[0]


def test_rows_of_an_embedding_are_as_many_as_tokens(tmp_path: Path) -> None:
    """Also where added tokens are the model's own: llama.cpp loads no other file."""
    tokenizer = sentencepiece_json(gemma=True)
    tokens = tokenizer["model"]["vocab"].keys() | {
        token["content"] for token in tokenizer["added_tokens"]
    }
    pack = planned(tmp_path / "gemma", "gemma4", tokenizer)
    (embedding,) = (slot.tensor for slot in pack.slots if slot.tensor.name == "token_embd.weight")

    assert len(tokens) == embedding.ref.spec.shape[0]
    with pytest.raises(CheckpointError, match=r"has \d+ tokens and an embedding of 512 rows"):
        planned(tmp_path / "llama", "llama scaled", sentencepiece_json())


@pytest.mark.parametrize(
    ("family", "module", "shape"),
    [
        ("deepseek_v3", "self_attn.kv_b_proj", (160, 32)),
        # Three of the parts of a head lie in one tensor of the file.
        ("qwen3_next", "linear_attn.in_proj_qkvz", (224, WIDTH)),
    ],
)
def test_heads_that_were_cut_are_put_together(
    tmp_path: Path, family: str, module: str, shape: tuple[int, int]
) -> None:
    """Floats as they were; of blocks any rows, with bounds of their own, as all of them have."""
    model, plain = build(tmp_path, family, "BF16")
    _, blocks = build(tmp_path, family, "Q8_0")
    (plan,) = plan_variants(["bf16"], options_of(tmp_path, model)).variants
    name = f"model.layers.1.{module}.weight"
    source = PlainValues(open_folder(model).tensors[name]).rows(0, shape[0])
    checks = GgufChecks("Q8_0")

    floats = checks.by_module(open_folder(plain).tensors, plan.architecture)[name]
    cut = checks.by_module(open_folder(blocks).tensors, plan.architecture)
    values = block_values(cut, name.removesuffix(".weight"))
    whole, allowed = values.rows(0, shape[0]), values.allowance(source, 0)

    np.testing.assert_array_equal(PlainValues(floats).rows(0, shape[0]), source)
    assert shape == values.shape
    assert (np.abs(whole - source) <= allowed).all()
    for start, stop in (0, 7), (39, 41), (47, 130):
        np.testing.assert_array_equal(values.rows(start, stop), whole[start:stop])
        found = values.allowance(source[start:stop], start)
        np.testing.assert_array_equal(found, allowed[start:stop])


@pytest.mark.parametrize(
    ("name", "tensor", "module"),
    [
        ("deepseek_v3", "blk.1.attn_v_b.weight", "layers.1.self_attn.kv_b_proj"),
        ("gemma4 experts", "blk.1.ffn_gate_up_exps.weight", "layers.1.experts.*.up_proj"),
        ("mixtral", "blk.1.ffn_down_exps.weight", "layers.1.block_sparse_moe.experts.*.w2"),
        ("llama scaled", "blk.1.attn_k.weight", "layers.1.self_attn.k_proj"),
    ],
)
def test_a_tensor_whose_halves_changed_places_is_named(
    tmp_path: Path, name: str, tensor: str, module: str
) -> None:
    """As the module of the model that it is, whose weights are all alike."""
    model, _ = build(tmp_path, name, "Q8_0")
    copied = Copy.of("q8_0", options_of(tmp_path, model), tmp_path / "copied")

    def swap(data: bytearray) -> None:
        half = len(data) // 2
        data[:half], data[half:] = data[half:], data[:half]

    copied.edit(tensor, swap)

    assert module in copied.problems()["round trip"]


def test_a_tensor_of_another_shape_is_not_put_together(tmp_path: Path) -> None:
    """Whatever else its header makes of as many bytes: that is named, and nothing else read."""
    model, folder = build(tmp_path, "deepseek_v3", "BF16")
    (path,) = folder.glob("*.gguf")
    name, data = b"blk.1.attn_k_b.weight", bytearray(path.read_bytes())
    # Behind the name and the number of axes.
    at = data.index(name) + len(name) + 4
    columns, rows = struct.unpack_from("<2Q", data, at)
    struct.pack_into("<2Q", data, at, columns // 2, rows * 2)
    path.unlink()  # it is the cache's, too
    path.write_bytes(data)

    problems = Copy("bf16", options_of(tmp_path, model)).problems()

    assert f"has {name.decode()} as BF16 [4, 64, 8] instead of" in problems["structure"]


@pytest.mark.wide
def test_rows_that_no_token_has_are_zeros_where_the_model_runs(tmp_path: Path) -> None:
    """The file of such a model leaves them out; torch wants as many as its source has."""
    from carnice_build.verification.run_torch import dequantized
    from carnice_build.verification.torch_worker import measure_halves

    source = write_family(tmp_path / "model", "gemma3_text", {"vocab_size": 2112})
    recipe = "quantize: {format: gguf, mix: Q8_0, tokenizer_pre: qwen35}\n"
    folder = build_checked(tmp_path, source, "trimmed", recipe)
    (plan,) = plan_variants(["trimmed"], options_of(tmp_path, source)).variants
    model = dequantized(GgufChecks("Q8_0"), plan, folder)
    found = model.tensor("model.embed_tokens.weight")
    measured = measure_halves(model, folder, REPOSITORY / "demo" / "heldout.txt", 64, 2, 1)

    assert (2112, 256) == found.shape
    assert not found[2048:].any()
    assert found[:2048].any(dim=1).all()
    assert measured is not None
    assert measured.mean is not None
