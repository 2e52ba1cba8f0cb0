"""Stacks of experts flow through a build expert by expert, several stacks in lockstep."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from tiny import Tensor, write_safetensors

from carnice_build.checkpoint.decoded import decoded_fp8
from carnice_build.checkpoint.header import read_header
from carnice_build.checkpoint.source import LocalFile
from carnice_build.checkpoint.stack import slab_stack, stacked
from carnice_build.checkpoint.together import whole
from carnice_build.checkpoint.turned import turned_stack
from carnice_build.dtypes import NUMPY_NAME, TensorSpec
from carnice_build.errors import CheckpointError
from carnice_build.execute import jobs as jobs_module
from carnice_build.execute.executor import LocalExecutor
from carnice_build.execute.jobs import Job, plan_jobs
from carnice_build.execute.processes import LocalRunner
from carnice_build.execute.session import Outcome, execute
from carnice_build.execute.streaming import sample_digest
from carnice_build.formats.base import OutputTensor
from carnice_build.formats.compressed_tensors.storages.row_floats_ops import RowQuantize
from carnice_build.formats.elementwise import Elementwise
from carnice_build.formats.nvfp4.ops import BlockQuantize
from carnice_build.graph import ActionGraph, ActionOutput, ArrayOp, Stacked, TensorData, TensorRef
from carnice_build.models.base import Part, Role, TensorFact
from carnice_build.planning.layout import pack_layouts
from carnice_build.planning.planner import VariantPlan
from carnice_build.planning.status import BuildStatus, survey
from carnice_build.store.store import Store
from carnice_build.tensors import Reader, SourceTensor

ROWS, COLUMNS = 8, 64


def weights(experts: int, seed: int = 0) -> dict[str, np.ndarray[Any, Any]]:
    """The gate and the up projection of each expert, as bits of BF16."""
    random = np.random.default_rng(seed)
    shape = (experts, 2, ROWS, COLUMNS)
    bits = (random.standard_normal(shape).astype(np.float32).view(np.uint32) >> 16).astype("<u2")
    return {
        f"{expert}.{name}": bits[expert, index]
        for expert in range(experts)
        for index, name in enumerate(("gate", "up"))
    }


def opened(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, SourceTensor]:
    """The tensors of a file, once they are written there."""
    write_safetensors(path, tensors)
    file = LocalFile(path)
    return {
        entry.name: SourceTensor(entry.name, entry.spec, file, entry.offset)
        for entry in read_header(file).entries
    }


def stacks_of(experts: Mapping[str, SourceTensor]) -> dict[str, SourceTensor]:
    """The gates and the ups of these experts."""
    return {
        name: stacked(f"*.{name}", [tensor for key, tensor in experts.items() if name in key])
        for name in ("gate", "up")
    }


def plain(path: Path, tensors: Mapping[str, np.ndarray[Any, Any]]) -> dict[str, SourceTensor]:
    """Experts in BF16."""
    made = {name: Tensor("BF16", item.shape, item.tobytes()) for name, item in tensors.items()}
    return stacks_of(opened(path, made))


def in_fp8(path: Path, tensors: Mapping[str, np.ndarray[Any, Any]]) -> dict[str, SourceTensor]:
    """Experts in FP8, as the floats that they stand for: codes are the upper bytes, but NaN."""
    codes = {name: (item >> 8).astype(np.uint8) & 0xBF for name, item in tensors.items()}
    scales = np.linspace(0.01, 1, len(codes), dtype=np.float32)
    made = {name: Tensor("F8_E4M3", item.shape, item.tobytes()) for name, item in codes.items()}
    for name, scale in zip(codes, scales, strict=True):
        made[f"{name}_scale_inv"] = Tensor("F32", (1, 1), scale.tobytes())
    found = opened(path, made)
    return stacks_of(
        {
            name: decoded_fp8(name, found[name], found[f"{name}_scale_inv"], "BF16", (128, 128))
            for name in codes
        }
    )


class Counted(LocalFile):
    """A file of which is known where it was read by range; no samples are taken of it."""

    random_access = False

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.read: list[tuple[int, int]] = []

    @contextmanager
    def open_range(self, offset: int, count: int) -> Iterator[Reader]:
        """As any file."""
        place = offset
        with super().open_range(offset, count) as read:

            def noted(buffer: memoryview) -> None:
                nonlocal place
                self.read.append((place, len(buffer)))
                place += len(buffer)
                read(buffer)

            yield noted


def fused(path: Path, tensors: Mapping[str, np.ndarray[Any, Any]], *, turned: bool) -> SourceTensor:
    """Gates and ups of all experts in one tensor, where rows take turns; or columns, `turned`."""
    rows = np.stack(list(tensors.values())).reshape(-1, 2, ROWS, COLUMNS).swapaxes(1, 2)
    matrices = rows.reshape(-1, 2 * ROWS, COLUMNS)
    array = np.ascontiguousarray(matrices.swapaxes(1, 2) if turned else matrices)
    write_safetensors(path, {"fused": Tensor("BF16", array.shape, array.tobytes())})
    file = Counted(path)
    (entry,) = read_header(file).entries
    return SourceTensor("fused", entry.spec, file, entry.offset)


def rows_in_turns(
    path: Path, tensors: Mapping[str, np.ndarray[Any, Any]]
) -> dict[str, SourceTensor]:
    """Stacks whose rows take turns in one tensor."""
    tensor = fused(path, tensors, turned=False)
    return {
        name: slab_stack(name, tensor, first, 2 * ROWS, 2)
        for first, name in enumerate(["gate", "up"])
    }


def columns_in_turns(
    path: Path, tensors: Mapping[str, np.ndarray[Any, Any]]
) -> dict[str, SourceTensor]:
    """Stacks whose rows are columns of one tensor, and take turns there."""
    tensor = fused(path, tensors, turned=True)
    return {
        name: turned_stack(name, tensor, first, 2 * ROWS, 2)
        for first, name in enumerate(["gate", "up"])
    }


class Whole(ArrayOp):
    """Makes of a tensor itself, which it must see whole."""

    name = "whole"
    version = 1

    def infer(
        self, params: Mapping[str, Any], inputs: Sequence[TensorSpec]
    ) -> tuple[TensorSpec, ...]:
        """That of the input."""
        return tuple(inputs)

    def apply(
        self,
        params: Mapping[str, Any],
        inputs: Sequence[TensorData],
        outputs: Sequence[TensorData],
    ) -> None:
        """Copy it."""
        outputs[0].array[...] = inputs[0].array


Stacks = Callable[[Path, Mapping[str, np.ndarray[Any, Any]]], dict[str, SourceTensor]]


class Build:
    """A build of what `actions` make of two stacks, and of the stack `up` as it is."""

    def __init__(
        self,
        root: Path,
        tensors: Mapping[str, np.ndarray[Any, Any]],
        *,
        shared: bool = True,
        stacks: Stacks = plain,
    ) -> None:
        self.root = root
        count = len(tensors) // 2
        found = stacks(root / "experts.safetensors", tensors)
        self.refs = {name: TensorRef(stack.spec, stack) for name, stack in found.items()}
        self.graph = ActionGraph()
        gate, up = self.refs["gate"], self.refs["up"]
        made = [*self.graph.add(RowQuantize(), {}, gate.reshaped(count * ROWS, COLUMNS))]
        if shared:
            made += self.graph.add(Stacked(BlockQuantize()), {}, gate, up)
        fact = TensorFact("w", (count, ROWS, COLUMNS), Part.BODY, Role.NORM)
        self.outputs = [
            OutputTensor(f"out.{index}", ref, fact) for index, ref in enumerate([*made, up])
        ]
        packs = pack_layouts(self.outputs, 1 << 30, {})
        self.variants = cast(Sequence[VariantPlan], [SimpleNamespace(packs=tuple(packs))])

    def jobs(self) -> list[Job]:
        """What would run with an empty cache."""
        with Store(self.root / "empty") as store:
            return plan_jobs(survey(self.variants, store), self.graph)

    def run(self, cache: str = "cache", threads: int = 2) -> Outcome:
        """Build with a cache of this name."""
        with Store(self.root / cache) as store, LocalRunner(1, lambda _: None) as runner:
            status: BuildStatus = survey(self.variants, store)
            return execute(
                self.variants,
                status,
                self.graph,
                store,
                LocalExecutor(threads, 1 << 30),
                runner,
                lambda event: None,
            )

    def content(self, outcome: Outcome, cache: str = "cache") -> dict[str, bytes]:
        """The bytes of every output, by its name."""
        (pack,) = outcome.packs.values()
        layout = self.variants[0].packs[0]
        with Store(self.root / cache) as store:
            whole = store.pack_path(pack).read_bytes()
        return {
            slot.tensor.name: whole[slot.offset : slot.offset + slot.tensor.ref.spec.nbytes]
            for slot in layout.slots
        }


def expected(tensors: Mapping[str, np.ndarray[Any, Any]], build: Build) -> dict[str, bytes]:
    """What the ops make of one expert after another."""
    made: dict[str, bytes] = {}
    count = len(tensors) // 2
    for output in build.outputs:
        origin = output.ref.origin
        if not isinstance(origin, ActionOutput):
            made[output.name] = b"".join(tensors[f"{e}.up"].tobytes() for e in range(count))
            continue
        op = origin.action.op
        inner = op.op if isinstance(op, Stacked) else RowQuantize()
        names = ("gate", "up") if isinstance(op, Stacked) else ("gate",)
        parts = []
        for expert in range(count):
            inputs = [TensorData("BF16", tensors[f"{expert}.{name}"]) for name in names]
            specs = inner.infer({}, [TensorSpec("BF16", item.array.shape) for item in inputs])
            room = [TensorData(s.dtype, np.empty(s.shape, NUMPY_NAME[s.dtype])) for s in specs]
            inner.apply({}, inputs, room)
            parts.append(room[origin.index].array.tobytes())
        made[output.name] = b"".join(parts)
    return made


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of two experts, so that tiny stacks have several."""
    monkeypatch.setattr(jobs_module, "BLOCK_BYTES", 2 * 2 * 2 * ROWS * COLUMNS)


