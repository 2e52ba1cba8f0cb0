"""`carnice verify` and `carnice diff` of GGUF: a build passes, and what was done to it is named."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from conftest import REPOSITORY
from family_builds import build_checked
from imatrix_files import imatrix_file
from verifying import Copy
from zoo import write_zoo

from carnice_build.checkpoint.gguf_header import encode_gguf, read_gguf
from carnice_build.checkpoint.source import LocalFile
from carnice_build.commands.build import build_variants
from carnice_build.commands.diff import State, diff_folders
from carnice_build.commands.options import Options
from carnice_build.commands.plan import plan_variants
from carnice_build.commands.report import VariantSummary, collect_report
from carnice_build.commands.verify import VerifyResult, VerifySettings, verify_variants
from carnice_build.formats.folder import BUILD_NAME, open_folder
from carnice_build.formats.gguf.checks import GgufChecks
from carnice_build.formats.gguf.imatrix_file import SUMS
from carnice_build.formats.values import PlainValues
from carnice_build.report.verify_table import verify_json
from carnice_build.store.digests import digest_bytes
from carnice_build.verification.result import Outcome

MIXED, WHOLE = "gguf-mixed-mtp", "gguf-whole"
RECIPES = {
    MIXED: "{extends: _base/carnice-mtp.yaml, quantize: {format: gguf, mix: Q4_K_M}",
    WHOLE: "{extends: _base/carnice-vision-mtp.yaml, quantize: {format: gguf, mix: BF16}",
}
DOWN = "blk.1.ffn_down.weight"
"""In Q4_K, whose blocks begin with the unit of their steps, in F16."""
UP = "blk.1.ffn_up.weight"


@dataclass(frozen=True)
class Built:
    """Builds of both variants, which tests do not change, and what verify says of the mix.

    `summary` is what a report says of it then.
    """

    options: Options
    report: VerifyResult
    summary: VariantSummary

    def folder(self, variant: str) -> Path:
        """A variant's folder."""
        return self.options.out / variant


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    root = tmp_path_factory.mktemp("gguf")
    shutil.copytree(REPOSITORY / "recipes", root / "recipes")
    (root / "demo").symlink_to(REPOSITORY / "demo")
    for name, text in RECIPES.items():
        recipe = f"{text}, variant: {name}, description: For tests}}"
        (root / "recipes" / f"{name}.yaml").write_text(recipe)
    options = Options(recipes=root / "recipes", out=root / "build", cache=root / "cache", jobs=2)
    build_variants(list(RECIPES), options)
    settings = VerifySettings(samples=2, lengths=(128,))
    result = verify_variants([MIXED], options, settings)
    (summary,) = collect_report([MIXED], options).variants
    return Built(options, result, summary)


@pytest.fixture
def copied(built: Built, tmp_path: Path) -> Copy:
    return Copy.of(MIXED, built.options, tmp_path)


def model(folder: Path) -> Path:
    """The file of the text model."""
    (path,) = (path for path in folder.glob("*.gguf") if not path.name.startswith("mmproj"))
    return path


def change(copied: Copy, edit: Callable[[bytearray], bytes | None]) -> None:
    """Change the bytes of the file."""
    path = model(copied.folder)
    data = bytearray(path.read_bytes())
    found = edit(data)
    path.chmod(0o644)
    path.write_bytes(data if found is None else found)


def rows(copied: Copy, name: str) -> tuple[int, int]:
    """Where a tensor begins, and the bytes of a row."""
    entries = read_gguf(LocalFile(model(copied.folder))).entries
    entry = next(entry for entry in entries if entry.name == name)
    return entry.offset, entry.spec.row_bytes


def test_a_fresh_build_passes_every_check(built: Built) -> None:
    """Nothing is skipped; dequantized weights compute nearly what the source does, and draft."""
    (result,) = built.report.variants
    found = {row.name: row.found[0] for row in built.report.perplexities}

    assert {Outcome.PASSED} == {check.outcome for check in result.checks}, result
    assert 9 == len(result.checks)
    assert found[MIXED].kl is not None
    assert 0 < found[MIXED].kl < 0.02
    packaged, _, none = (row.drafts for row in built.report.acceptances)
    assert 1 == none[1].mean_length < 1.4 < packaged[1].mean_length
    json.dumps(verify_json(built.report), allow_nan=False)


def test_the_gguf_package_reads_the_file(built: Built) -> None:
    """As many tensors, of the same types and shapes, as our own reader finds."""
    gguf = pytest.importorskip("gguf")
    path = model(built.folder(MIXED))
    theirs = {
        tensor.name: (tensor.tensor_type.name, [int(side) for side in reversed(tensor.shape)])
        for tensor in gguf.GGUFReader(path).tensors
    }

    ours = {
        item.name: (item.type, list(item.shape)) for item in read_gguf(LocalFile(path)).described
    }

    assert ours == theirs
    assert {"Q4_K", "Q5_0", "Q6_K", "Q8_0", "F32"} == {kind for kind, _ in ours.values()}


