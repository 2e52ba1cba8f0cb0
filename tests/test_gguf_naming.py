"""Names, shapes, order, values and metadata of GGUF files are those of llama.cpp's converter."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf_converter import GOLDEN, Case, cases, described, from_json, model_of
from gguf_families import (
    CONFIGS,
    TOKENS,
    FamilyCase,
    family_cases,
    folder_of,
    known_families,
    write_checkpoint,
)
from tiny import tiny_config, write_json, write_tiny

from carnice_build.checkpoint.known import known_floats
from carnice_build.dtypes import TensorSpec
from carnice_build.errors import CheckpointError, PlanError
from carnice_build.formats.gguf.naming import About, describe, describe_projector
from carnice_build.formats.gguf.ops import PackMxfp4
from carnice_build.formats.gguf.table import families, table_of
from carnice_build.graph import ActionGraph, BadElement, TensorData

KNOWN = json.loads(GOLDEN.read_text())


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_a_demo_checkpoint_becomes_what_the_converter_makes_of_it(case: Case) -> None:
    """Tensors, with their bytes and order, and metadata are those that the converter wrote."""
    expected, actual = from_json(KNOWN[case.name]), case.described()
    assert expected.tensors == actual.tensors
    assert list(expected.metadata.items()) == list(actual.metadata.items())


@pytest.mark.parametrize("case", family_cases(), ids=lambda case: case.name)
def test_a_family_becomes_what_the_converter_makes_of_it(
    case: FamilyCase, checkpoints: Path
) -> None:
    """So it is of small checkpoints of other families."""
    expected = known_families()[case.name]
    actual = case.described(folder_of(case, checkpoints))
    assert expected.tensors == actual.tensors
    assert list(expected.metadata.items()) == list(actual.metadata.items())


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the checkpoints of families are made."""
    return tmp_path_factory.mktemp("families")


@pytest.mark.parametrize("family", families())
def test_names_are_those_of_the_gguf_package(family: str) -> None:
    """Modules of a table have the names that the package's own map gives them.

    It has none for what a table takes of another and its family lacks.
    """
    table = table_of(family)
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == table.arch)
    known = gguf.get_tensor_name_map(arch, 2)
    root = "backbone" if any(name.startswith("backbone.") for name in table.model) else "model"
    for ours, expected in table.model.items():
        assert known.get_name(ours, (".weight",)) == expected
    names = {ours: f"{root}.layers.1.{ours.replace('.*', '')}" for ours in table.layer}
    found = {ours: known.get_name(name, (".weight",)) for ours, name in names.items()}
    same = {
        ours
        for ours, name in found.items()
        if name == f"blk.1.{table.layer[ours].removesuffix('.weight')}"
    }
    assert {ours for ours, name in found.items() if name} == same
    assert len(same) > len(table.layer) // 2


def test_a_file_without_an_mtp_head_announces_none(tmp_path: Path) -> None:
    """Its blocks are the model's layers, whatever the config of the source says."""
    folder = write_tiny(tmp_path / "tiny")
    found = described(folder, "F16", mtp=False)
    assert 8 == found.metadata["qwen35.block_count"].value
    assert "qwen35.nextn_predict_layers" not in found.metadata
    assert 8 == len(found.metadata["qwen35.attention.recurrent_layers"].value)


def test_what_a_config_leaves_out_is_what_transformers_takes(tmp_path: Path) -> None:
    """So are sections of rope that the model always has."""
    config = tiny_config()
    del config["text_config"]["rms_norm_eps"]
    del config["text_config"]["rope_parameters"]["mrope_section"]
    found = described(_with_config(tmp_path, config), "F16").metadata
    assert 1e-6 == found["qwen35.attention.layer_norm_rms_epsilon"].value
    assert [11, 11, 10, 0] == found["qwen35.rope.dimension_sections"].value


@pytest.mark.parametrize(
    ("family", "rope", "told"),
    [
        ("qwen3", {"rope_type": "dynamic", "factor": 2.0}, "'dynamic'"),
        ("qwen3", {"rope_type": "yran", "factor": 2.0}, "'yran'"),
        ("qwen3", {"rope_type": "yarn"}, "'yarn'"),
        ("qwen3", {"type": "linear", "factor": 2.0}, None),
        ("qwen3", {"rope_type": "default"}, None),
        ("llama", {"rope_type": "llama3", "factor": 8.0}, None),
    ],
)
def test_rope_that_a_file_does_not_say_is_told_of(
    tmp_path: Path, family: str, rope: dict[str, Any], told: str | None
) -> None:
    """The converter leaves it out as well; what its words or factors say needs no notice."""
    config = {**CONFIGS[family], "rope_parameters": {"rope_theta": 10000.0, **rope}}
    found = described(write_checkpoint(tmp_path / family, config), "F16").notices
    assert [told] * bool(told) == [notice.split()[4] for notice in found]


