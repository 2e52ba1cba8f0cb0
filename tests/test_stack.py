"""Tensors put together of others: experts as a stack, in whichever files they are."""

from __future__ import annotations

import pickle
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from tiny import Tensor, write_safetensors

from carnice_build.checkpoint import stack as stack_module
from carnice_build.checkpoint.header import read_header
from carnice_build.checkpoint.source import LocalFile
from carnice_build.checkpoint.stack import slab_rows, slab_stack, stacked
from carnice_build.checkpoint.turned import turned_stack
from carnice_build.dtypes import TensorSpec
from carnice_build.errors import CheckpointError
from carnice_build.tensors import SourceTensor, numbered, stacks

SHAPE = (3, 4)
RANDOM = np.random.default_rng(0)


class Opened(LocalFile):
    """A file that counts how often a range of it is opened."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.ranges: list[tuple[int, int]] = []

    def open_range(self, offset, count):  # type: ignore[no-untyped-def]
        """As any file."""
        self.ranges.append((offset, count))
        return super().open_range(offset, count)


def write(path: Path, *names: str, shape: tuple[int, ...] = SHAPE) -> dict[str, SourceTensor]:
    """Tensors of random bytes in one file, in this order."""
    size = 2 * int(np.prod(shape))
    write_safetensors(path, {name: Tensor("BF16", shape, RANDOM.bytes(size)) for name in names})
    file = Opened(path)
    return {
        entry.name: SourceTensor(entry.name, entry.spec, file, entry.offset)
        for entry in read_header(file).entries
    }


def content(tensor: SourceTensor) -> bytes:
    """All bytes of a tensor, read at once."""
    assert tensor.file is not None
    buffer = bytearray(tensor.spec.nbytes)
    tensor.file.read_into(tensor.offset, memoryview(buffer))
    return bytes(buffer)


def in_pieces(tensor: SourceTensor, offset: int, count: int, step: int) -> bytes:
    """Some of a tensor's bytes, read in order, `step` at a time."""
    assert tensor.file is not None
    buffer = bytearray(count)
    with tensor.file.open_range(tensor.offset + offset, count) as read:
        for start in range(0, count, step):
            read(memoryview(buffer)[start : start + step])
    return bytes(buffer)


@pytest.fixture
def experts(tmp_path: Path) -> list[SourceTensor]:
    """Four experts, the last in another file, the first two side by side."""
    first = write(tmp_path / "1.safetensors", "e0", "e1", "other", "e2")
    second = write(tmp_path / "2.safetensors", "e3")
    return [first["e0"], first["e1"], first["e2"], second["e3"]]


def test_a_stack_is_its_parts_end_to_end(experts: list[SourceTensor]) -> None:
    """However it is read, and of one more axis."""
    stack = stacked("e*", experts)
    whole = b"".join(map(content, experts))

    assert TensorSpec("BF16", (4, *SHAPE)) == stack.spec
    assert whole == content(stack)
    for offset, step in ((0, 1), (0, 5), (3, 7), (24, 24), (47, 100)):
        assert whole[offset:] == in_pieces(stack, offset, len(whole) - offset, step)


def test_neighbours_are_one_read(experts: list[SourceTensor]) -> None:
    """Parts that lie side by side in a file are opened together."""
    first, second = experts[0].file, experts[3].file
    assert isinstance(first, Opened)
    assert isinstance(second, Opened)
    in_pieces(stacked("e*", experts), 0, 96, 10)

    assert [48, 24] == [count for _, count in first.ranges]
    assert [24] == [count for _, count in second.ranges]


def test_an_element_of_a_stack_is_found_in_its_part(experts: list[SourceTensor]) -> None:
    """Also in a part of a stack, and in a stack of parts."""
    stack = stacked("e*", experts)

    assert (experts[0], 0) == stack.located(0)
    assert (experts[2], 11) == stack.located(35)
    assert (experts[3], 1) == slab_rows(stack, 3, 0, 3).located(1)
    assert (experts[1], 2) == stacked(
        "pair", [slab_rows(stack, 0, 0, 3), slab_rows(stack, 1, 0, 3)]
    ).located(14)
    assert (experts[1], 7) == experts[1].located(7)


