"""A decoded tensor is read as any other: by range, in pieces, in stacks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import Tensor, write_safetensors

from carnice_build.checkpoint import decodings
from carnice_build.checkpoint.decoded import (
    decoded_fp8,
    decoded_gptq,
    decoded_mxfp4,
    decoded_packed,
)
from carnice_build.checkpoint.header import read_header
from carnice_build.checkpoint.source import LocalFile
from carnice_build.checkpoint.stack import slab_rows, slab_stack, stacked
from carnice_build.dtypes import NUMPY_NAME, TensorSpec
from carnice_build.tensors import SourceTensor

Parts = Mapping[str, SourceTensor]
Opener = Callable[[Path], LocalFile]
RANDOM = np.random.default_rng(0)


class Streamed(LocalFile):
    """A file as if it were on the hub: every read is a request, and `requests` counts them."""

    local = False
    random_access = False
    requests = 0

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """See `Readable.read_into`."""
        self.requests += 1
        super().read_into(offset, buffer)


def write(path: Path, kind: Opener = LocalFile, **tensors: tuple[str, Any]) -> Parts:
    """A file of these arrays, each with its type."""
    write_safetensors(
        path,
        {
            name: Tensor(dtype, array.shape, array.tobytes())
            for name, (dtype, array) in tensors.items()
        },
    )
    file = kind(path)
    return {
        entry.name: SourceTensor(entry.name, entry.spec, file, entry.offset)
        for entry in read_header(file).entries
    }


def finite(*shape: int) -> tuple[str, Any]:
    """Codes of E4M3 that are numbers."""
    found = RANDOM.integers(0, 256, shape, np.uint8)
    found[(found & 0x7F) == 0x7F] = 0
    return "F8_E4M3", found


def scale(*shape: int) -> tuple[str, Any]:
    return "F32", RANDOM.random(shape, dtype=np.float32)


def words(*shape: int) -> tuple[str, Any]:
    return "I32", RANDOM.integers(-(2**31), 2**31, shape, np.int32)


def fp8(path: Path, kind: Opener = LocalFile) -> SourceTensor:
    parts = write(path, kind, w=finite(300, 200), s=scale(3, 2))
    return decoded_fp8("w", parts["w"], parts["s"], "BF16", (128, 128))


def fused(path: Path, kind: Opener = LocalFile) -> SourceTensor:
    parts = write(path, kind, w=finite(3, 70, 40), s=scale(3, 3, 2))
    return decoded_fp8("w", parts["w"], parts["s"], "F32", (32, 32))


def channel(path: Path, kind: Opener = LocalFile) -> SourceTensor:
    parts = write(path, kind, w=finite(50, 33), s=("BF16", np.full((50, 1), 0x3F80, np.uint16)))
    return decoded_fp8("w", parts["w"], parts["s"], "F16")


def mxfp4(path: Path, kind: Opener = LocalFile) -> SourceTensor:
    blocks = "U8", RANDOM.integers(0, 256, (3, 20, 2, 16), np.uint8)
    parts = write(path, kind, w=blocks, s=("U8", RANDOM.integers(100, 140, (3, 20, 2), np.uint8)))
    return decoded_mxfp4("w", parts["w"], parts["s"], "BF16")


def packed(path: Path, kind: Opener = LocalFile) -> SourceTensor:
    shape = "I64", np.array([45, 64])
    parts = write(path, kind, w=words(45, 8), s=scale(45, 2), n=shape, z=words(6, 2))
    args = parts["w"], parts["s"], parts["n"], parts["z"], None
    return decoded_packed("w", *args, "BF16", 4, 64)


def gptq(path: Path, kind: Opener = LocalFile) -> SourceTensor:
    parts = write(path, kind, w=words(8, 72), s=scale(2, 72), z=words(2, 9))
    return decoded_gptq("w", parts["w"], parts["z"], parts["s"], None, "BF16", 4, 1)


KINDS = {made.__name__: made for made in (fp8, fused, channel, mxfp4, packed, gptq)}
every_kind = pytest.mark.parametrize("kind", KINDS)


def content(tensor: SourceTensor, step: int | None = None) -> bytes:
    """All bytes, in pieces of a size or at once."""
    assert tensor.file is not None
    count = tensor.spec.nbytes
    buffer = bytearray(count)
    with tensor.file.open_range(tensor.offset, count) as read:
        for start in range(0, count, step or count):
            read(memoryview(buffer)[start : start + (step or count)])
    return bytes(buffer)


def test_what_gptq_holds_is_declared(tmp_path: Path) -> None:
    """Scales and zero points as four bytes each; the codes too, where reads are requests."""

    class Requested(LocalFile):
        random_access = False

    local, requested = gptq(tmp_path / "1"), gptq(tmp_path / "2", Requested)

    assert local.held_bytes >= 2 * 4 * 2 * 72
    assert requested.held_bytes == local.held_bytes + 4 * 8 * 72


@every_kind
def test_any_range_in_any_pieces_is_the_same_bytes(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows, parts of rows and single bytes, from any place on."""
    tensor = KINDS[kind](tmp_path / "1.safetensors")
    whole = content(tensor)
    monkeypatch.setattr(decodings, "BLOCK_BYTES", 256)

    for step in (1, 7, 2 * tensor.spec.shape[-1], 1000):
        assert whole == content(tensor, step)
    assert tensor.file is not None
    for start, count in ((0, 0), (0, 1), (3, 5), (501, 800), (len(whole) - 9, 9)):
        buffer = bytearray(count)
        tensor.file.read_into(tensor.offset + start, memoryview(buffer))
        assert whole[start : start + count] == bytes(buffer)


