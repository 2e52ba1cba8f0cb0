"""The tensors that go out are of the type that config.json states, whatever the source mixes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from calibrating import QUICK, build
from conftest import Project
from tiny import Tensor, bf16, read_all_tensors, read_json, write_json, write_safetensors

from carnice_build.checkpoint.model_dtype import stated_dtype, with_dtype
from carnice_build.commands.build import build_variants
from carnice_build.commands.plan import plan_variants
from carnice_build.commands.verify import VerifySettings, verify_variants

pytest_plugins = ["calibrating"]

SPELLED = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
ROUNDED = """
extends: [_base/carnice-text.yaml, preset:int4-rtn]
variant: rounded
description: Rounded
sources: {body: {model: Qwen/Qwen3.6-27B}}
quantize: {method: nearest}
"""


def as_type(tensor: Tensor, dtype: str) -> Tensor:
    """A BF16 or F32 tensor in another type."""
    if tensor.dtype == "BF16":
        values = (np.frombuffer(tensor.data, "<u2").astype("<u4") << 16).view("<f4")
    else:
        values = np.frombuffer(tensor.data, "<f4")
    data = {"BF16": bf16, "F16": lambda v: v.astype("<f2").tobytes(), "F32": lambda v: v.tobytes()}
    return replace(tensor, dtype=dtype, data=data[dtype](values))


def retype(folder: Any, dtype: str, stated: str | None, place: str = "text_config") -> None:
    """Make every float of a one-shard checkpoint a `dtype`, under a config that says `stated`."""
    tensors = read_all_tensors(folder)
    write_safetensors(
        folder / "model.safetensors",
        {name: as_type(tensor, dtype) for name, tensor in tensors.items()},
    )
    config = read_json(folder / "config.json")
    config["text_config"].pop("dtype", None)
    if stated is not None:
        section = config if place == "root" else config[place]
        section["dtype"] = SPELLED[stated]
    write_json(folder / "config.json", config)


def plain(tensors: dict[str, Tensor]) -> dict[str, str]:
    """The types of the tensors that are no part of a quantized module."""
    parts = (".qweight", ".qzeros", ".scales")
    return {name: item.dtype for name, item in tensors.items() if not name.endswith(parts)}


@pytest.mark.parametrize(
    ("source", "stated", "knob", "expected"),
    [
        ("F16", "F16", None, "F16"),
        ("BF16", "BF16", None, "BF16"),
        ("F32", "F32", None, "BF16"),
        ("F32", "BF16", None, "BF16"),
        ("F32", "F16", None, "F16"),
        ("F16", "F16", "bfloat16", "BF16"),
        ("BF16", "BF16", "float16", "F16"),
        ("BF16", None, None, "BF16"),
    ],
)
@pytest.mark.parametrize("place", ["text_config", "root"])
def test_an_autoround_folder_is_of_the_type_that_its_config_states(
    project: Project, source: str, stated: str | None, knob: str | None, expected: str, place: str
) -> None:
    """F16 stays F16 under float16; another type, if asked for, is what config.json then says."""
    retype(project.base, source, stated, place)
    project.recipe("rounded", ROUNDED)
    changes = (f"quantize.plain={knob}",) if knob else ()
    build_variants(["rounded"], project.options(overrides=changes))
    folder = project.out / "rounded"
    card = (folder / "README.md").read_text()

    found = plain(read_all_tensors(folder))
    # Engines hold this state in float32, so what is published so stays so.
    states = {found.pop(name) for name in list(found) if name.endswith("A_log")}

    assert {"F32" if source == "F32" else expected} == states
    assert {expected} == set(found.values())
    assert expected == stated_dtype(read_json(folder / "config.json"))
    assert f"The MTP head is in {expected}, every one of its tensors" in card


@pytest.mark.parametrize("variant", ["qwen-nvfp4-text-mtp", "w4a16-qwen"])
@pytest.mark.parametrize(
    ("source", "stated", "expected"),
    [
        ("F16", "F16", "F16"),
        ("F32", "F32", "F32"),
        ("F32", "BF16", "BF16"),
        ("F16", "BF16", "BF16"),
        ("F32", None, "F32"),
    ],
)
def test_floats_go_out_in_the_type_that_the_config_states(
    small: Project, variant: str, source: str, stated: str | None, expected: str
) -> None:
    """As the library loads the model; only states that engines hold in float32 stay so."""
    retype(small.base, source, stated)
    small.recipe(
        "w4a16-qwen",
        "extends: w4a16-awq.yaml\nvariant: w4a16-qwen\ndescription: x\nsteps: []\n"
        "sources: {body: {model: Qwen/Qwen3.6-27B}}\n"
        "quantize: {config_groups: {group_0: {weights: {observer: memoryless_minmax}}}}\n",
    )
    (plan,) = plan_variants([variant], small.options(overrides=QUICK)).variants
    parts = ("weight_scale", "weight_scale_2", "input_scale")
    if variant.startswith("w4a16"):
        parts = ()
    found = {
        tensor.name: tensor.ref.spec.dtype
        for tensor in plan.conversion.tensors
        if tensor.ref.spec.dtype in SPELLED and not tensor.name.endswith(parts)
    }
    states = {name for name in found if name.endswith("A_log")}

    assert states
    assert {source} == {found[name] for name in states}
    assert {expected} == {dtype for name, dtype in found.items() if name not in states}


def test_a_wide_source_is_verified_against_what_the_library_loads(small: Project) -> None:
    """A float32 checkpoint under bfloat16 gives the folder of its BF16 twin but for the states."""
    variant = "qwen-nvfp4-text-mtp"
    build(small, variant)
    narrow = read_all_tensors(small.out / variant)
    retype(small.base, "F32", "BF16")
    build(small, variant)
    wide = read_all_tensors(small.out / variant)
    options = small.options(overrides=QUICK)
    report = verify_variants([variant], options, VerifySettings(run=False))
    card = (small.out / variant / "README.md").read_text()

    assert report.passed, [check for check in report.variants[0].checks if check.problems]
    assert {name for name in narrow if narrow[name] != wide[name]} == {
        name for name in narrow if name.endswith("A_log")
    }
    assert "The MTP head is in BF16, every one of its tensors" in card


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"dtype": "float16", "text_config": {"dtype": "bfloat16"}}, "F16"),
        ({"torch_dtype": "torch.float32"}, "F32"),
        ({"text_config": {"torch_dtype": "bfloat16"}}, "BF16"),
        ({"dtype": None, "text_config": {"dtype": "bfloat16"}}, "BF16"),
        ({"dtype": 7, "text_config": []}, None),
        ({"dtype": "float8"}, None),
        ({}, None),
    ],
)
def test_the_root_states_the_type_before_its_parts(
    config: dict[str, Any], expected: str | None
) -> None:
    """In every spelling that transformers has written; what is none counts as none."""
    assert expected == stated_dtype(config)


@pytest.mark.parametrize(
    "config",
    [
        {"dtype": "float16", "vision_config": {"dtype": "float32"}, "other": [1]},
        {"text_config": {"torch_dtype": "bfloat16", "hidden_size": 1}},
        {"dtype": None},
        {},
    ],
)
def test_another_type_is_stated_everywhere(config: dict[str, Any]) -> None:
    """No place of the config goes on stating the old one, and nothing else changes."""
    changed = with_dtype(config, "BF16")
    text = repr(changed)

    assert "BF16" == stated_dtype(changed)
    assert not ("float16'" in text.replace("bfloat16", "") or "float32" in text)
    assert changed == with_dtype(changed, "BF16")
    assert config.keys() <= changed.keys()
