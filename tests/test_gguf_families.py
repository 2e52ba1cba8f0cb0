"""GGUF folders of all families that have tables: each passes its checks, and meets its source."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from family_builds import build_checked
from gguf_families import CONFIGS, write_checkpoint
from tiny import write_json
from vocabularies import added, byte_level, sentencepiece_json

VOCABULARY = 512
SPECIAL = ("[gMASK]", "<|endoftext|>", "<|user|>", "<|observation|>")
"""Those that the converter looks for in some family."""

WIDTH = 256
"""Of hidden states: a block of K-quants."""

TOWERS = ("*vision_tower*", "*multi_modal_projector*")
"""What is left out of families whose towers no table names."""


def source(folder: Path, name: str) -> Path:
    """A checkpoint of a config, with a tokenizer of its family's kind."""
    changes = {"vocab_size": VOCABULARY, "hidden_size": WIDTH}
    config = _changed(CONFIGS[name], changes)
    write_checkpoint(folder, config)
    gemma = name.startswith("gemma4")
    tokenizer = sentencepiece_json(gemma=True) if gemma else byte_level(*SPECIAL, pre="qwen2")
    if name == "llama scaled":
        tokenizer["added_tokens"] += added("<|more|>", first=256 + 5 + len(SPECIAL))
    write_json(folder / "tokenizer.json", tokenizer)
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "GPT2Tokenizer"})
    return folder


def _changed(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    text = config.get("text_config")
    if text is None:
        return {**config, **changes}
    return {**config, "text_config": {**text, **changes}}


def build(root: Path, name: str, mix: str) -> tuple[Path, Path]:
    """The checkpoint, and the folder of a mix of it, which passes its checks."""
    model = root / "model"
    if not model.is_dir():
        source(model, name)
    pre = "" if name.startswith("gemma4") else ", tokenizer_pre: qwen2"
    recipe = f"quantize: {{format: gguf, mix: {mix}{pre}}}\n"
    if name.startswith("mistral3"):
        recipe += f"steps: [{{drop: {{match: {json.dumps(TOWERS)}}}}}]\n"
    return model, build_checked(root, model, mix.lower(), recipe)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_family_passes_its_checks(tmp_path: Path, name: str) -> None:
    """All weights are within their bounds, and diff finds each of them by its name."""
    build(tmp_path, name, "Q4_K_M")
