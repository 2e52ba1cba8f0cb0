"""Names, shapes, order, values and metadata of GGUF files are those of llama.cpp's converter."""

from __future__ import annotations

import json

import pytest
from gguf_converter import GOLDEN, Case, cases, from_json

KNOWN = json.loads(GOLDEN.read_text())


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_a_demo_checkpoint_becomes_what_the_converter_makes_of_it(case: Case) -> None:
    """Tensors, with their bytes and order, and metadata are those that the converter wrote."""
    expected, actual = from_json(KNOWN[case.name]), case.described()
    assert expected.tensors == actual.tensors
    assert list(expected.metadata.items()) == list(actual.metadata.items())