@every_kind
def test_floats_are_numbers_of_every_size(kind: str, tmp_path: Path) -> None:
    """What is compared above is no tensor of zeros."""
    tensor = KINDS[kind](tmp_path / "1.safetensors")
    array = np.frombuffer(content(tensor), NUMPY_NAME[tensor.spec.dtype])

    assert len(np.unique(array)) > 30


@every_kind
def test_a_streamed_file_gives_the_same_in_few_requests(kind: str, tmp_path: Path) -> None:
    """Where every read is a request, none is made for each row."""
    local = KINDS[kind](tmp_path / "1.safetensors")
    opened: list[Streamed] = []

    def open_streamed(path: Path) -> Streamed:
        path.write_bytes((tmp_path / "1.safetensors").read_bytes())
        opened.append(Streamed(path))
        return opened[0]

    streamed = KINDS[kind](tmp_path / "2.safetensors", open_streamed)
    opened[0].requests = 0
    assert streamed.file is not None
    assert local.file is not None

    assert content(local) == content(streamed)
    assert opened[0].requests <= 4
    assert (True, False) == (local.file.random_access, streamed.file.random_access)


@every_kind
def test_stacks_are_made_of_decoded_tensors(kind: str, tmp_path: Path) -> None:
    """Also of rows of them; an element is found in the tensor of its expert."""
    parts = [KINDS[kind](tmp_path / f"{index}.safetensors") for index in range(3)]
    stack = stacked("w.*", parts)

    assert b"".join(map(content, parts)) == content(stack)
    assert b"".join(map(content, parts)) == content(stack, 1000)
    assert (parts[2], 5) == stack.located(2 * parts[0].spec.size + 5)
    rows = slab_rows(stack, 1, 1, 3)
    row = parts[1].spec.row_bytes
    assert content(parts[1])[row : 3 * row] == content(rows)


def test_rows_of_a_fused_tensor_are_decoded_alone(tmp_path: Path) -> None:
    """The gates of all experts of a fused tensor, whose blocks do not end where a slab does."""
    tensor = fused(tmp_path / "1.safetensors")
    array = np.frombuffer(content(tensor), np.float32).reshape(3, 70, 40)

    assert array[:, 10:50].tobytes() == content(slab_stack("gate", tensor, 10, 50))


def test_an_identity_covers_all_that_decides_the_floats(tmp_path: Path) -> None:
    """Codes, scales, block, type and how it is decoded; it stays while these do."""
    parts = write(tmp_path / "1.safetensors", w=finite(8, 8), s=scale(1, 1), t=scale(1, 1))
    others = write(tmp_path / "2.safetensors", w=finite(8, 8))
    made = [
        decoded_fp8("w", parts["w"], parts["s"], "BF16", (128, 128)),
        decoded_fp8("w", parts["w"], parts["t"], "BF16", (128, 128)),
        decoded_fp8("w", others["w"], parts["s"], "BF16", (128, 128)),
        decoded_fp8("w", parts["w"], parts["s"], "F16", (128, 128)),
        decoded_fp8("w", parts["w"], parts["s"], "BF16", (64, 128)),
    ]
    again = decoded_fp8("another", parts["w"], parts["s"], "BF16", (128, 128))

    assert len(made) == len({tensor.identity for tensor in made})
    assert made[0].identity == again.identity


def test_a_decoder_that_changes_changes_identities(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was remembered of what an older version gave is not believed."""
    tensor = fp8(tmp_path / "1.safetensors")
    before = SourceTensor("w", tensor.spec, tensor.file, 0).identity
    monkeypatch.setattr(decodings.Fp8, "version", decodings.Fp8.version + 1)

    assert before != SourceTensor("w", tensor.spec, tensor.file, 0).identity


def test_a_shape_file_decodes_to_shapes() -> None:
    """Codes without bytes are floats without bytes."""
    codes = SourceTensor("w", TensorSpec("F8_E4M3", (4, 200, 100)), None, 0)
    scales = SourceTensor("s", TensorSpec("F32", (4, 2, 1)), None, 0)
    made = decoded_fp8("w", codes, scales, "BF16", (128, 128))

    assert (None, TensorSpec("BF16", (4, 200, 100))) == (made.file, made.spec)


def test_what_is_read_is_counted_as_it_is_stored() -> None:
    """Codes and scales, also of stacks and of parts of them, and where there are no bytes."""
    shape = (256, 128)
    codes = SourceTensor("w", TensorSpec("F8_E4M3", shape), None, 0)
    scales = SourceTensor("w_scale_inv", TensorSpec("F32", (2, 1)), None, 0)
    tensor = decoded_fp8("w", codes, scales, "BF16", (128, 128))
    stack = stacked("*", [tensor, tensor])
    stored = 256 * 128 + 2 * 4

    assert 2 * 256 * 128 == tensor.spec.nbytes
    assert [stored, 2 * stored] == [item.stored_bytes for item in (tensor, stack)]
    assert stored == slab_rows(stack, 1, 0, 256).stored_bytes
    assert stored == slab_stack("gate", stack, 0, 128).stored_bytes
    assert stored == slab_stack("up", stack, 1, 256, 2).stored_bytes
    assert 256 * 128 == codes.stored_bytes
