"""Importance matrices: summed in our passes, read from files of llama.cpp, and written for it."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from calibrating import FINE_TUNE, QUICK
from conftest import REPOSITORY, Project
from imatrix_files import imatrix_file
from numpy.typing import NDArray

from carnice_build.calibration.chain import Activations
from carnice_build.calibration.parts import Total
from carnice_build.calibration.passes import Embed, Forward
from carnice_build.calibration.plan import Calibration
from carnice_build.calibration.source import CalibrationSource
from carnice_build.checkpoint.gguf_header import Described, encode_gguf, read_gguf
from carnice_build.checkpoint.gguf_values import Value
from carnice_build.checkpoint.profiles import Profiles, SourceFinder
from carnice_build.checkpoint.source import LocalFile
from carnice_build.commands.plan import plan_variants
from carnice_build.dtypes import NUMPY_NAME, TensorSpec
from carnice_build.errors import CheckpointError, PlanError
from carnice_build.formats.gguf.imatrix import (
    Order,
    Passes,
    Wanted,
    imatrix_source,
    imatrix_tensors,
    importance_refs,
)
from carnice_build.formats.gguf.imatrix_file import imatrix_metadata, read_imatrix
from carnice_build.formats.gguf.imatrix_ops import ColumnOrder, Importance
from carnice_build.graph import (
    ActionGraph,
    ActionOutput,
    ArrayOp,
    BadInput,
    NonFiniteValue,
    TensorData,
    TensorRef,
    View,
    kept_unasked,
)
from carnice_build.recipe.schema import FileSpec
from carnice_build.steps.base import PlanContext
from carnice_build.tensors import SourceTensor

pytest_plugins = ["calibrating"]

Floats = NDArray[np.float32]

DEMO = REPOSITORY / "demo" / "qwen3.6-27b"

SUMS = np.arange(1, 13, dtype=np.float32)


def floats(values: Any) -> Floats:
    return np.array(values, np.float32)


def applied(op: ArrayOp, params: Mapping[str, Any], *inputs: Floats) -> Floats:
    out = np.full_like(inputs[0], 77)
    given = [TensorData("F32", item) for item in inputs]
    op.apply(params, given, [TensorData("F32", out)])
    return out


def value(ref: TensorRef) -> Floats:
    """What a tensor holds, computed here."""
    origin = ref.origin
    if isinstance(origin, ActionOutput):
        assert isinstance(origin.action.op, ArrayOp)
        inputs = [value(item) for item in origin.action.inputs]
        return applied(origin.action.op, origin.action.params, *inputs).reshape(ref.spec.shape)
    assert origin.file is not None
    content = bytearray(ref.spec.nbytes)
    origin.file.read_into(origin.offset, memoryview(content))
    return np.frombuffer(content, NUMPY_NAME[ref.spec.dtype]).reshape(ref.spec.shape)


def written(path: Path, content: bytes) -> LocalFile:
    path.write_bytes(content)
    return LocalFile(path)


def stack_and_matrix() -> dict[str, tuple[Floats, Floats]]:
    """Sums and counts of a stack of three experts, one of which was given nothing, and a matrix."""
    return {
        "blk.0.ffn_up_exps.weight": (SUMS.reshape(3, 4), floats([2, 0, 4])),
        "blk.0.attn_q.weight": (SUMS[None, :6], floats([10])),
    }


WANTED = (
    Wanted("blk.0.attn_q.weight", (8, 6)),
    Wanted("blk.0.ffn_up_exps.weight", (3, 8, 4)),
)


# --- what a count makes of sums ------------------------------------------------------------------


def test_importance_is_the_mean_square_and_1_where_nothing_was_counted() -> None:
    """Expert by expert; counts are whole numbers, which floats are rounded to as lround does."""
    sums = SUMS.reshape(3, 4)

    found = applied(Importance(), {"calls": None}, sums, floats([2, 0, 4]))
    rounded = applied(Importance(), {"calls": None}, sums, floats([0.5, 0.49, -3]))

    assert [[0.5, 1, 1.5, 2], [1] * 4, [2.25, 2.5, 2.75, 3]] == found.tolist()
    assert [[1, 2, 3, 4], [1] * 4, [1] * 4] == rounded.tolist()


def test_one_count_may_be_that_of_several_matrices() -> None:
    """As in files of dense tensors with three axes, and in those of the old form."""
    sums = SUMS.reshape(3, 4)

    assert (sums / 2).tolist() == applied(Importance(), {"calls": None}, sums, floats([2])).tolist()
    assert (sums / 2).tolist() == applied(Importance(), {"calls": 2}, sums).tolist()
    assert sums.tolist() == applied(Importance(), {"calls": 0}, sums).tolist()


@pytest.mark.parametrize(
    ("operand", "bad", "error"),
    [
        (0, np.nan, NonFiniteValue),
        (0, np.inf, NonFiniteValue),
        (0, -1, BadInput),
        (1, np.nan, NonFiniteValue),
        (1, 1e30, BadInput),
    ],
)
def test_what_is_no_sum_of_squares_is_refused(
    operand: int, bad: float, error: type[Exception]
) -> None:
    """It says of which input, and where."""
    inputs = [SUMS.copy(), floats([1, 2, 3])]
    inputs[operand][2] = bad

    with pytest.raises(error) as raised:
        applied(Importance(), {"calls": None}, *inputs)
    assert operand == getattr(raised.value, "operand", None)
    if operand == 0:
        assert 2 == getattr(raised.value, "index", None)


def test_counts_have_to_divide_sums() -> None:
    """Nothing is left over."""
    specs = [TensorSpec("F32", (12,)), TensorSpec("F32", (5,))]

    with pytest.raises(PlanError, match="12 sums by 5 counts"):
        Importance().infer({"calls": None}, specs)


def test_columns_follow_those_of_the_weight() -> None:
    """A turn of axes within each row."""
    rows = np.arange(24, dtype=np.float32).reshape(2, 12)
    turned = applied(ColumnOrder(), {"split": [2, 3, 2], "order": [1, 0, 2]}, rows)

    assert [0, 1, 6, 7, 2, 3, 8, 9, 4, 5, 10, 11] == turned[0].tolist()
    assert (turned[0] + 12).tolist() == turned[1].tolist()
    with pytest.raises(PlanError, match="cannot split 12 columns"):
        ColumnOrder().infer({"split": [5, 2], "order": [1, 0]}, [TensorSpec("F32", (12,))])


# --- files ---------------------------------------------------------------------------------------


def test_what_is_written_comes_back(tmp_path: Path) -> None:
    """Tensors by the order of their names, sums before counts, and the four keys."""
    content = imatrix_file(stack_and_matrix(), ["text.txt"], 3, 128)
    file = written(tmp_path / "a.gguf", content)
    read, graph = read_imatrix(file), ActionGraph()
    found = importance_refs(graph, read, WANTED)

    assert (("text.txt",), 3, 128) == (read.datasets, read.chunks, read.chunk_size)
    assert (2, 3) == (found.entries, found.chunks)
    assert ((), ()) == (found.missing, found.notices)
    assert (
        floats([0.1, 0.2, 0.3, 0.4, 0.5, 0.6]).tolist()
        == value(found.refs[WANTED[0].name]).tolist()
    )
    assert [0.5, 1, 1.5, 2] == value(found.refs[WANTED[1].name])[0].tolist()
    header = read_gguf(file)
    assert ["attn_q.weight.in_sum2", "attn_q.weight.counts"] == [
        item.name.removeprefix("blk.0.") for item in header.described[:2]
    ]
    assert [(1, 6), (1, 1), (3, 4), (3, 1)] == [item.shape for item in header.described]


def test_the_gguf_package_reads_what_is_written(tmp_path: Path) -> None:
    """Keys and tensors."""
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "a.gguf"
    path.write_bytes(imatrix_file(stack_and_matrix(), ["a", "b"], 3, 128))
    reader = gguf.GGUFReader(path)
    found = {tensor.name: tensor.data for tensor in reader.tensors}

    assert "imatrix" == reader.fields["general.type"].contents()
    assert ["a", "b"] == reader.fields["imatrix.datasets"].contents()
    assert SUMS.tolist() == found["blk.0.ffn_up_exps.weight.in_sum2"].reshape(-1).tolist()
    assert [2, 0, 4] == found["blk.0.ffn_up_exps.weight.counts"].reshape(-1).tolist()


def test_what_else_llama_imatrix_writes_is_passed_over(tmp_path: Path) -> None:
    """Plain sums, statistics and keys of later versions."""
    tensors = [
        Described("a.weight.in_sum2", "F32", (1, 4)),
        Described("a.weight.counts", "F32", (1, 1)),
        Described("a.weight.in_sum", "F32", (1, 4)),
        Described("a.weight.stats", "F32", (12,)),
    ]
    metadata = {**imatrix_metadata([], 1, 2), "imatrix.stats_schema": Value("[str]", ["sum_sq"])}
    made = encode_gguf(metadata, tensors)
    file = written(tmp_path / "a", made.header + bytes(made.size - len(made.header)))

    assert ["a.weight"] == list(read_imatrix(file).entries)


def old(entries: Sequence[tuple[bytes, int, Floats]], tail: bytes = b"") -> bytes:
    """A file of the old form."""
    content = struct.pack("<i", len(entries))
    for name, calls, values in entries:
        content += struct.pack("<i", len(name)) + name
        content += struct.pack("<ii", calls, len(values)) + values.tobytes()
    return content + tail


@pytest.mark.parametrize(
    ("tail", "chunks", "datasets"),
    [
        (b"", 0, ()),
        (struct.pack("<i", 7), 7, ()),
        (struct.pack("<ii", 7, 0), 7, ()),
        (struct.pack("<ii", 7, 5) + b"a.txt", 7, ("a.txt",)),
    ],
)
def test_the_old_form_is_read(
    tmp_path: Path, tail: bytes, chunks: int, datasets: tuple[str, ...]
) -> None:
    """With one count for all of a tensor; what it says of its text may be missing."""
    entries = [(b"blk.0.attn_q.weight", 2, SUMS[:6]), (b"blk.0.ffn_up_exps.weight", 4, SUMS)]
    file = written(tmp_path / "imatrix.dat", old(entries, tail))
    read = read_imatrix(file)
    found = importance_refs(ActionGraph(), read, WANTED)

    assert (chunks, datasets) == (read.chunks, read.datasets)
    assert (SUMS[:6] / 2).tolist() == value(found.refs[WANTED[0].name]).tolist()
    assert (SUMS / 4).reshape(3, 4).tolist() == value(found.refs[WANTED[1].name]).tolist()


NUMBER = struct.Struct("<i").pack
DAMAGED: Mapping[str, tuple[bytes, str]] = {
    "empty": (b"", "ends at byte 0"),
    "text": (b"this is a page of text, and no matrix" * 9, "would have 1936287860 entries"),
    "no entry": (NUMBER(0), "would have 0 entries"),
    "less than no entry": (NUMBER(-1), "would have -1 entries"),
    "more entries than bytes": (NUMBER(1000) + bytes(99), "would have 1000 entries"),
    "a name without end": (
        NUMBER(1) + NUMBER(2**31 - 1) + bytes(99),
        "would have 2147483647 bytes",
    ),
    "no name": (old([(b"", 1, SUMS)]), "has no name"),
    "a name of other bytes": (old([(b"\xff\xfe", 1, SUMS)]), "is no text"),
    "a name with a zero": (old([(b"a\0b", 1, SUMS)]), "is no text"),
    "no value": (old([(b"a" * 32, 1, SUMS[:0])]), "would have 0 values"),
    "cut": (old([(b"a", 1, SUMS)])[:-1], "would have 12 values"),
    "a name twice": (old([(b"a", 1, SUMS)] * 2), "has 'a' twice"),
    "a cut dataset": (old([(b"a", 1, SUMS)], NUMBER(7) + NUMBER(9) + b"abc"), "ends at byte"),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_a_damaged_file_of_the_old_form_is_refused(tmp_path: Path, what: str) -> None:
    """With its name, before anything is read that it says is there."""
    content, why = DAMAGED[what]
    file = written(tmp_path / "some.dat", content)

    with pytest.raises(CheckpointError, match=why) as raised:
        read_imatrix(file)
    assert file.name == raised.value.where


def test_a_file_of_the_old_form_has_no_more_entries_than_anybody_has(tmp_path: Path) -> None:
    """However large it is."""
    file = written(tmp_path / "some.dat", NUMBER(1 << 20))
    os.truncate(tmp_path / "some.dat", 2**28)

    with pytest.raises(CheckpointError, match="would have 1048576 entries"):
        read_imatrix(file)


Change = Callable[[dict[str, Value], list[Described]], None]


def _without(key: str) -> Change:
    return lambda metadata, tensors: metadata.pop(key) and None


def _renamed(index: int, name: str) -> Change:
    def change(metadata: dict[str, Value], tensors: list[Described]) -> None:
        tensors[index] = tensors[index]._replace(name=name)

    return change


def _reshaped(index: int, *shape: int) -> Change:
    def change(metadata: dict[str, Value], tensors: list[Described]) -> None:
        tensors[index] = tensors[index]._replace(shape=shape)

    return change


def _typed(index: int, kind: str) -> Change:
    def change(metadata: dict[str, Value], tensors: list[Described]) -> None:
        tensors[index] = tensors[index]._replace(type=kind)

    return change


def _stated(key: str, stated: Value) -> Change:
    return lambda metadata, tensors: metadata.update({key: stated})


CHANGED: Mapping[str, tuple[Change, str]] = {
    "a model": (lambda metadata, tensors: tensors.clear(), r"has no tensor named \*.in_sum2"),
    "no datasets": (_without("imatrix.datasets"), "has no imatrix.datasets"),
    "no size": (_without("imatrix.chunk_size"), "has no imatrix.chunk_size"),
    "datasets of numbers": (_stated("imatrix.datasets", Value("[u32]", [1])), "no list of texts"),
    "chunks of text": (_stated("imatrix.chunk_count", Value("str", "a")), "no whole number"),
    "no counts": (_renamed(1, "b"), r"has no a.weight.counts"),
    "no sums": (_renamed(0, "b"), r"has no a.weight.in_sum2"),
    "half floats": (_typed(0, "F16"), "a.weight.in_sum2 in F16"),
    "too many counts": (_reshaped(1, 3, 1), "4 sums and 3 counts"),
    "no values": (_reshaped(0, 1, 0), "0 sums and 1 counts"),
}


@pytest.mark.parametrize("what", CHANGED)
def test_a_gguf_that_is_none_is_refused(tmp_path: Path, what: str) -> None:
    """With its name, and what is missing."""
    change, why = CHANGED[what]
    metadata = dict(imatrix_metadata(["a"], 1, 2))
    tensors = [
        Described("a.weight.in_sum2", "F32", (1, 4)),
        Described("a.weight.counts", "F32", (1, 1)),
    ]
    change(metadata, tensors)
    encoded = encode_gguf(metadata, tensors)
    content = encoded.header + bytes(encoded.size - len(encoded.header))
    file = written(tmp_path / "a.gguf", content)

    with pytest.raises(CheckpointError, match=why) as raised:
        read_imatrix(file)
    assert file.name == raised.value.where


# --- whose importance ----------------------------------------------------------------------------


def test_a_tensor_without_importance_is_told(tmp_path: Path) -> None:
    """It is quantized without; an embedding of another size counts as one."""
    entries = {**stack_and_matrix(), "token_embd.weight": (SUMS[None], floats([1]))}
    read = read_imatrix(written(tmp_path / "a", imatrix_file(entries, [], 1, 1)))
    more = [Wanted("output.weight", (9, 6)), Wanted("token_embd.weight", (9, 6))]
    found = importance_refs(ActionGraph(), read, [*WANTED, *more])

    assert ("output.weight", "token_embd.weight") == found.missing
    (notice,) = found.notices
    without = "imatrix: 2 of 4 tensors are quantized without importance"
    assert f"{without}: output.weight, token_embd.weight" == notice


def test_a_matrix_of_another_model_is_refused(tmp_path: Path) -> None:
    """It says how many tensors fit, and what is different."""
    read = read_imatrix(written(tmp_path / "a", imatrix_file(stack_and_matrix(), [], 1, 1)))
    wider = [WANTED[0], Wanted("blk.0.ffn_up_exps.weight", (3, 8, 5))]
    others = [Wanted("blk.0.attn_k.weight", (8, 6))]

    with pytest.raises(PlanError, match=r"1 of 2 tensors fit; .* has 12 values .* needs 15"):
        importance_refs(ActionGraph(), read, wider)
    with pytest.raises(
        PlanError, match=r"0 of 1 tensors fit, for it has no blk\.0\.attn_k"
    ) as none:
        importance_refs(ActionGraph(), read, others)
    assert "blk.0.attn_q.weight" == none.value.nearest


def test_a_file_is_found_in_the_project_or_where_a_profile_has_its_repository(
    tmp_path: Path,
) -> None:
    """And is named where it is not there; none lies outside."""
    recipes = tmp_path / "recipes"
    recipes.mkdir()
    (recipes / "_profiles.yaml").write_text("demo: {a/b: shelf}\n")
    (tmp_path / "shelf").mkdir()
    for path in ("mine.gguf", "shelf/theirs.gguf"):
        (tmp_path / path).write_bytes(b"GGUF")
    finder = SourceFinder(Profiles(recipes), "demo", {})

    assert tmp_path / "mine.gguf" == finder.find_file(FileSpec(file="mine.gguf")).path()
    theirs = FileSpec(model="a/b", file="theirs.gguf")
    assert tmp_path / "shelf" / "theirs.gguf" == finder.find_file(theirs).path()
    for spec in (FileSpec(file="none.gguf"), FileSpec(model="c/d", file="mine.gguf")):
        with pytest.raises(CheckpointError):
            finder.find_file(spec)
    for bad in ("../a.gguf", "/a.gguf", ""):
        with pytest.raises(ValueError, match="no file below"):
            FileSpec(file=bad)


# --- our own passes ------------------------------------------------------------------------------

LINEAR, FULL = (
    "model.language_model.layers.0.linear_attn",
    "model.language_model.layers.1.self_attn",
)


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> list[Activations]:
    """What formats plan meanwhile to find."""
    kept: list[Activations] = []

    def keeping(calibration: Any) -> Activations:
        kept.append(Activations(calibration))
        return kept[-1]

    monkeypatch.setattr("carnice_build.formats.nvfp4.format.Activations", keeping)
    return kept


def passes(graph: ActionGraph) -> int:
    """How many passes through decoder layers there are."""
    return sum(isinstance(action.op, Forward) for action in graph)


def test_no_pass_is_for_importance_alone(small: Project, found: list[Activations]) -> None:
    """Those of maxima have the sums as well, of every linear, and with the columns as in a file."""
    plan = plan_variants([FINE_TUNE], small.options(overrides=QUICK))
    graph, (activations,) = plan.graph, found
    before = passes(graph)
    source = Passes(activations, 2, ("rows.jsonl",), 2, 24)
    wanted = [
        Wanted(
            "blk.0.ssm_out.weight", (128, 256), f"{LINEAR}.out_proj", Order((2, 2, 64), (1, 0, 2))
        ),
        Wanted("blk.1.attn_q.weight", (512, 128), f"{FULL}.q_proj"),
        Wanted("blk.2.attn_q.weight", (512, 128), "mtp.layers.0.self_attn.q_proj"),
    ]
    importance = importance_refs(graph, source, wanted)
    tensors = imatrix_tensors(graph, source, wanted)

    assert 2 == before == passes(graph)
    assert [(256,), (128,)] == [ref.spec.shape for ref in importance.refs.values()]
    assert ("blk.2.attn_q.weight",) == importance.missing
    assert ["blk.0.ssm_out.weight", "blk.1.attn_q.weight"] == list(importance.refs)
    assert [ref.spec.shape for _, ref in tensors] == [item.shape for item, _ in tensors]
    assert [(1, 256), (1, 1), (1, 128), (1, 1)] == [item.shape for item, _ in tensors]
    with pytest.raises(PlanError, match=r"has importance \[64\], and .* is given \[128\]"):
        importance_refs(graph, source, [Wanted("blk.1.attn_q.weight", (512, 64), f"{FULL}.q_proj")])


@pytest.mark.parametrize(
    ("rows", "columns", "little"), [(5120, 17408, 5120 * 17408 * 2 // 512), (64, 128, 1 << 16)]
)
def test_what_is_little_beside_a_layer_is_kept_unasked(
    rows: int, columns: int, little: int
) -> None:
    """Hidden states are as large as the samples are many, and say nothing of it."""
    graph = ActionGraph()
    (hidden,) = graph.add(
        Embed(), {"dtype": "BF16"}, source("I32", 9, 4096), source("BF16", 99, columns)
    )
    params = {"names": ["down.weight"], "linears": ["down"], "dtype": "bfloat16"}
    op = Forward(transient=frozenset({0}))
    outputs = graph.add(op, params, source("I32", 0), hidden, source("BF16", rows, columns))
    _, _, sums, _ = outputs
    assert isinstance(sums.origin, ActionOutput)

    assert little == kept_unasked(sums.origin.action)
    assert 4 * columns == sums.spec.nbytes < little < hidden.spec.nbytes


def source(dtype: str, *shape: int) -> TensorRef:
    """A tensor of a checkpoint that has no bytes."""
    spec = TensorSpec(dtype, shape)
    return TensorRef(spec, SourceTensor(str(shape), spec, None, 0))


def test_a_recipe_says_where_importance_is_from(
    small: Project, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """From passes over its calibration's text, or from a file."""
    given: list[tuple[View, CalibrationSource]] = []

    def keeping(view: View, source: CalibrationSource) -> Calibration:
        given.append((view, source))
        return Calibration(view, source)

    monkeypatch.setattr("carnice_build.formats.nvfp4.format.Calibration", keeping)
    plan_variants([FINE_TUNE], small.options(overrides=QUICK))
    ((view, source),) = given
    file = written(tmp_path / "a", imatrix_file(stack_and_matrix(), ["b"], 3, 4))
    context = PlanContext(
        source.architecture, source.graph, None, {}, {}, source, find=lambda spec: file
    )
    ours = imatrix_source("calibration", view, context)
    theirs = imatrix_source(FileSpec(file="a"), view, context)

    assert isinstance(ours, Passes)
    assert (2, 24, 2) == (ours.chunks, ours.chunk_size, ours.layers)
    assert (source.dataset.name,) == ours.datasets
    assert ours.squares(f"{FULL}.q_proj") is not None
    assert ("b",) == theirs.datasets
    with pytest.raises(PlanError, match="needs a section `calibration`"):
        imatrix_source("calibration", view, replace(context, calibration=None))