def test_the_identity_of_a_stack_is_that_of_its_bytes(
    experts: list[SourceTensor], tmp_path: Path
) -> None:
    """It stays the same between runs, and changes with the order, the parts and their files."""
    stack = stacked("e*", experts)
    again = stacked("another name", pickle.loads(pickle.dumps(experts)))

    assert stack.identity == stacked("e*", experts).identity
    assert stack.identity == again.identity
    others = [stacked("e*", experts[::-1]), stacked("e*", experts[:3]), slab_rows(stack, 1, 0, 3)]
    write(tmp_path / "2.safetensors", "e3", "e4")
    experts[3] = SourceTensor("e3", experts[3].spec, LocalFile(tmp_path / "2.safetensors"), 0)
    others.append(stacked("e*", experts))
    assert 5 == len({stack.identity, *(other.identity for other in others)})


@pytest.mark.parametrize("odd", [0, 2])
def test_the_odd_one_is_named(tmp_path: Path, odd: int) -> None:
    """An expert of another shape is named with its file, the first one too."""
    parts = list(write(tmp_path / "1.safetensors", "e0", "e1", "e2", "e3").values())
    parts[odd] = write(tmp_path / "2.safetensors", "odd", shape=(4, 3))["odd"]

    with pytest.raises(CheckpointError) as caught:
        stacked("e*", parts)
    like = parts[1 if odd == 0 else 0].name
    assert "tensor 'odd' is BF16 [4, 3]" == caught.value.what
    assert str(tmp_path / "2.safetensors") == caught.value.where
    assert f"BF16 [3, 4], as {like!r} is" == caught.value.expected


def test_rows_of_a_fused_tensor_are_ranges_of_its_bytes(tmp_path: Path) -> None:
    """Rows of a slab, and those of every slab as a stack."""
    fused = write(tmp_path / "1.safetensors", "pad", "gate_up", shape=(3, 6, 4))["gate_up"]
    array = np.frombuffer(content(fused), np.uint16).reshape(3, 6, 4)
    gates = slab_stack("gate", fused, 0, 4)

    assert (4, 4) == slab_rows(fused, 2, 2, 6).spec.shape
    assert array[2, 2:6].tobytes() == content(slab_rows(fused, 2, 2, 6))
    assert (3, 4, 4) == gates.spec.shape
    assert array[:, :4].tobytes() == content(gates)
    assert "gate_up[1, 0:4]" == gates.located(4 * 4)[0].name