@pytest.mark.usefixtures("small_blocks")
def test_a_stack_gives_what_its_experts_give(tmp_path: Path) -> None:
    """One job reads both stacks once, whatever each action reads, and any number of threads
    makes the same bytes."""
    tensors = weights(5)
    build = Build(tmp_path, tensors)
    (job,) = build.jobs()
    outcome = build.run()

    assert job.streams
    assert 5 == job.rows
    assert sum(array.nbytes for array in tensors.values()) == outcome.read_bytes
    assert expected(tensors, build) == build.content(outcome)
    assert outcome.packs == build.run("other cache", threads=1).packs


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("stacks", [rows_in_turns, columns_in_turns])
@pytest.mark.parametrize("shared", [True, False], ids=["one action of both", "an action each"])
def test_what_takes_turns_is_read_once(tmp_path: Path, stacks: Stacks, shared: bool) -> None:
    """Gates and ups of one tensor come together, though an action reads the gates alone."""
    tensors = weights(5)
    build = Build(tmp_path, tensors, shared=shared, stacks=stacks)
    (job,) = build.jobs()
    source = cast(SourceTensor, build.refs["gate"].origin)
    file = cast(Counted, whole(source).file)
    outcome = build.run()

    assert job.streams
    assert expected(tensors, build) == build.content(outcome)
    assert whole(source).spec.nbytes == sum(count for _, count in file.read)
    ends = [place + count for place, count in file.read]
    assert ends[:-1] == [place for place, _ in file.read[1:]]


