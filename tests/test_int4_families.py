"""INT4 builds of every family, held against auto-round itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from auto_round import AutoRound, RTNConfig
from family_builds import build_checked
from tiny import Tensor, bf16, read_all_tensors, read_json
from zoo import FAMILIES, Layout, write_zoo

from carnice_build.models import known_types

NEAREST = "quantize: {format: autoround, method: nearest}\n"
KEPT = {"gemma4": "quantize: {format: autoround, method: nearest, keep: ['*.per_layer_*']}\n"}
"""Of the tiny Gemma 4, what is too narrow for groups of 128."""

OFTEN = ("llama", "qwen3_moe")
"""What is compared every time; the rest is by `make test-wide`."""

DECODED = {("deepseek_v3", "hub"), ("gpt_oss", "hub"), ("minimax_m2", "hub")}
"""What the hub has in FP8 or MXFP4; `test_quantized_sources` builds from these."""

RENAMED = {("gemma3", "transformers")}
"""What needs a step, for transformers spells the tower in another way than the hub."""

LOADED = ("gpt_oss",)
"""Whose experts the library's mode without a model takes for what they are not: it halves gate and
up where they take turns, and rows where there are columns.  It is right when it loads the model."""


def marked(family: str, *values: Any) -> Any:
    """The parameters of a case, of which few are run every time."""
    marks = () if family in OFTEN else pytest.mark.wide
    return pytest.param(family, *values, marks=marks)


CASES = [
    marked(family, layout)
    for family, entry in FAMILIES.items()
    if entry.model_type in known_types()
    for layout in ("transformers", "hub")
    if (family, layout) not in DECODED | RENAMED
]


def plain_linears(folder: Path) -> list[str]:
    """What the config of a folder leaves at 16 bits."""
    stated = read_json(folder / "config.json")["quantization_config"]
    return [name for name, entry in stated["extra_config"].items() if entry["bits"] == 16]


@pytest.mark.parametrize(("family", "layout"), CASES)
def test_round_to_nearest_is_auto_rounds(tmp_path: Path, family: str, layout: Layout) -> None:
    """Every tensor that it makes without a model, shard by shard, told to leave alone the same.

    Experts are one by one on both sides, whichever way they come.
    """
    source = write_zoo(tmp_path / "source", family, layout)
    ours = build_checked(tmp_path, source, "int4", KEPT.get(family, NEAREST))
    plain = plain_linears(ours)
    library = AutoRound(
        str(source),
        scheme="W4A16",
        alg_configs=RTNConfig(disable_opt_rtn=True),
        layer_config={name: {"bits": 16} for name in plain},
        **{"disable_model_free" if family in LOADED else "model_free": True},
    )
    library.quantize_and_save(str(tmp_path / "theirs"), format="auto_round")
    (written,) = {path.parent for path in (tmp_path / "theirs").rglob("*.safetensors")}

    assert [] == differing(read_all_tensors(written), read_all_tensors(ours))


def differing(theirs: dict[str, Tensor], ours: dict[str, Tensor]) -> list[str]:
    """Names of tensors that are not the same in both.

    Of norms in F32 in a BF16 model we make BF16, as the library when it loads the model; and it
    makes F16 of the biases of what it packs, where ours are as all that is plain.
    """
    names = theirs.keys() | ours.keys()
    return sorted(name for name in names if not same(name, theirs.get(name), ours.get(name)))


def same(name: str, theirs: Tensor | None, ours: Tensor | None) -> bool:
    if theirs is None or ours is None:
        return False
    match name.rpartition(".")[2], theirs.dtype, ours.dtype:
        case "weight", "F32", "BF16":
            return bf16(floats(theirs)) == ours.data
        case "bias", "F16", "BF16":
            return floats(ours).astype(np.float16).tobytes() == theirs.data
    return theirs == ours


def floats(tensor: Tensor) -> np.ndarray[Any, Any]:
    """The numbers of a tensor in BF16 or F32."""
    if tensor.dtype == "F32":
        return np.frombuffer(tensor.data, np.float32)
    return (np.frombuffer(tensor.data, np.uint16).astype(np.uint32) << 16).view(np.float32)
