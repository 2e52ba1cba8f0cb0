"""The disk that a build needs for a while is counted before it begins."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from family_builds import options_of, write_texts
from zoo import Layout, write_zoo

from carnice_build.checkpoint.decoded import decoded_fp8
from carnice_build.checkpoint.source import LocalFile
from carnice_build.checkpoint.stack import stacked
from carnice_build.commands.build import build_variants
from carnice_build.commands.plan import plan_and_survey
from carnice_build.dtypes import TensorSpec
from carnice_build.errors import PlanError
from carnice_build.execute import session
from carnice_build.execute.jobs import Job
from carnice_build.execute.process_job import ProcessJob
from carnice_build.graph import ActionGraph, ProcessOp, TensorRef
from carnice_build.planning.scratch import scratch_bytes
from carnice_build.store.store import Store
from carnice_build.tensor_file import TensorFile
from carnice_build.tensors import SourceTensor, places

SIZE = 1000


class Pass(ProcessOp):
    """From hidden states to hidden states, which go, and a byte that stays."""

    name = "test.pass"
    version = 1
    transient = frozenset({0})

    def infer(
        self, params: Mapping[str, Any], inputs: Sequence[TensorSpec]
    ) -> tuple[TensorSpec, ...]:
        return TensorSpec("U8", (SIZE,)), TensorSpec("U8", (1,))

    def memory(self, params: Mapping[str, Any], inputs: Sequence[TensorSpec]) -> int:
        return 1

    def run(
        self,
        params: Mapping[str, Any],
        inputs: Sequence[TensorFile],
        outputs: Sequence[TensorFile],
        progress: Callable[[], None],
    ) -> None:
        raise NotImplementedError


class Alone(Pass):
    """An op in no chain."""

    name = "test.alone"
    transient = frozenset()


def fp8(folder: Path) -> SourceTensor:
    """A weight of 4 x 8 codes, which are 64 bytes when they are decoded."""
    path = folder / "weights"
    path.write_bytes(bytes(40))
    codes = SourceTensor("w", TensorSpec("F8_E4M3", (4, 8)), LocalFile(path), 0)
    scales = SourceTensor("s", TensorSpec("F32", (1, 1)), LocalFile(path), 32)
    return decoded_fp8("w", codes, scales, "BF16", (128, 128))


def ref(source: SourceTensor) -> TensorRef:
    return TensorRef(source.spec, source)


def chain(graph: ActionGraph, *weights: SourceTensor) -> None:
    """A pass through a layer for each of `weights`, one after another."""
    hidden: tuple[TensorRef, ...] = ()
    for number, weight in enumerate(weights):
        hidden = graph.add(Pass(), {"layer": number}, ref(weight), *hidden)[:1]


def test_what_lies_in_no_file_is_copied_for_a_process(tmp_path: Path) -> None:
    """Decoded weights, by themselves or as a stack; not what is one range of a file, or several."""
    decoded = fp8(tmp_path)
    path = tmp_path / "plain"
    path.write_bytes(bytes(64))
    plain = SourceTensor("p", TensorSpec("BF16", (4, 8)), LocalFile(path), 0)
    there = {
        "decoded": (decoded, 64),
        "a stack of decoded": (stacked("d*", [decoded, decoded]), 128),
        "plain": (plain, 0),
        "a stack of plain": (stacked("p*", [plain, plain]), 0),
    }

    for name, (weight, copied) in there.items():
        graph = ActionGraph()
        chain(graph, weight)
        assert SIZE + 1 + copied == scratch_bytes(graph, 1), name


def test_a_process_reads_experts_where_they_lie(tmp_path: Path) -> None:
    """All of them, one, some in any order, and what begins in one and ends in another."""
    sizes, stacks = (3, 2, 8), []
    for name in ("a", "b"):
        path = tmp_path / name
        path.write_bytes(bytes(random.Random(name).randbytes(200)))
        stacks += [
            SourceTensor(f"{name}{at}", TensorSpec("BF16", (2, 8)), LocalFile(path), at)
            for at in (16, 100, 132)
        ]
    stack = stacked("e*", [stacks[0], stacks[4], stacks[2]])
    found = places(stack)
    assert found is not None
    assert 3 == len(found)
    file = TensorFile(stack.spec, str(found[0][0]), found[0][1], "e*", tuple(found))
    flat = TensorFile(TensorSpec("BF16", (2, 24)), file.path, file.offset, "e*", file.ranges)
    assert stack.file is not None
    whole = bytearray(stack.spec.nbytes)
    stack.file.read_into(0, memoryview(whole))
    array = np.frombuffer(whole, np.uint16).reshape(sizes)

    assert np.array_equal(array, file.read())
    assert all(np.array_equal(array[index], file.read_row(index)) for index in range(3))
    assert np.array_equal(array[[2, 0, 2]], file.gather([2, 0, 2]))
    assert np.array_equal(array.reshape(2, 24)[1], flat.read_row(1))


def test_layers_of_a_chain_are_never_beside_each_other(tmp_path: Path) -> None:
    """However many processes may run: a layer waits for the one before it.

    But what it is given comes meanwhile, where one thread may fetch while another computes.
    """
    graph = ActionGraph()
    chain(graph, *[fp8(tmp_path)] * 3)

    assert 2 * SIZE + 1 + 64 == scratch_bytes(graph, 1)
    assert 2 * SIZE + 1 + 64 + 64 == scratch_bytes(graph, 2) == scratch_bytes(graph, 8)


def test_chains_beside_each_other_hold_what_they_read_and_make(tmp_path: Path) -> None:
    """As many as may be in a layer at once; the others wait with what they will read.

    What all of them are given in the next layer comes once.
    """
    graph = ActionGraph()
    weights = [fp8(tmp_path)] * 3
    for number in range(3):
        hidden = graph.add(Pass(), {"chain": number}, ref(weights[0]))[:1]
        for weight in weights:
            hidden = graph.add(Pass(), {}, ref(weight), *hidden)[:1]

    copied, ahead = 1 + 64, 64
    held = {width: 3 * SIZE + width * (SIZE + copied) + ahead for width in (2, 3)}
    held[1] = 3 * SIZE + SIZE + copied
    assert held == {width: scratch_bytes(graph, width) for width in held}
    assert held[3] == scratch_bytes(graph, 8)


def test_processes_beside_each_other_have_a_copy_each(tmp_path: Path) -> None:
    """As many as may run at once."""
    graph = ActionGraph()
    for number in range(5):
        graph.add(Alone(), {"number": number}, ref(fp8(tmp_path)))

    own = SIZE + 1 + 64
    assert [own, 3 * own, 5 * own] == [scratch_bytes(graph, width) for width in (1, 3, 8)]


def test_a_job_of_a_process_takes_what_decoding_does(tmp_path: Path) -> None:
    """Its sources are decoded before it begins."""
    weight = fp8(tmp_path)
    graph = ActionGraph()
    chain(graph, weight)
    (action,) = graph

    assert weight.held_bytes > 1
    assert weight.held_bytes == Job([], [action], {}, frozenset()).peak_bytes


@pytest.mark.parametrize(("family", "layout"), [("qwen3_moe", "hub"), ("deepseek_v3", "hub")])
def test_a_build_uses_no_more_than_planned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, layout: Layout
) -> None:
    """Experts one by one, and FP8; most of what is planned is used, so it is no mere guess.

    Samples are not counted, for the cache keeps them.
    """
    monkeypatch.chdir(tmp_path)
    source = write_zoo(tmp_path / "source", family, layout)
    write_texts(tmp_path / "rows.jsonl")
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "_profiles.yaml").write_text("demo: {}\n")
    steps = "steps: [{decode: {}}]\n" if family == "deepseek_v3" else ""
    (tmp_path / "recipes" / "v.yaml").write_text(
        f"variant: v\ndescription: A\nsources: {{body: {{model: a/b}}}}\n{steps}"
        "calibration: {dataset: rows.jsonl, samples: 2, length: 16, threads: 1}\n"
        "quantize: {format: nvfp4}\n"
    )
    options = options_of(tmp_path, source)
    planned = plan_and_survey(["v"], options)
    scratch = planned.status.scratch_bytes(planned.plan.graph, 1)
    used: list[int] = []
    take_over = ProcessJob._take_over

    def measured(self: ProcessJob, index: int, file: TensorFile) -> str:
        files = (path.stat() for path in self._bench.scratch.rglob("*") if path.is_file())
        used.append(sum({item.st_ino: item.st_size for item in files}.values()))
        return take_over(self, index, file)

    monkeypatch.setattr(ProcessJob, "_take_over", measured)
    build_variants(["v"], options)

    assert 0.8 * scratch < max(used) <= scratch + 2 * 16 * 4


def test_a_disk_without_room_for_copies_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before any pass runs."""
    monkeypatch.chdir(tmp_path)
    source = write_zoo(tmp_path / "source", "qwen3_moe", "hub")
    write_texts(tmp_path / "rows.jsonl")
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "_profiles.yaml").write_text("demo: {}\n")
    (tmp_path / "recipes" / "v.yaml").write_text(
        "variant: v\ndescription: A\nsources: {body: {model: a/b}}\n"
        "calibration: {dataset: rows.jsonl, samples: 2, length: 16, threads: 1}\n"
        "quantize: {format: nvfp4}\n"
    )
    options = options_of(tmp_path, source)
    planned = plan_and_survey(["v"], options)
    needed = planned.status.bytes_to_write + planned.status.scratch_bytes(planned.plan.graph, 1)
    monkeypatch.setattr(Store, "free_bytes", lambda self: needed - 1)
    monkeypatch.setattr(session, "plan_jobs", None)

    with pytest.raises(PlanError, match="more disk"):
        build_variants(["v"], options)