def test_what_takes_turns_is_read_once_where_it_is_needed_whole(tmp_path: Path) -> None:
    """An op that takes all rows at once is given them of the same read."""
    tensors = weights(5)
    build = Build(tmp_path, tensors, shared=False, stacks=rows_in_turns)
    gate = build.refs["gate"]
    build.outputs[:-1] = [
        OutputTensor(f"whole.{index}", ref, build.outputs[0].fact)
        for index, ref in enumerate(build.graph.add(Whole(), {}, gate))
    ]
    packs = pack_layouts(build.outputs, 1 << 30, {})
    build.variants = cast(Sequence[VariantPlan], [SimpleNamespace(packs=tuple(packs))])
    (job,) = build.jobs()
    file = cast(Counted, whole(cast(SourceTensor, gate.origin)).file)
    content = build.content(build.run())
    stacks = np.stack(list(tensors.values())).reshape(5, 2, ROWS, COLUMNS)

    assert not job.streams
    assert stacks[:, 0].tobytes() == content["whole.0"]
    assert stacks[:, 1].tobytes() == content[build.outputs[-1].name]
    assert 5 * 2 * 2 * ROWS * COLUMNS == sum(count for _, count in file.read)


@pytest.mark.usefixtures("small_blocks")
def test_what_is_made_is_found_again(tmp_path: Path) -> None:
    """A second build runs nothing; other files of the same experts are read once, for digests."""
    tensors = weights(5)
    build = Build(tmp_path, tensors)
    first = build.run()
    again = build.run()
    (tmp_path / "other").mkdir()
    other = Build(tmp_path / "other", tensors)
    other.root = tmp_path
    moved = other.run()

    assert [] == again.made
    assert 0 == again.read_bytes
    assert [] == moved.made
    assert [*first.packs.values()] == [*moved.packs.values()]


