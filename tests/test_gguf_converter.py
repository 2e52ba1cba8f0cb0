"""Held against llama.cpp's converter itself: `make llama-cpp` brings its source."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from gguf_converter import FILE_TYPES, GOLDEN, cases, converted, described, from_json, source, written
from zoo import write_zoo

pytestmark = pytest.mark.wide

PROCESSOR = {"image_mean": [0.5, 0.25, 0.125], "image_std": [0.5, 0.5, 0.5]}


@pytest.fixture(autouse=True)
def _source() -> None:
    source()


def test_the_golden_file_is_what_the_converter_writes() -> None:
    """What `test_gguf_naming` compares with is still what the converter makes of the demo."""
    known = json.loads(GOLDEN.read_text())
    for case in cases():
        assert from_json(known[case.name]) == case.converted()


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Checkpoints of families, by name and layout, made once."""
    made: dict[tuple[str, str], Path] = {}

    def write(family: str, layout: Any) -> Path:
        if (family, layout) not in made:
            folder = tmp_path_factory.mktemp("zoo") / f"{family}-{layout}"
            made[family, layout] = write_zoo(folder, family, layout)
            if (folder / "preprocessor_config.json").is_file():
                (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
        return made[family, layout]

    return write


@pytest.mark.parametrize("dtype", FILE_TYPES)
@pytest.mark.parametrize("layout", ["hub", "transformers"])
@pytest.mark.parametrize("family", ["qwen3_5", "qwen3_5_moe", "qwen3_5_text"])
def test_a_family_becomes_what_the_converter_makes_of_it(
    zoo: Any, family: str, layout: str, dtype: str
) -> None:
    """Tensors, with their bytes and order, and metadata are those that the converter writes."""
    folder = zoo(family, layout)
    options = [] if layout == "hub" else ["--no-mtp"]
    expected = converted(folder, dtype, *options)
    actual = written(described(folder, dtype, mtp=layout == "hub"), dtype)
    assert expected.tensors == actual.tensors
    assert list(expected.metadata.items()) == list(actual.metadata.items())


@pytest.mark.parametrize("family", ["qwen3_5", "qwen3_5_moe"])
def test_a_tower_becomes_what_the_converter_makes_of_it(zoo: Any, family: str) -> None:
    """So it is of the file of a vision tower."""
    folder = zoo(family, "hub")
    expected = converted(folder, "F16", "--mmproj")
    actual = written(described(folder, "F16", projector=True), "F16")
    assert expected.tensors == actual.tensors
    assert list(expected.metadata.items()) == list(actual.metadata.items())
