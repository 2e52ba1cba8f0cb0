"""The tokenizer in a GGUF file is what llama.cpp's converter writes of the same files."""

from __future__ import annotations

import json

import pytest
from vocabularies import GOLDEN, cases, converted, written

CASES = cases()
KNOWN = json.loads(GOLDEN.read_text())


@pytest.mark.parametrize("name", CASES)
def test_metadata_is_what_the_converter_writes(name: str) -> None:
    """Keys, their kinds, values and order are the converter's."""
    # No way of splitting that is known writes letters small; a recipe must say so.
    pre = "qwen35" if name == "lower case" else None
    assert KNOWN[name] == json.loads(json.dumps(written(CASES[name].metadata(pre))))


@pytest.mark.wide
def test_the_golden_file_is_what_the_converter_writes() -> None:
    """What the converter of the pinned release makes of these tokenizers stands in the file."""
    found = dict(zip(CASES, converted(CASES.values()), strict=True))
    assert found == KNOWN
