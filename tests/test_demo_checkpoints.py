"""The checkpoints in `demo/` are what its README says."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import pytest

DEMO = Path(__file__).parent.parent / "demo"
BASE = DEMO / "qwen3.6-27b"
FINE_TUNE = DEMO / "carnice-v2-27b"
CHECKPOINTS = pytest.mark.parametrize("folder", [BASE, FINE_TUNE], ids=lambda folder: folder.name)
THRICE = "language_model.language_model.language_model."
TUNED = (
    *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    *("in_proj_qkv", "in_proj_z", "out_proj"),
)


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor as its shard holds it."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    data: bytes


def stored(folder: Path) -> dict[str, Stored]:
    """Every tensor of every shard in `folder`."""
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        content = path.read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
        assert header.pop("__metadata__") == {"format": "pt"}
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            shape = tuple(entry["shape"])
            tensors[name] = Stored(path.name, entry["dtype"], shape, data[begin:end])
    return tensors


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def base_name(name: str) -> str:
    """The base's name of a tensor of the fine-tune."""
    if name.startswith(f"model.{THRICE}visual."):
        return name.replace(THRICE, "")
    if name.startswith("model."):
        return name.replace(THRICE, "language_model.")
    return name.removeprefix(THRICE)


def test_the_demo_is_small() -> None:
    """The checkpoints and what is beside them take 18 MB at most."""
    folders = [path for path in DEMO.iterdir() if path.is_dir() and path.name[0] in "qc"]
    files = [path for folder in (DEMO, *folders) for path in folder.iterdir() if path.is_file()]

    assert len(folders) == 3
    assert sum(path.stat().st_size for path in files) <= 18e6


def test_base_is_complete() -> None:
    """The base has a whole vision tower, the 15 tensors of the MTP head, and its text layers."""
    config = read_json(BASE / "config.json")
    names = stored(BASE)
    kinds = config["text_config"]["layer_types"]

    assert config["vision_config"]["depth"] * 12 + 9 == sum("model.visual." in n for n in names)
    assert sum(n.startswith("mtp.") for n in names) == 15
    assert kinds.count("linear_attention") * 14 + kinds.count("full_attention") * 11 == sum(
        n.startswith("model.language_model.layers.") for n in names
    )
    assert {"lm_head.weight", "model.language_model.embed_tokens.weight"} <= set(names)


def test_config_is_consistent() -> None:
    """Layers are 3:1, and the rotary sections cover half of the rotated part of a head."""
    text = read_json(BASE / "config.json")["text_config"]
    rope = text["rope_parameters"]

    assert text["layer_types"] == (["linear_attention"] * 3 + ["full_attention"]) * 2
    assert text["head_dim"] * rope["partial_rotary_factor"] / 2 == sum(rope["mrope_section"])
    assert (text["mtp_num_hidden_layers"], text["mtp_use_dedicated_embeddings"]) == (1, False)


def test_two_cards_can_share_the_model() -> None:
    """Halves of heads, groups of 128 and rows of tiles: tensor parallelism of two fits."""
    text = read_json(BASE / "config.json")["text_config"]
    heads = (
        *("num_attention_heads", "num_key_value_heads"),
        *("linear_num_key_heads", "linear_num_value_heads"),
    )
    parallel_by_rows = {
        text["intermediate_size"],
        text["num_attention_heads"] * text["head_dim"],
        text["linear_num_value_heads"] * text["linear_value_head_dim"],
    }

    assert all(text[name] % 2 == 0 for name in heads)
    assert all(size % (2 * 128) == 0 for size in parallel_by_rows)
    # What vLLM's kernels for gated delta nets take.
    assert {text["linear_key_head_dim"], text["linear_value_head_dim"]} <= {64, 128}


def test_every_fine_tuned_name_repeats_the_prefix() -> None:
    """Each key has the prefix three times, and under it the base's tensors without the MTP head."""
    names = stored(FINE_TUNE)
    without_head = {name for name in stored(BASE) if not name.startswith("mtp.")}

    assert all(name.count("language_model.") == 3 and THRICE in name for name in names)
    assert without_head == {base_name(name) for name in names}


def test_fine_tune_changes_only_its_linears() -> None:
    """Only the linears of layers 2 to 7 differ; every other tensor is the base's, bit for bit."""
    base = stored(BASE)
    changed = {
        base_name(name)
        for name, tensor in stored(FINE_TUNE).items()
        if tensor.data != base[base_name(name)].data
    }
    tuned = {
        name
        for name in base
        if name.startswith(tuple(f"model.language_model.layers.{layer}." for layer in range(2, 8)))
        and name.split(".")[-2] in TUNED
    }

    assert tuned == changed


@CHECKPOINTS
def test_index_matches_the_shards(folder: Path) -> None:
    """The index names each tensor once, in the shard that holds it, and knows the total size."""
    index = read_json(folder / "model.safetensors.index.json")
    tensors = stored(folder)

    assert {name: tensor.file for name, tensor in tensors.items()} == index["weight_map"]
    assert sum(len(tensor.data) for tensor in tensors.values()) == index["metadata"]["total_size"]
    assert len(set(index["weight_map"].values())) >= 2