def test_logits_without_a_cap_are_said_to_have_none(tmp_path: Path) -> None:
    """llama.cpp caps those of Gemma 4 at 30 where a file does not say."""
    config = CONFIGS["gemma4"]
    text = {**config["text_config"], "final_logit_softcapping": None}
    folder = write_checkpoint(tmp_path / "uncapped", {**config, "text_config": text})
    found = described(folder, "F16").metadata
    assert 0.0 == found["gemma4.final_logit_softcapping"].value


@pytest.mark.parametrize("family", ["deepseek_v3", "minimax_m2"])
def test_experts_are_chosen_by_sigmoids_where_a_config_saved_by_transformers_says_nothing(
    tmp_path: Path, family: str
) -> None:
    """Without the entry llama.cpp takes a softmax, or stops."""
    config = {key: value for key, value in CONFIGS[family].items() if key != "scoring_func"}
    found = described(write_checkpoint(tmp_path / "saved", config), "F16")
    assert 2 == found.metadata[f"{found.architecture}.expert_gating_func"].value


@pytest.mark.parametrize(
    ("entry", "value", "message"),
    [
        ("rms_norm_eps", "small", "attention.layer_norm_rms_epsilon: is 'small'.* kind f32"),
        ("num_attention_heads", True, "attention.head_count: is True.* kind u32"),
        ("max_position_embeddings", 2**40, "context_length: is 1099511627776"),
        ("rope_parameters", {"mrope_section": [1]}, "mrope_section.* has no value"),
        ("rope_parameters", {"mrope_section": [1, 2, "x"]}, "dimension_sections: is 'x'"),
    ],
)
def test_an_entry_of_another_kind_is_refused_by_its_key(
    tmp_path: Path, entry: str, value: object, message: str
) -> None:
    """What a file could not hold is told before anything is written."""
    config = tiny_config()
    text = dict(config["text_config"])
    stated = {**text[entry], **value} if isinstance(value, dict) else value
    folder = write_tiny(tmp_path / "tiny")
    opened = model_of(folder)
    wrong = _Spelled(opened.architecture, {**config, "text_config": {**text, entry: stated}})
    about = About("Name", {}, {}, 1, "somewhere")
    with pytest.raises(CheckpointError, match=message):
        describe(wrong, opened.view, ActionGraph(), about)  # type: ignore[arg-type]


class _Spelled:
    """An architecture whose config says something that no reader looked at."""

    def __init__(self, architecture: Any, config: dict[str, Any]) -> None:
        self._architecture = architecture
        self._config = config

    def published_config(self, parts: object) -> dict[str, Any]:
        return self._config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._architecture, name)


def test_a_nemotron_without_experts_is_of_the_architecture_without(tmp_path: Path) -> None:
    """The converter goes by entries for experts, which transformers gives to all such configs."""
    config = {**CONFIGS["nemotron_h"], "hybrid_override_pattern": "M*-M"}
    config |= {"num_nextn_predict_layers": 0}
    found = described(write_checkpoint(tmp_path / "dense", config), "F16")
    assert "nemotron_h" == found.architecture
    assert [0, 0, 96, 0] == found.metadata["nemotron_h.feed_forward_length"].value
    assert "nemotron_h.expert_count" not in found.metadata


def test_a_tensor_that_llama_cpp_has_no_name_for_is_refused(tmp_path: Path) -> None:
    """As the converter refuses it: of a model of experts, a layer without any."""
    config = {**CONFIGS["qwen3_moe"], "mlp_only_layers": [0]}
    folder = write_checkpoint(tmp_path / "dense", config)
    with pytest.raises(PlanError, match=r"GGUF has no name for tensor .*\.0\.mlp\.down_proj"):
        described(folder, "F16")


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"factor": "x"}, r"rope.factor or 8.0 is 'x'; expected a finite number"),
        ({"factor": -1}, r"rope.factor or 8.0 is -1.0; expected more than 0"),
        ({"low_freq_factor": 4.0}, "make no sense"),
        ({"high_freq_factor": 1e40}, "expected a finite number"),
    ],
)
def test_factors_of_rope_that_make_no_sense_are_refused(
    tmp_path: Path, entries: dict[str, Any], message: str
) -> None:
    """They are numbers, and between low and high frequencies there is something."""
    scaled = CONFIGS["llama scaled"]
    config = {**scaled, "rope_scaling": {**scaled["rope_scaling"], **entries}}
    folder = write_checkpoint(tmp_path / "scaled", config)
    with pytest.raises(CheckpointError, match=message):
        described(folder, "F16")


@pytest.mark.parametrize("content", [{}, {"model": {"vocab": 1}}, {"model": {"vocab": {}}}])
def test_a_tokenizer_that_tells_no_tokens_is_refused(tmp_path: Path, content: object) -> None:
    """Of a family whose embeddings lose rows without tokens."""
    folder = write_checkpoint(tmp_path / "gemma", CONFIGS["gemma3_text"])
    write_json(folder / "tokenizer.json", content)
    with pytest.raises(CheckpointError, match=r"tokenizer.json: has no vocabulary"):
        described(folder, "F16")