@pytest.mark.parametrize("block", [1, 40, 1 << 20])
def test_rows_may_lie_between_others(
    tmp_path: Path, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gates and ups that take turns in a fused tensor are two stacks, however they are read."""
    monkeypatch.setattr(stack_module, "BLOCK_BYTES", block)
    fused = write(tmp_path / "1.safetensors", "pad", "gate_up", shape=(3, 6, 4))["gate_up"]
    array = np.frombuffer(content(fused), np.uint16).reshape(3, 6, 4)
    gates, ups = slab_stack("gate", fused, 0, 6, 2), slab_stack("up", fused, 1, 6, 2)

    assert (3, 3, 4) == gates.spec.shape == ups.spec.shape
    assert array[:, ::2].tobytes() == content(gates)
    whole = array[:, 1::2].tobytes()
    for offset, step in ((0, 1), (5, 3), (8, 16), (0, 1000)):
        assert whole[offset:] == in_pieces(ups, offset, len(whole) - offset, step)
    part, index = ups.located(3 * 4 + 2 * 4 + 1)
    assert ("gate_up", (6 + 1 + 2 * 2) * 4 + 1) == (part.name, index)
    assert gates.identity != ups.identity


@pytest.mark.parametrize("columns", [range(5), range(1, 4), range(0, 5, 2), range(1, 5, 2)])
def test_columns_may_be_read_as_rows(tmp_path: Path, columns: range) -> None:
    """All of a matrix, some of them or every other, however they are read; each is told by name."""
    tensor = write(tmp_path / "1.safetensors", "fused", shape=(3, 4, 5))["fused"]
    matrices = np.frombuffer(content(tensor), "u2").reshape(3, 4, 5)
    turned = turned_stack("e*", tensor, columns.start, columns.stop, columns.step)
    whole = np.ascontiguousarray(matrices[:, :, list(columns)].transpose(0, 2, 1)).tobytes()

    assert TensorSpec("BF16", (3, len(columns), 4)) == turned.spec
    assert whole == content(turned)
    for offset, step in ((0, 1), (3, 7), (8, 8), (len(whole) // 3, 100), (len(whole), 1)):
        assert whole[offset:] == in_pieces(turned, offset, len(whole) - offset, step)
    assert (tensor, 20 + 2 * 5 + columns[1]) == turned.located(4 * len(columns) + 4 + 2)
    assert turned.identity != turned_stack("e*", tensor, 0, 2).identity


def test_a_shape_file_has_stacks_without_bytes() -> None:
    """Specs are all there is; two parts of one tensor are still two tensors."""
    parts = [SourceTensor(f"e{index}", TensorSpec("BF16", SHAPE), None, 0) for index in range(3)]
    stack = stacked("e*", parts)
    fused = SourceTensor("fused", TensorSpec("BF16", (3, 6, 4)), None, 0)

    assert (None, (3, *SHAPE)) == (stack.file, stack.spec.shape)
    halves = slab_stack("gate", fused, 0, 3), slab_stack("up", fused, 3, 6)
    assert 4 == len({stack.identity, fused.identity, *(half.identity for half in halves)})


def test_no_more_is_held_while_columns_are_read_than_declared(tmp_path: Path) -> None:
    """From the second matrix on, too, when the first was there already."""
    path = tmp_path / "file"
    path.write_bytes(bytes(2 * 3 * 512 * 1024))
    turned = turned_stack(
        "t", SourceTensor("e", TensorSpec("BF16", (3, 512, 1024)), LocalFile(path), 0), 0, 1024
    )
    assert turned.file is not None
    buffer = memoryview(bytearray(turned.spec.nbytes // 24))
    tracemalloc.start()
    with turned.file.open_range(0, turned.spec.nbytes) as read:
        for _ in range(24):
            read(buffer)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert 0.9 * turned.held_bytes < peak < 1.05 * turned.held_bytes


def test_what_is_held_while_columns_are_read_is_declared(tmp_path: Path) -> None:
    """A matrix and its columns, however many matrices there are, also behind other parts."""
    path = tmp_path / "file"
    path.write_bytes(bytes(2 * 5 * 4 * 6))
    tensor = SourceTensor("e", TensorSpec("BF16", (5, 4, 6)), LocalFile(path), 0)
    turned = turned_stack("t", tensor, 0, 6)

    assert 0 == tensor.held_bytes == stacked("s", [tensor, tensor]).held_bytes
    assert 2 * 2 * 4 * 6 == turned.held_bytes == stacked("s", [turned, turned]).held_bytes


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        (
            "layers.3.experts.12.up.weight",
            {"layers.*.experts.12.up.weight": 3, "layers.3.experts.*.up.weight": 12},
        ),
        ("layers.norm.weight", {}),
    ],
)
def test_a_tensor_is_in_the_stacks_that_its_numbers_allow(
    name: str, wanted: dict[str, int]
) -> None:
    """Which of them it is, only a table says."""
    found = stacks(name)

    assert wanted == found
    assert all(name in numbered(stack, 13) for stack in found)
