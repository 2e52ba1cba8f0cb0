"""INT4 builds of every family, held against auto-round itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from auto_round import AutoRound, RTNConfig
from family_builds import build_checked
from tiny import Tensor, read_all_tensors, read_json
from zoo import FAMILIES, Layout, write_zoo

from carnice_build.models import known_types

NEAREST = "quantize: {format: autoround, method: nearest}\n"

OFTEN = ("llama", "qwen3_moe")
"""What is compared every time; the rest is by `make test-wide`."""

DECODED = {("deepseek_v3", "hub"), ("gpt_oss", "hub"), ("minimax_m2", "hub")}
"""What the hub has in FP8 or MXFP4; `test_quantized_sources` builds from these."""


def marked(family: str, *values: Any) -> Any:
    """The parameters of a case, of which few are run every time."""
    marks = () if family in OFTEN else pytest.mark.wide
    return pytest.param(family, *values, marks=marks)


CASES = [
    marked(family, layout)
    for family, entry in FAMILIES.items()
    if entry.model_type in known_types()
    for layout in ("transformers", "hub")
    if (family, layout) not in DECODED
]


def plain_linears(folder: Path) -> list[str]:
    """What the config of a folder leaves at 16 bits."""
    stated = read_json(folder / "config.json")["quantization_config"]
    return [name for name, entry in stated["extra_config"].items() if entry["bits"] == 16]


@pytest.mark.parametrize(("family", "layout"), CASES)
def test_round_to_nearest_is_auto_rounds(tmp_path: Path, family: str, layout: Layout) -> None:
    """Every tensor that its mode without a model makes of the shards, told to leave alone the same.

    Experts are one by one on both sides, whichever way they come.
    """
    source = write_zoo(tmp_path / "source", family, layout)
    ours = build_checked(tmp_path, source, "int4", NEAREST)
    plain = plain_linears(ours)
    library = AutoRound(
        str(source),
        scheme="W4A16",
        alg_configs=RTNConfig(disable_opt_rtn=True),
        layer_config={name: {"bits": 16} for name in plain},
        model_free=True,
        output_dir=str(tmp_path / "theirs"),
    )
    library.quantize_and_save(str(tmp_path / "theirs"), format="auto_round")
    made, theirs = read_all_tensors(ours), read_all_tensors(tmp_path / "theirs")

    assert [] == differing(theirs, made)


def differing(theirs: dict[str, Tensor], ours: dict[str, Tensor]) -> list[str]:
    """Names of tensors that are not the same in both.

    Of norms in F32 in a BF16 model we make BF16, as the library when it loads the model.
    """
    narrowed = {
        name
        for name in theirs.keys() & ours.keys()
        if (theirs[name].dtype, ours[name].dtype) == ("F32", "BF16")
    }
    assert all(name.endswith("norm.weight") for name in narrowed)
    names = (theirs.keys() | ours.keys()) - narrowed
    return sorted(name for name in names if theirs.get(name) != ours.get(name))
