"""`carnice verify` of the INT4 formats: fresh builds pass, damage is named, bounds hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import REPOSITORY
from qwen import BODY
from tiny import read_json, write_json
from verifying import Copy

from carnice_build.commands.build import build_variants
from carnice_build.commands.options import Options
from carnice_build.commands.verify import VerifySettings, verify_variants
from carnice_build.formats.autoround.checks import nearest_allowance
from carnice_build.formats.compressed_tensors.storages.integers_values import Integers, allowance
from carnice_build.kernels import autoround, compressed, elementwise, integers
from carnice_build.verification.result import Outcome

NEAREST, MERGED, AWQ = "int4-rtn", "int4-bf16-mtp", "w4a16-awq-minmax"
UP = f"{BODY}layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> Options:
    """Where both INT4 variants that need no calibration are built."""
    root = tmp_path_factory.mktemp("int4")
    options = Options(REPOSITORY / "recipes", out=root / "build", cache=root / "cache", jobs=2)
    build_variants([NEAREST, MERGED], options)
    return options


@pytest.fixture
def nearest(options: Options, tmp_path: Path) -> Copy:
    return Copy.of(NEAREST, options, tmp_path)


@pytest.fixture
def merged(options: Options, tmp_path: Path) -> Copy:
    return Copy.of(MERGED, options, tmp_path)


def test_fresh_builds_pass_every_check(options: Options) -> None:
    """Every quantized module is compared, and the dequantized model runs beside its source."""
    report = verify_variants([NEAREST], options, VerifySettings(samples=1, lengths=(64,)))

    (result,) = report.variants
    assert [Outcome.PASSED] * 9 == [check.outcome for check in result.checks], result
    assert ["BF16", NEAREST] == [row.name for row in report.perplexities]
    found = {check.name: check for check in result.checks}
    assert 50 == len(found["round trip"].details["modules"])
    assert 3 == len(report.acceptances)


def test_a_merge_passes_on_the_grid_of_its_base(merged: Copy) -> None:
    """Codes that follow a fine-tune are within their bound of it."""
    assert {} == merged.problems()


def test_a_merges_scales_must_be_the_grids(merged: Copy) -> None:
    """What was taken over from the quantized base is compared byte for byte."""
    name = f"{UP}.scales"
    merged.flip(name, 0, 1)

    assert f"tensor {name} is not equal to its source" == merged.problems()["round trip"]


@pytest.mark.parametrize("position", [0, 1001])
def test_one_wrong_code_is_out_of_bounds(nearest: Copy, position: int) -> None:
    """A single weight two steps off is further than rounding to nearest allows."""
    nearest.flip(f"{UP}.qweight", position, 2)

    found = nearest.problems()

    assert {"digests", "round trip"} == set(found)
    assert f"{UP}: 1 weights" in found["round trip"]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda stated: stated["extra_config"].pop("mtp.fc"), "does not list mtp.fc"),
        (
            lambda stated: stated["extra_config"].pop("mtp.layers.0.mlp.gate_up_proj"),
            "does not list mtp.layers.0.mlp.gate_up_proj",
        ),
        (
            lambda stated: stated["extra_config"].update({UP: {"bits": 16}}),
            f"lists {UP}, which is quantized",
        ),
        (lambda stated: stated["extra_config"].update({"lm_head": {"bits": 8}}), "other bits"),
        (lambda stated: stated.update(block_name_to_quantize="model.layers"), "lists no block"),
        (lambda stated: stated.update(group_size=32), "states group_size 32 instead of 128"),
        (lambda stated: stated.update(sym=False), "states sym False instead of True"),
    ],
)
def test_the_config_must_fit_the_tensors(
    nearest: Copy, change: Callable[[dict[str, Any]], Any], problem: str
) -> None:
    """What is packed, what is listed and what is ignored is one set of modules."""
    config = read_json(nearest.folder / "config.json")
    change(config["quantization_config"])
    write_json(nearest.folder / "config.json", config)

    assert problem in nearest.problems()["structure"]


@pytest.fixture(scope="module")
def smoothed(options: Options) -> Options:
    """Where the AWQ variant with the cheaper observer is built."""
    overrides = ("calibration.samples=2", "calibration.length=64", "quantize.awq.n_grid=4")
    awq = replace(options, overrides=overrides)
    build_variants([AWQ], awq)
    return awq


def test_awq_passes_and_says_what_it_cannot_compare(smoothed: Options) -> None:
    """What AWQ smoothed has no source to be held against, o_proj has."""
    (result,) = verify_variants([AWQ], smoothed, VerifySettings(run=False)).variants

    found = {check.name: check for check in result.checks}
    assert not [name for name, check in found.items() if check.outcome is Outcome.FAILED], result
    details = found["round trip"].details
    assert all(module.endswith("o_proj") for module in details["modules"])
    assert details["not_compared"] > 0


@pytest.mark.parametrize(
    ("added", "problem"),
    [
        ("re:.*o_proj", "o_proj by re:.*o_proj, which is quantized"),
        ("re:.*router", "which is no module"),
    ],
)
def test_awqs_ignore_list_holds_nothing_else(
    smoothed: Options, tmp_path: Path, added: str, problem: str
) -> None:
    """Names and patterns of the list are about modules of the model, and about no quantized one."""
    copied = Copy.of(AWQ, smoothed, tmp_path)
    config = read_json(copied.folder / "config.json")
    config["quantization_config"]["ignore"].append(added)
    write_json(copied.folder / "config.json", config)

    assert problem in copied.problems()["structure"]


GROUPS: dict[str, Callable[[np.random.Generator], np.ndarray[Any, Any]]] = {
    "normal": lambda random: random.standard_normal((64, 512)),
    "signs": lambda random: np.sign(random.standard_normal((64, 512))),
    "offset": lambda random: 1 + random.standard_normal((64, 512)) / 50,
    "one side": lambda random: np.abs(random.standard_normal((64, 512))),
    "tiny": lambda random: random.standard_normal((64, 512)) * 1e-6,
    "zeros": lambda random: np.zeros((64, 512)),
    "outliers": lambda random: random.standard_t(1, (64, 512)).clip(-1e3, 1e3),
}


@pytest.mark.parametrize("kind", GROUPS)
def test_the_bound_of_rounding_to_nearest_holds(kind: str) -> None:
    """No weight that auto-round's rule rounded is outside, whatever its group looks like."""
    values = GROUPS[kind](np.random.default_rng(0)).astype(np.float32)
    codes, zeros = np.empty((64, 64), np.int32), np.empty((4, 8), np.int32)
    scales, restored = np.empty((4, 64), np.float16), np.empty_like(values)
    autoround.quantize_rtn(values, "F32", 128, 0, codes, zeros, scales)
    autoround.dequantize_rows(codes, zeros, scales, 0, restored)

    allowed = nearest_allowance(values.reshape(64, -1, 128)).reshape(values.shape)

    assert (np.abs(restored - values) <= allowed).all()