@pytest.mark.usefixtures("small_blocks")
def test_stacks_of_decoded_experts_flow_as_well(tmp_path: Path) -> None:
    """What is made of experts in FP8 is what is made of their floats, and found for these."""
    build = Build(tmp_path, weights(5), stacks=in_fp8)
    first = build.run()
    floats = {}
    for name, ref in build.refs.items():
        assert isinstance(ref.origin, SourceTensor)
        assert ref.origin.file is not None
        content = np.empty(ref.spec.shape, np.uint16)
        ref.origin.file.read_into(0, content.view(np.uint8).reshape(-1).data)
        floats |= {f"{expert}.{name}": content[expert] for expert in range(5)}
    (tmp_path / "floats").mkdir()
    other = Build(tmp_path / "floats", floats)
    other.root = tmp_path
    second = other.run()

    assert expected(floats, build) == build.content(first)
    assert [] == second.made
    assert [*first.packs.values()] == [*second.packs.values()]


@pytest.mark.usefixtures("small_blocks")
def test_an_output_that_only_another_job_reads_flows_too(tmp_path: Path) -> None:
    """It grows in a file of its own, and is there when the other job wants it."""
    build = Build(tmp_path, weights(5))
    scale = build.outputs.pop(6)
    (cast_scale,) = build.graph.add(
        Elementwise(), {"add": None, "dtype": "F32", "nonfinite": "refuse"}, scale.ref
    )
    build.outputs.append(OutputTensor("cast", cast_scale, scale.fact))
    packs = pack_layouts(build.outputs, 1 << 30, {})
    build.variants = cast(Sequence[VariantPlan], [SimpleNamespace(packs=tuple(packs))])
    first, second = build.jobs()
    content = build.content(build.run())

    assert (True, {0}) == (first.streams, second.needs)
    assert content["cast"] == expected(weights(5), Build(tmp_path, weights(5)))[scale.name]


def test_memory_does_not_grow_with_the_number_of_experts(tmp_path: Path) -> None:
    """What a job declares is the same for four experts and for sixty-four."""
    peaks = []
    for count in (4, 64):
        folder = tmp_path / str(count)
        folder.mkdir()
        (job,) = Build(folder, weights(count)).jobs()
        peaks.append(job.peak_bytes)

    assert peaks[0] == peaks[1]


def test_an_expert_larger_than_a_block_is_in_the_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job of experts that are blocks by themselves declares them and what they become."""
    (job,) = Build(tmp_path, weights(4)).jobs()
    before = job.peak_bytes
    monkeypatch.setattr(jobs_module, "BLOCK_BYTES", 1024)
    expert = 2 * 2 * ROWS * COLUMNS

    assert before + 2 * expert < job.peak_bytes < before + 4 * expert


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("name", ["3.gate", "4.up"])
@pytest.mark.parametrize("shared", [True, False])
def test_nan_in_an_expert_names_it(tmp_path: Path, name: str, shared: bool) -> None:
    """The expert's own tensor and the element in it, whether it is quantized or passed on."""
    tensors = weights(5)
    tensors[name][2, 7] = 0x7FC0
    build = Build(tmp_path, tensors, shared=shared)

    with pytest.raises(CheckpointError) as caught:
        build.run()
    assert (
        f"tensor {name!r} holds NaN or infinity at element {2 * COLUMNS + 7}" == caught.value.what
    )
    assert str(tmp_path / "experts.safetensors") == caught.value.where


@pytest.mark.usefixtures("small_blocks")
def test_a_sample_that_deceives_changes_nothing(tmp_path: Path) -> None:
    """Stacks that look like others by their samples, and are not, are made anew."""
    tensors = weights(400)
    before = Build(tmp_path, tensors)
    before.run()
    tensors["10.gate"][:] ^= 1
    folder = tmp_path / "changed"
    folder.mkdir()
    changed = Build(folder, tensors)
    changed.root = tmp_path
    outcome = changed.run()

    samples = [sample_digest(cast(SourceTensor, b.refs["gate"].origin)) for b in (before, changed)]
    assert samples[0] == samples[1]
    assert 2 == len(outcome.made)
    assert expected(tensors, changed) == changed.content(outcome)