def test_no_knob_is_in_the_key_of_squares(small: Project, found: list[Activations]) -> None:
    """Of formats or recipes that calibrate on one text."""
    for changes in ((), ("quantize.kv_cache={format: fp8}",)):
        plan_variants([FINE_TUNE], small.options(overrides=(*QUICK, *changes)))
    first, second = ({**of.squares(0), **of.squares(1)} for of in found)

    assert 15 == len(first)
    assert [item.sums.identity for item in first.values()] == [
        item.sums.identity for item in second.values()
    ]


def test_sums_of_parts_are_added(small: Project, found: list[Activations]) -> None:
    """Once for each tensor, and only where they are asked for."""
    plan = plan_variants([FINE_TUNE], small.options(overrides=(*QUICK, "calibration.parts=2")))
    (activations,) = found

    def totals() -> int:
        return sum(isinstance(action.op, Total) for action in plan.graph)

    before = totals()
    squares = activations.squares(1)
    assert (0, 2 * len(squares)) == (before, totals())


def test_totals_are_rounded_once() -> None:
    """In float64, of which float32 would lose what is small."""
    parts = [floats([2**24, 1]), floats([1, 2]), floats([1, 3])]

    assert [2**24 + 2, 6] == applied(Total(), {}, *parts).tolist()
    with pytest.raises(NonFiniteValue) as raised:
        applied(Total(), {}, floats([1, 2]), floats([1, np.inf]))
    assert (1, 1) == (raised.value.operand, raised.value.index)