def test_what_the_converter_does_to_tensors_is_undone(built: Built) -> None:
    """Heads, norms, decays, convolutions and the tower are again what the sources hold."""
    (plan,) = plan_variants([WHOLE], built.options).variants
    folder = open_folder(built.folder(WHOLE))

    found = GgufChecks("BF16").by_module(folder.tensors, plan.architecture)

    assert plan.view.keys() == found.keys()
    for name, ref in plan.view.items():
        assert ref.spec.shape == found[name].spec.shape, name
        ours, theirs = (PlainValues(item) for item in (found[name], ref.origin))
        rounding = 2.0**-11 if name.startswith("model.visual") else 2.0**-20
        np.testing.assert_allclose(
            ours.rows(0, ours.shape[0]),
            theirs.rows(0, theirs.shape[0]),
            rtol=rounding,
            atol=2.0**-24,
            err_msg=name,
        )


def test_rows_that_changed_places_are_out_of_bounds(copied: Copy) -> None:
    """Even two of a matrix whose weights are all alike."""
    start, size = rows(copied, DOWN)

    def swap(data: bytearray) -> None:
        first, second = slice(start, start + size), slice(start + size, start + 2 * size)
        data[first], data[second] = data[second], data[first]

    change(copied, swap)
    found = copied.problems()

    assert {"digests", "round trip"} == set(found)
    assert "layers.1.mlp.down_proj" in found["round trip"]


@pytest.mark.parametrize("unit", [b"\0\0", None], ids=["nothing", "twice as large"])
def test_one_wrong_unit_is_out_of_bounds(copied: Copy, unit: bytes | None) -> None:
    """What a block's steps are multiples of, and what only digests would tell of otherwise."""
    start, _ = rows(copied, DOWN)

    def turn(data: bytearray) -> None:
        (own,) = struct.unpack_from("<e", data, start)
        data[start : start + 2] = struct.pack("<e", 2 * own) if unit is None else unit

    change(copied, turn)

    assert "layers.1.mlp.down_proj" in copied.problems()["round trip"]


def test_one_wrong_level_is_out_of_bounds(copied: Copy) -> None:
    """A single weight of the older types, too."""
    start, _ = rows(copied, UP)

    def flip(data: bytearray) -> None:
        data[start + 10] ^= 4

    change(copied, flip)

    assert "layers.1.mlp.up_proj: 1 weights" in copied.problems()["round trip"]


def test_a_matrix_of_importance_is_read_as_well(copied: Copy) -> None:
    """Its sums belong to no module, but to the folder: nothing is missing, and damage is named."""
    path, file = copied.folder / "model-imatrix.gguf", copied.folder / BUILD_NAME
    name, sums = "blk.0.ffn_up.weight", np.ones((1, 128), np.float32)
    path.write_bytes(imatrix_file({name: (sums, sums[0, :1])}, ["text"], 1, 128))
    record = json.loads(file.read_text(encoding="utf-8"))
    record["files"][path.name] = {"size": path.stat().st_size}
    sums_record = {"file": path.name, "digest": digest_bytes(sums.tobytes())}
    record["tensors"][name + SUMS] = sums_record
    file.write_text(json.dumps(record), encoding="utf-8")

    whole = copied.problems()
    path.write_bytes(path.read_bytes()[:-200] + bytes(200))
    damaged = copied.problems()

    assert {} == whole
    assert f"tensor {name}{SUMS} in {path.name} is damaged" in damaged["digests"]
    assert {"digests"} == set(damaged)


def test_a_truncated_file_is_named(copied: Copy) -> None:
    """Its tensors do not end where it does."""
    change(copied, lambda data: bytes(data[:-1000]))

    found = copied.problems()

    assert {"digests", "structure", "round trip"} >= set(found) >= {"digests", "structure"}
    assert "its tensors end at byte" in found["structure"]


