"""What a GGUF file says of itself: as gguf-py tells it of a name, a card and a model's size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
import yaml
from gguf.metadata import Metadata
from gguf.utility import size_label as reference_label
from hypothesis import given
from hypothesis import strategies as st

from carnice_build.checkpoint.gguf_values import Value
from carnice_build.errors import CheckpointError
from carnice_build.formats.gguf.identity import general, name_parts, size_label, title

NAMES = [
    "Carnice-V2-27b",
    "kai-os/Carnice-V2-27b",
    "Qwen/Qwen3.6-27B",
    "Qwen3-30B-A3B-Instruct-2507",
    "Mixtral-8x7B-Instruct-v0.1",
    "bloom-7b1",
    "Phi-3-mini-4k-instruct",
    "Llama-3.1-Nemotron-Nano-8B-v1-bf16",
    "gpt-oss-20b",
    "a model of mine",
    "./model",
    "tiny--large-small-1.5_3B",
    "a/b/c-7B",
]

_WORDS = ["Qwen3", "V2", "27b", "8x7B", "A3B", "4k", "instruct", "mini", "large", "bf16", "Q4_K"]


def reference(name: str, parameters: int) -> tuple[str | None, ...]:
    """What gguf-py makes of a name."""
    return Metadata.get_model_id_components(name, parameters)


def ours(name: str, parameters: int) -> tuple[str | None, ...]:
    """The same by us, in its order."""
    found = name_parts(name, parameters)
    return (
        found.full,
        found.organization,
        found.base,
        found.tuned,
        found.version,
        found.size,
    )


@pytest.mark.parametrize("parameters", [0, 7_000_000_000, 27_000_000_000])
@pytest.mark.parametrize("name", NAMES)
def test_the_parts_of_a_name_are_told_apart(name: str, parameters: int) -> None:
    """Names of published models have the parts that gguf-py finds."""
    assert reference(name, parameters) == ours(name, parameters)


@given(st.lists(st.sampled_from(_WORDS), min_size=1, max_size=6), st.sampled_from([0, 10**9]))
def test_any_name_of_such_words_is_told_apart(words: list[str], parameters: int) -> None:
    """So have names that nobody gave yet."""
    name = "-".join(words)
    assert reference(name, parameters) == ours(name, parameters)


@pytest.mark.parametrize("name", NAMES)
def test_a_title_is_that_of_the_converter(name: str) -> None:
    """Words begin with a capital, unless they have one or begin with a number."""
    assert Metadata.id_to_title(name) == title(name)


@given(st.integers(1, 10**15))
def test_a_size_is_rounded_as_the_converter_rounds_it(count: int) -> None:
    """Two digits at least, in thousands, millions, billions or trillions."""
    assert reference_label(count, count, 0, 0) == size_label({"token_embd.weight": (count,)})


def test_experts_count_once() -> None:
    """A label says how many there are, and how large the model were with one."""
    shapes = {"output.weight": (1000, 1000), "blk.0.ffn_up_exps.weight": (100, 300, 8)}
    assert reference_label(1_240_000, 1_000_000, 30_000, 8) == size_label(shapes)


CARD: dict[str, Any] = {
    "license": "apache-2.0",
    "license_link": "https://example.org/licence",
    "base_model": ["Qwen/Qwen3.6-27B", "https://huggingface.co/a/B-v2-7B", "https://example.org/x"],
    "datasets": "owner/data-v1",
    "tags": ["agent"],
    "pipeline_tag": "text-generation",
    "language": ["en", "de"],
}
GENERATION = {"temperature": 1, "top_k": 20, "top_p": 0.95, "eos_token_id": 3}


def test_a_card_and_how_to_sample_are_told_as_the_converter_tells_them(tmp_path: Path) -> None:
    """Licence, base models, datasets, tags and languages, in its order."""
    folder = tmp_path / "Carnice-V2-27b"
    folder.mkdir()
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump(CARD)}---\n")
    (folder / "generation_config.json").write_text(str(GENERATION).replace("'", '"'))
    writer = gguf.GGUFWriter(None, "qwen35")
    metadata = Metadata.load(None, folder, None, 27_000_000_000)
    metadata.set_gguf_meta_model(writer)
    expected = {key: value.value for key, value in writer.kv_data[0].items()}
    shapes = {"token_embd.weight": (27_000_000_000,)}
    actual = general("model", folder.name, shapes, GENERATION, CARD)
    actual.pop("general.type")
    expected.pop("general.architecture")
    assert list(expected.items()) == [(key, value.value) for key, value in actual.items()]


def test_a_setting_of_another_kind_is_refused() -> None:
    """It names the file, the entry and what stands there."""
    with pytest.raises(CheckpointError, match=r"generation_config.json: top_k: is 'many'"):
        general("model", "Name", {}, {"top_k": "many"}, {})
    with pytest.raises(CheckpointError, match=r"README.md: license: is 5"):
        general("model", "Name", {}, {}, {"license": 5})


def test_an_empty_card_says_nothing() -> None:
    """What is not known is left out."""
    found = general("mmproj", "Name", {}, {}, {})
    assert {"general.type": Value("str", "mmproj"), "general.name": Value("str", "Name")} == found