def test_rows_without_tokens_stay_where_a_sentencepiece_model_fills_them(tmp_path: Path) -> None:
    """The converter makes tokens for them."""
    folder = write_checkpoint(tmp_path / "gemma", CONFIGS["gemma3_text"])
    opened = model_of(folder)
    files = {path.name: path.read_bytes() for path in folder.glob("*.json")}
    for more, rows in ({}, TOKENS), ({"tokenizer.model": b""}, 128):
        about = About("Name", {**files, **more}, {}, 1, "somewhere")
        found = describe(opened.architecture, opened.view, ActionGraph(), about)
        shapes = {tensor.name: tensor.shape for tensor in found.tensors}
        assert (64, rows) == shapes["token_embd.weight"]


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer.json", {}, r"the tokenizer has no token \[IMG_BREAK\]"),
        ("tokenizer.json", {"added_tokens": [7, {"content": "[IMG_BREAK]"}]}, "has no token"),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": {"x": {}, "7": 7, "128": {"content": "[IMG_BREAK]"}}},
            r"\[IMG_BREAK\] is token 128 of 128",
        ),
    ],
)
def test_a_tower_without_the_token_that_it_brings_along_is_refused(
    tmp_path: Path, file: str, content: object, message: str
) -> None:
    """llama.cpp reads its embedding from the tower's file."""
    folder = write_checkpoint(tmp_path / "mistral", CONFIGS["mistral3"])
    write_json(folder / file, content)
    with pytest.raises(CheckpointError, match=message):
        described(folder, "F16", projector=True)


def test_what_a_config_decides_is_read_like_a_tensor_of_a_file() -> None:
    """From anywhere, in any pieces."""
    tensor = known_floats("factors", [1.0, 2.5, 1e30])
    assert tensor.file is not None
    with tensor.file.open_range(2, 8) as read:
        pieces = [bytearray(3), bytearray(5)]
        for piece in pieces:
            read(memoryview(piece))
    assert struct.pack("<3f", 1.0, 2.5, 1e30)[2:10] == b"".join(pieces)
    assert known_floats("other", [1.0, 2.5, 1e30]).identity == tensor.identity
    assert known_floats("factors", [1.0, 2.5, 1.0]).identity != tensor.identity


def test_codes_of_another_shape_are_not_packed() -> None:
    """Groups have 32 numbers, and a scale each."""
    scales = TensorSpec("U8", (4, 2))
    for blocks in TensorSpec("U8", (4, 2, 8)), TensorSpec("U8", (4, 3, 16)):
        with pytest.raises(PlanError, match="cannot pack codes U8"):
            PackMxfp4().infer({}, [blocks, scales])


@pytest.mark.parametrize(
    ("entry", "count", "words"),
    [
        ("value", 3, r"has \d+ rows, which are not \d heads of"),
        ("key", 0, "linear_num_value_heads // linear_num_key_heads .* divides by zero"),
    ],
)
def test_heads_that_rows_are_not_of_are_refused(
    tmp_path: Path, entry: str, count: int, words: str
) -> None:
    """Three value heads do not belong to two key heads, nor any to none."""
    config = {**CONFIGS["qwen3_next"], f"linear_num_{entry}_heads": count}
    folder = write_checkpoint(tmp_path / "model", config)
    with pytest.raises(CheckpointError, match=words):
        described(folder, "F16")


def test_a_scale_that_is_none_is_not_packed() -> None:
    """NaN of MXFP4; llama-quantize refuses it too."""
    blocks, scales = np.zeros((2, 2, 16), np.uint8), np.array([[0, 254], [255, 127]], np.uint8)
    out = TensorData("U8", np.empty((2, 34), np.uint8))
    with pytest.raises(BadElement, match="has a scale that is NaN") as raised:
        PackMxfp4().apply({}, [TensorData("U8", blocks), TensorData("U8", scales)], [out])
    assert (1, 2) == (raised.value.operand, raised.value.index)


def test_a_family_without_a_table_is_refused_by_name() -> None:
    """The error says which families have one."""
    with pytest.raises(PlanError, match=r"GGUF has no names for tensors of acme.*qwen3_5"):
        table_of("acme")


def test_a_tower_of_three_frames_is_refused(tmp_path: Path) -> None:
    """llama.cpp looks at two at once."""
    config = tiny_config()
    config["vision_config"]["temporal_patch_size"] = 3
    folder = _with_config(tmp_path, config)
    opened = model_of(folder)
    about = About("Name", {}, {}, 1, "somewhere")
    with pytest.raises(PlanError, match="3 frames at once; expected 2"):
        describe_projector(opened.architecture, opened.view, ActionGraph(), about)


def _with_config(folder: Path, config: dict[str, Any]) -> Path:
    """A tiny checkpoint of this config."""
    from tiny import tiny_tensors, write_safetensors

    made = folder / "made"
    made.mkdir()
    write_json(made / "config.json", config)
    write_safetensors(made / "model.safetensors", tiny_tensors(config))
    return made