@CHECKPOINTS
def test_tensors_are_bf16_and_groupable(folder: Path) -> None:
    """All tensors are BF16, and every linear of the text model reads a multiple of 128 values."""
    for name, tensor in stored(folder).items():
        assert tensor.dtype == "BF16", name
        assert 2 * math.prod(tensor.shape) == len(tensor.data), name
        if len(tensor.shape) == 2 and "visual" not in name:
            assert tensor.shape[1] % 128 == 0, name


@CHECKPOINTS
def test_special_tokens_agree(folder: Path) -> None:
    """The ids in the configuration are those of the tokenizer, whose vocabulary fits the model."""
    config = read_json(folder / "config.json")
    tokenizer = read_json(folder / "tokenizer.json")
    ids = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}

    assert ids["<|image_pad|>"] == config["image_token_id"]
    assert ids["<|video_pad|>"] == config["video_token_id"]
    assert ids["<|vision_start|>"] == config["vision_start_token_id"]
    assert ids["<|vision_end|>"] == config["vision_end_token_id"]
    assert ids["<|endoftext|>"] == config["text_config"]["eos_token_id"]
    assert {"<|im_start|>", "<|im_end|>", "<think>", "</think>", "<tool_call>"} <= set(ids)
    assert len({*tokenizer["model"]["vocab"], *ids}) == config["text_config"]["vocab_size"]


def render(folder: Path, **variables: Any) -> str:
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = json.dumps
    template = environment.from_string((folder / "chat_template.jinja").read_text(encoding="utf-8"))
    return template.render(**variables)


@CHECKPOINTS
def test_template_switches_thinking(folder: Path) -> None:
    """The prompt opens a thought, or an empty one when thinking is off."""
    messages = [{"role": "user", "content": "Hi"}]
    asked = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n"

    assert asked == render(folder, messages=messages, add_generation_prompt=True)
    assert asked + "\n</think>\n\n" == render(
        folder, messages=messages, add_generation_prompt=True, enable_thinking=False
    )


@CHECKPOINTS
def test_template_writes_tools(folder: Path) -> None:
    """Functions, calls, responses and the thoughts of the last turn are written out."""
    tool = {"type": "function", "function": {"name": "add", "parameters": {}}}
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": "two"}}}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Add."},
        {"role": "assistant", "content": "<think>\nSum.\n</think>\n", "tool_calls": [call]},
        {"role": "tool", "content": "3"},
        {"role": "tool", "content": "4"},
        {"role": "assistant", "content": "Done.", "reasoning_content": "Good."},
    ]
    text = render(folder, messages=messages, tools=[tool])

    assert f"<tools>\n{json.dumps(tool)}\n</tools>" in text
    assert "Be brief.<|im_end|>\n<|im_start|>user\nAdd.<|im_end|>\n" in text
    assert (
        "<|im_start|>assistant\n<think>\nSum.\n</think>\n\n<tool_call>\n<function=add>\n"
        "<parameter=a>\n1\n</parameter>\n<parameter=b>\ntwo\n</parameter>\n"
        "</function>\n</tool_call><|im_end|>\n"
        "<|im_start|>user\n<tool_response>\n3\n</tool_response>\n"
        "<tool_response>\n4\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n<think>\nGood.\n</think>\n\nDone.<|im_end|>\n"
    ) in text


def test_template_forgets_old_thoughts() -> None:
    """Thoughts from before the last question are left out."""
    messages = [
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "1.", "reasoning_content": "Old."},
        {"role": "user", "content": "Two?"},
    ]

    assert "Old." not in render(BASE, messages=messages)


def test_calibration_dialogues_are_in_the_hermes_form() -> None:
    """There are 64 dialogues with known speakers; calls are JSON and name a given function."""
    lines = (DEMO / "calibration.jsonl").read_text(encoding="utf-8").splitlines()
    dialogues = [json.loads(line) for line in lines]

    assert len(dialogues) == 64
    for dialogue in dialogues:
        names = {tool["function"]["name"] for tool in dialogue["tools"]}
        for turn in dialogue["conversations"]:
            assert turn["from"] in {"system", "human", "gpt", "tool"}
            for part in turn["value"].split("<tool_call>\n")[1:]:
                call = json.loads(part.split("\n</tool_call>")[0])
                assert call["name"] in names


def test_transformers_loads_the_base() -> None:
    """No key is missing or unexpected, and the held-out text is long enough for 64 samples."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    model, report = transformers.Qwen3_5ForConditionalGeneration.from_pretrained(
        BASE, output_loading_info=True
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(BASE)
    tokens = tokenizer.encode((DEMO / "heldout.txt").read_text(encoding="utf-8"))
    sample = torch.tensor([tokens[:256]])
    with torch.no_grad():
        loss = model(input_ids=sample, labels=sample).loss.item()

    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert len(tokens) >= 64 * 1024
    assert loss < 4.5