@pytest.mark.parametrize("kind", GROUPS)
@pytest.mark.parametrize("observer", ["mse", "memoryless_minmax"])
@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_the_bound_of_asymmetric_groups_holds(kind: str, observer: str, dtype: str) -> None:
    """No weight that llm-compressor's observers and rounding gave is outside."""
    values = GROUPS[kind](np.random.default_rng(0)).astype(np.float32)
    raw = np.empty(values.shape, {"BF16": np.uint16, "F16": np.float16}[dtype])
    elementwise.cast(values, "F32", dtype, raw)
    elementwise.cast(raw, dtype, "F32", values)
    scales, zeros = np.empty((64, 4), raw.dtype), np.empty((64, 4), np.int8)
    packed = np.empty((64, 64), np.int32)
    searched = observer == "mse"
    if searched:
        compressed.mse_qparams(raw, dtype, 128, scales, zeros)
    integers.quantize_rows(raw, dtype, 4, 128, packed, scales, zeros, given=searched)
    wide = np.empty(scales.shape, np.float32)
    elementwise.cast(scales, dtype, "F32", wide)
    codes = (packed.view(np.uint32)[..., None] >> np.arange(0, 32, 4, dtype=np.uint32)) & 15
    grouped = codes.reshape(64, 4, 128).astype(np.float32) - 8 - zeros[..., None]

    off = np.abs((grouped * wide[..., None]).reshape(-1, 128) - values.reshape(-1, 128))

    assert (
        off <= allowance(values.reshape(-1, 128), Integers(4, 128, False, observer), dtype)
    ).all()
