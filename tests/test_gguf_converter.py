"""Held against llama.cpp's converter itself: `make llama-cpp` brings its source."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_converter import (
    FILE_TYPES,
    GOLDEN,
    cases,
    converted,
    described,
    from_json,
    source,
    written,
)
from gguf_families import family_cases, folder_of, known_families
from tiny import Tensor, read_all_tensors, write_shards
from zoo import write_zoo

from carnice_build.checkpoint.gguf_values import Value
from carnice_build.formats.gguf.ops import Values
from carnice_build.graph import TensorData
from carnice_build.kernels.elementwise import narrow, widen

pytestmark = pytest.mark.wide

STATED = {
    "gemma4.final_logit_softcapping": Value("f32", 0.0),
    "deepseek2.expert_gating_func": Value("u32", 2),
    "minimax-m2.expert_gating_func": Value("u32", 2),
}
"""What the converter leaves to llama.cpp where a config does, which takes another value."""

PROCESSOR = {"image_mean": [0.5, 0.25, 0.125], "image_std": [0.5, 0.5, 0.5]}


@pytest.fixture(autouse=True)
def _source() -> None:
    source()


def test_the_golden_file_is_what_the_converter_writes() -> None:
    """What `test_gguf_naming` compares with is still what the converter makes of the demo."""
    known = json.loads(GOLDEN.read_text())
    for case in cases():
        assert from_json(known[case.name]) == case.converted()


def test_the_golden_file_of_families_is_what_the_converter_writes(tmp_path: Path) -> None:
    """So is what it made of other families."""
    assert known_families().keys() == {case.name for case in family_cases()}
    for case in family_cases():
        assert known_families()[case.name] == case.converted(folder_of(case, tmp_path)), case.name


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
@pytest.mark.parametrize(
    ("family", "layout"),
    [
        ("qwen3_5", "hub"),
        ("qwen3_5_moe", "hub"),
        ("qwen3_5_moe", "transformers"),
        ("qwen3_5_text", "transformers"),
    ],
)
def test_a_family_becomes_what_the_converter_makes_of_it(
    zoo: Any, family: str, layout: str, dtype: str
) -> None:
    """Tensors, with their bytes and order, and metadata are those that the converter writes."""
    folder = zoo(family, layout)
    description = described(folder, dtype)
    # transformers drops the head when it saves a model, and the converter must be told.
    headless = not any("nextn" in tensor.name for tensor in description.tensors)
    expected = converted(folder, dtype, *(["--no-mtp"] if headless else []))
    actual = written(description, dtype)
    assert expected.tensors == actual.tensors
    assert list(expected.metadata.items()) == list(actual.metadata.items())


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        ("llama", "F32"),
        ("mistral", "BF16"),
        ("mixtral", "F16"),
        ("mistral3", "F16"),
        ("ministral3", "F16"),
        ("qwen2", "F16"),
        ("qwen3", "BF16"),
        ("gemma3", "F16"),
        ("gemma3_text", "F32"),
        ("gemma4", "BF16"),
        ("gemma4_moe", "F16"),
        ("gpt_oss", "BF16"),
        ("glm4_moe", "F32"),
        ("deepseek_v3", "F16"),
        ("nemotron_h", "F32"),
        ("qwen3_next", "F16"),
        ("phi3", "F16"),
        ("minimax_m2", "BF16"),
    ],
)
def test_other_families_do_as_well(zoo: Any, family: str, dtype: str) -> None:
    """As published: some with weights in FP8, whose floats are the converter's, or in MXFP4."""
    folder = zoo(family, "hub")
    expected = converted(folder, dtype, pre="none")
    actual = written(described(folder, dtype), dtype)
    assert expected.tensors == actual.tensors
    metadata = [item for item in actual.metadata.items() if item not in STATED.items()]
    assert list(expected.metadata.items()) == metadata


@pytest.mark.parametrize(("stored", "dtype"), [("F16", "BF16"), ("F32", "F16")])
def test_checkpoints_of_other_types_in_shards_do_as_well(
    zoo: Any, tmp_path: Path, stored: str, dtype: str
) -> None:
    """Norms and decays of an F16 model are computed in F16; experts wait for the last of them."""
    plain = zoo("qwen3_5_moe", "transformers")
    folder = shutil.copytree(plain, tmp_path / "other")
    (folder / "model.safetensors").unlink()
    write_shards(
        folder, {name: cast(item, stored) for name, item in read_all_tensors(plain).items()}, 5
    )
    expected = converted(folder, dtype, "--no-mtp")
    actual = written(described(folder, dtype), dtype)
    assert expected.tensors == actual.tensors


def cast(tensor: Tensor, dtype: str) -> Tensor:
    """A tensor of BF16 in another type."""
    values = widen(np.frombuffer(tensor.data, np.uint16), tensor.dtype)
    return Tensor(dtype, tensor.shape, narrow(values, dtype).tobytes())


@pytest.mark.parametrize("family", ["qwen3_5", "qwen3_5_moe"])
def test_a_tower_becomes_what_the_converter_makes_of_it(zoo: Any, family: str) -> None:
    """So it is of the file of a vision tower."""
    folder = zoo(family, "hub")
    expected = converted(folder, "F16", "--mmproj")
    actual = written(described(folder, "F16", projector=True), "F16")
    assert expected.tensors == actual.tensors
    assert list(expected.metadata.items()) == list(actual.metadata.items())


@pytest.mark.parametrize(("how", "most"), [("negative_exp", 1), ("softplus", 2)])
def test_torchs_own_functions_differ_in_the_last_place_of_a_few_numbers(
    how: str, most: int
) -> None:
    """So the converter's decays and scales of heads are ours, but for a unit or two, by machine."""
    import torch

    numbers = (np.arange(0x3A00, 0x4100, dtype=np.uint32) << 16).view(np.float32)
    inputs, output = TensorData("F32", numbers), np.empty_like(numbers)
    Values().apply({"how": how}, [inputs], [TensorData("F32", output)])
    values = torch.from_numpy(numbers)
    theirs = torch.nn.functional.softplus(values) if how == "softplus" else -torch.exp(values)
    apart = np.abs(theirs.numpy().view(np.int32).astype(np.int64) - output.view(np.int32))
    assert apart.max() <= most
    assert np.count_nonzero(apart) < len(apart) // 20