def test_another_type_of_as_many_bytes_is_named(copied: Copy) -> None:
    """Sizes tell Q4_K from no other, so its number is changed to one of a type that they fit."""
    name = UP.encode()

    def retype(data: bytearray) -> None:
        # Behind the name: the number of axes, two lengths, the type.
        at = data.index(name) + len(name) + 4 + 16
        assert 6 == data[at]
        # Q4_0 has blocks of 18 bytes for 22: a row of as many has other columns.
        columns = data.index(name) + len(name) + 4
        (width,) = struct.unpack_from("<Q", data, columns)
        struct.pack_into("<Q", data, columns, width // 32 * 22)
        data[at] = 24

    change(copied, retype)
    found = copied.problems()

    assert f"has {UP} as I8" in found["structure"]


RESHAPED = {
    "more axes": {"blk.0.ssm_a": ("blk.0.ssm_a", (1, 4))},
    "nothing": {"blk.1.ssm_conv1d.weight": ("blk.1.ssm_conv1d.weight", (0, 4))},
    "each other's": {"blk.2.attn_qkv.weight": (DOWN, ()), DOWN: ("blk.2.attn_qkv.weight", ())},
}
"""By the name of a tensor, what it is called and of which shape it is told to be; () for its own"""


@pytest.mark.parametrize("case", RESHAPED)
def test_a_tensor_of_another_shape_is_named(built: Built, copied: Copy, case: str) -> None:
    """Verify says which, and diff compares the rest, with neither ending in a traceback."""
    path = model(copied.folder)
    header = read_gguf(LocalFile(path))
    changed = RESHAPED[case]
    told = [
        item._replace(name=changed[item.name][0], shape=changed[item.name][1] or item.shape)
        if item.name in changed
        else item
        for item in header.described
    ]
    encoded = encode_gguf(header.metadata, told)
    path.unlink()
    path.write_bytes(encoded.header + bytes(encoded.size - len(encoded.header)))
    name = next(iter(changed))

    assert f"has {name} as " in copied.problems()["structure"]
    found = {
        item.module: item for item in diff_folders(built.folder(MIXED), copied.folder, 2).modules
    }
    assert found[name.removesuffix(".weight")].state is State.ONLY_B


def test_a_changed_key_is_named(copied: Copy) -> None:
    """With what it should be."""

    def edit(data: bytearray) -> None:
        at = data.index(b"qwen35.rope.freq_base") + len(b"qwen35.rope.freq_base") + 4
        struct.pack_into("<f", data, at, 7.0)

    change(copied, edit)

    assert "has qwen35.rope.freq_base 7.0 instead of " in copied.problems()["structure"]


def test_a_report_tells_what_was_found(built: Built) -> None:
    """Bits by the files' own sizes, figures of torch, and errors by module."""
    found = built.summary

    assert found.passed
    assert "gguf" == found.format
    assert 5.5 < found.bits_per_weight < 6.5
    assert {"mlp.down_proj", "lm_head"} <= {item.kind for item in found.errors}
    assert found.findings is not None
    assert {"BF16", MIXED} == {row.name for row in found.findings.rows}


def test_two_folders_are_compared_by_modules(built: Built) -> None:
    """Types are told by ggml's names, and numbers are compared dequantized."""
    found = {
        item.module: item
        for item in diff_folders(built.folder(MIXED), built.folder(WHOLE), 2).modules
    }

    down = found["model.language_model.layers.1.mlp.down_proj"]
    assert down.a is not None and down.b is not None and down.relative is not None
    assert ("Q4_K", "BF16", State.DIFFERENT) == (down.a.storage, down.b.storage, down.state)
    assert 0.05 < down.relative < 0.1
    assert State.SAME is found["model.language_model.norm"].state
    assert {State.ONLY_B} == {
        item.state for name, item in found.items() if name.startswith("model.visual")
    }


def test_a_folder_is_compared_with_its_source(built: Built) -> None:
    """Modules meet by their names in safetensors, and only what was rounded differs."""
    source = REPOSITORY / "demo" / "qwen3.6-27b"
    found = diff_folders(built.folder(MIXED), source, 2).modules
    heads = [item for item in found if item.module.startswith("mtp.")]

    assert heads
    for item in heads:
        assert item.a is not None and item.b is not None, item.module
        assert item.relative is not None and item.relative < 0.1, item.module


@pytest.mark.parametrize("mix", ["Q8_0", "Q4_K_M"])
def test_experts_are_compared_one_by_one(tmp_path: Path, mix: str) -> None:
    """A stack in one tensor is as near to its source as a matrix must be, and so are others."""
    source = write_zoo(tmp_path / "model", "qwen3_5_moe", "hub")
    recipe = f"quantize: {{format: gguf, mix: {mix}, tokenizer_pre: qwen35}}\n"
    folder = build_checked(tmp_path, source, "experts", recipe)

    found = {item.module: item for item in diff_folders(folder, source, 2).modules}
    stack = found["model.language_model.layers.1.mlp.experts.*.down_proj"]

    assert all(item.a is not None and item.b is not None for item in found.values())
    assert stack.relative is not None
    assert 0 < stack.relative < 0.1