# --- llama.cpp's own tools -----------------------------------------------------------------------

_LINEARS: Mapping[str, str] = {
    "attn_qkv": "linear_attn.in_proj_qkv",
    "attn_gate": "linear_attn.in_proj_z",
    "ssm_alpha": "linear_attn.in_proj_a",
    "ssm_beta": "linear_attn.in_proj_b",
    "ssm_out": "linear_attn.out_proj",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
CHUNKS, CHUNK = 3, 128


def tool(name: str) -> str:
    """One of llama.cpp's programs; a skip where there is none."""
    variable = name.upper().replace("-", "_")
    found = os.environ.get(variable) or shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not on PATH, and {variable} does not say where it is")
    return found


def run(*command: object) -> str:
    """What a program says."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert 0 == done.returncode, (done.stdout + done.stderr)[-2000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's base in F32, as llama.cpp's converter makes it."""
    converter = pytest.importorskip("gguf_converter")
    path = tmp_path_factory.mktemp("model") / "demo.gguf"
    options = ("--outtype", "f32", "--outfile", path)
    run(sys.executable, converter.RUNNER, converter.source(), "qwen35", DEMO, *options)
    return path


def llama_imatrix(model: Path, folder: Path) -> LocalFile:
    """What llama-imatrix finds in a text, which lies beside its file."""
    text, path = folder / "text.txt", folder / "imatrix.gguf"
    text.write_bytes((DEMO.parent / "heldout.txt").read_bytes()[:6000])
    sizes = ("-c", CHUNK, "-b", CHUNK, "-ub", CHUNK, "--chunks", CHUNKS, "-t", 2)
    exact = ("-fa", "off", "-ctk", "f32", "-ctv", "f32", "--no-ppl")
    run(tool("llama-imatrix"), "-m", model, "-f", text, *sizes, *exact, "-o", path)
    return LocalFile(path)


def our_squares(text: str) -> dict[str, tuple[Floats, int]]:
    """By our passes in float32, over the same tokens: sums and counts by layer and linear."""
    import torch
    from driving import Checkpoint
    from safetensors.torch import load_file
    from tokenizers import Tokenizer

    from carnice_build.calibration.driver import Arithmetic, LayerDriver
    from carnice_build.calibration.watch import seen_inputs

    checkpoint = Checkpoint(DEMO)
    tensors = {
        name: tensor
        for path in DEMO.glob("*.safetensors")
        for name, tensor in load_file(path).items()
        if ".language_model." in name
    }
    vars(checkpoint)["tensors"] = tensors
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    tokens = tokenizer.encode(text, add_special_tokens=False).ids[: CHUNKS * CHUNK]
    table = tensors[f"{checkpoint.prefix}embed_tokens.weight"]
    hidden = [table[sample].unsqueeze(0) for sample in torch.tensor(tokens).view(CHUNKS, CHUNK)]
    found: dict[str, tuple[Floats, int]] = {}
    for index in range(checkpoint.layers):
        driver = LayerDriver(checkpoint.config, index, Arithmetic("float32", "eager", 2))
        named = checkpoint.layer(index)
        layer = driver.layer(named)
        with seen_inputs(layer, driver.owners(named)) as seen:
            hidden = [driver.run(layer, driver.enter(state)) for state in hidden]
        for name, squares in seen.squares.items():
            found[f"{index}.{name}"] = squares.float().numpy(), seen.tokens[name]
    return found


@pytest.mark.wide
def test_our_sums_are_those_of_llama_imatrix(model: Path, tmp_path: Path) -> None:
    """To a few units in the last place of float32, in all tensors, and as many vectors."""
    file = llama_imatrix(model, tmp_path)
    found, counted = our_squares((tmp_path / "text.txt").read_text()), 0

    for name, entry in read_imatrix(file).entries.items():
        _, layer, kind, _ = name.split(".")
        assert entry.counts is not None
        sums, count = found.pop(f"{layer}.{_LINEARS[kind]}")
        if kind == "ssm_out":
            sums = applied(ColumnOrder(), {"split": [2, 2, 64], "order": [1, 0, 2]}, sums)
        theirs = value(TensorRef(entry.sums.spec, entry.sums))
        np.testing.assert_allclose(theirs, sums, rtol=1e-5)
        assert [count] == value(TensorRef(entry.counts.spec, entry.counts)).tolist()
        counted += 1
    assert ({}, 62) == (found, counted)


@pytest.mark.wide
def test_llama_quantize_makes_of_ours_what_it_makes_of_its_own(model: Path, tmp_path: Path) -> None:
    """The same sums in a file that we write give every tensor the same bytes."""
    gguf = pytest.importorskip("gguf")
    file = llama_imatrix(model, tmp_path)
    read = read_imatrix(file)
    entries = {
        name: (value(TensorRef(entry.sums.spec, entry.sums))[None], floats([CHUNKS * CHUNK]))
        for name, entry in read.entries.items()
    }
    ours = tmp_path / "ours.gguf"
    ours.write_bytes(imatrix_file(entries, read.datasets, read.chunks, read.chunk_size))
    made = {}
    for name in ("imatrix", "ours"):
        out = tmp_path / f"{name}-q4.gguf"
        said = run(
            tool("llama-quantize"), "--imatrix", tmp_path / f"{name}.gguf", model, out, "Q4_K_M", 2
        )
        assert "have importance matrix data with 62 entries" in said
        made[name] = {tensor.name: tensor.data.tobytes() for tensor in gguf.GGUFReader(out).tensors}

    assert made["imatrix"] == made["ours"]
