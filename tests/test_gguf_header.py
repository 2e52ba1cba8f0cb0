"""Headers of GGUF files: what `gguf` writes we read, what we write it reads, and lies are named."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from hypothesis import given
from hypothesis import strategies as st

from carnice_build.checkpoint.containers import read_entries
from carnice_build.checkpoint.gguf_header import Described, encode_gguf, read_gguf, stored_spec
from carnice_build.checkpoint.gguf_types import TYPES
from carnice_build.checkpoint.gguf_values import Value
from carnice_build.checkpoint.source import LocalFile
from carnice_build.errors import CheckpointError

METADATA = {
    "general.architecture": Value("str", "llama"),
    "llama.block_count": Value("u32", 3),
    "llama.rope.freq_base": Value("f32", 10000.0),
    "general.truth": Value("bool", True),
    "general.large": Value("u64", 2**63),
    "tokenizer.ggml.tokens": Value("[str]", ["a", "Ġé", "", "語"]),
    "tokenizer.ggml.token_type": Value("[i32]", [1, -3, 6, 1]),
    "llama.flags": Value("[bool]", [True, False]),
}

TENSORS = [
    Described("token_embd.weight", "BF16", (5, 256)),
    Described("output_norm.weight", "F32", (3,)),
    Described("blk.0.ffn_down.weight", "Q6_K", (3, 512)),
    Described("blk.0.ffn_up_exps.weight", "Q4_0", (2, 3, 64)),
]


def written(path: Path, metadata=METADATA, tensors=TENSORS) -> Path:
    encoded = encode_gguf(metadata, tensors)
    content = bytearray(encoded.size)
    content[: len(encoded.header)] = encoded.header
    path.write_bytes(content)
    return path


def test_the_library_reads_what_we_write(tmp_path: Path) -> None:
    reader = GGUFReader(written(tmp_path / "a.gguf"))
    for key, (_, value) in METADATA.items():
        assert reader.fields[key].contents() == value
    for ours, theirs in zip(TENSORS, reader.tensors, strict=True):
        assert theirs.name == ours.name
        assert theirs.tensor_type.name == ours.type
        assert tuple(reversed(theirs.shape.tolist())) == ours.shape
        assert theirs.n_bytes == stored_spec(ours.type, ours.shape).nbytes


def test_our_bytes_are_those_that_the_library_writes(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "theirs.gguf", "llama")
    writer.add_block_count(3)
    writer.add_rope_freq_base(10000.0)
    writer.add_bool("general.truth", True)
    writer.add_uint64("general.large", 2**63)
    writer.add_token_list(["a", "Ġé", "", "語"])
    writer.add_token_types([1, -3, 6, 1])
    writer.add_array("llama.flags", [True, False])
    for item in TENSORS:
        spec = stored_spec(item.type, item.shape)
        dtype = {"BF16": np.uint8, "F32": np.float32}.get(item.type, np.uint8)
        shape = spec.shape if item.type != "BF16" else (*spec.shape[:-1], 2 * spec.shape[-1])
        raw = None if item.type == "F32" else GGMLQuantizationType[item.type]
        writer.add_tensor(item.name, np.zeros(shape, dtype), raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert (tmp_path / "theirs.gguf").read_bytes() == written(tmp_path / "ours.gguf").read_bytes()


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    header = read_gguf(LocalFile(written(tmp_path / "a.gguf")))
    assert header.metadata == METADATA
    assert list(header.described) == TENSORS
    assert [entry.offset for entry in header.entries] == list(
        encode_gguf(METADATA, TENSORS).offsets
    )
    assert all(entry.offset % 32 == 0 for entry in header.entries)


def broken(tmp_path: Path, edit) -> str:
    path = written(tmp_path / "a.gguf")
    content = edit(bytearray(path.read_bytes()))
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read_gguf(LocalFile(path))
    return str(caught.value)


def put(offset: int, layout: str, *values: int):
    def edit(content: bytearray) -> bytearray:
        struct.pack_into(layout, content, offset, *values)
        return content

    return edit


def replaced(old: bytes, new: bytes):
    def edit(content: bytearray) -> bytearray:
        assert content.count(old) == 1
        return content.replace(old, new)

    return edit


def of(name: str, *rest: int) -> bytes:
    """The end of a tensor's description from its name on."""
    axes = rest[:-2]
    return name.encode() + struct.pack(f"<I{len(axes)}QIQ", len(axes), *axes, *rest[-2:])


DOWN = ("blk.0.ffn_down.weight", 512, 3, 14)
DOWN_AT = 5 * 256 * 2 + 32


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda content: content[:20], "no GGUF file"),
        (put(0, "<I", 7), "no GGUF file"),
        (put(4, "<I", 1), "version 1"),
        (put(4, ">I", 3), "version 50331648"),
        (put(8, "<Q", 2**40), "1099511627776 tensors, more than fit"),
        (put(16, "<Q", 2**63), "keys, more than fit"),
        (put(24, "<Q", 2**62), "bytes of text for 'a key'"),
        (lambda content: content[:-64], "its tensors end at"),
        (lambda content: content + bytes(64), "its tensors end at"),
        (lambda content: content[:200], "truncated within its header"),
        (replaced(b"general.truth", b"general.large"), "the key 'general.large' twice"),
        (replaced(struct.pack("<II", 9, 5), struct.pack("<II", 9, 9)), "lists in a list"),
        (replaced(struct.pack("<II", 9, 5), struct.pack("<II", 9, 77)), "unknown kind 77"),
        (replaced(struct.pack("<IIQ", 9, 5, 4), struct.pack("<IIQ", 9, 5, 2**61)), "more than fit"),
        (replaced("Ġé".encode(), b"\xff\xfe\xff\xff"), "no text"),
        (replaced(of(*DOWN, DOWN_AT), of(*DOWN, DOWN_AT + 8)), "begins at byte"),
        (replaced(of(*DOWN, DOWN_AT), of(*DOWN, 0)), "begins at byte"),
        (replaced(of(*DOWN, DOWN_AT), of(DOWN[0], 500, 3, 14, DOWN_AT)), "500 columns"),
        (replaced(of(*DOWN, DOWN_AT), of(DOWN[0], 512, 3, 99, DOWN_AT)), "unknown type 99"),
        (replaced(of(*DOWN, DOWN_AT), of(DOWN[0], 2**63, 2**63, 14, DOWN_AT)), "ffn_down"),
        (
            replaced(
                b"blk.0.ffn_down.weight" + struct.pack("<I", 2), DOWN[0].encode() + b"\5\0\0\0"
            ),
            "5 axes",
        ),
    ],
)
def test_lies_are_named(tmp_path: Path, edit, said: str) -> None:
    assert said in broken(tmp_path, edit)


COUNTS = {
    "tensors": (struct.pack("<QQ", 2**17, 0), "131072 tensors; expected 65536 at most"),
    "keys": (struct.pack("<QQ", 0, 2**17), "131072 keys; expected 65536 at most"),
    "items": (
        struct.pack("<QQQ1sIIQ", 0, 1, 1, b"a", 9, 7, 2**24),
        "16777216 items of 'a'; expected 8388608 at most",
    ),
}


@pytest.mark.parametrize("what", COUNTS)
def test_a_file_that_is_large_enough_has_no_more_than_anybody_has(
    tmp_path: Path, what: str
) -> None:
    """Memory would follow counts, and a file of zeros takes no disk."""
    start, said = COUNTS[what]
    path = tmp_path / "a.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<I", 3) + start)
    os.truncate(path, 2**28)
    with pytest.raises(CheckpointError, match=said):
        read_gguf(LocalFile(path))


def test_a_file_of_that_name_is_refused_as_none_of_its_kind(tmp_path: Path) -> None:
    """Whatever it holds instead."""
    for content in b"", b"{}", bytes(8) + b"{}":
        (tmp_path / "a.gguf").write_bytes(content)
        with pytest.raises(CheckpointError, match="is no GGUF file"):
            read_entries(LocalFile(tmp_path / "a.gguf"))


def test_alignment_is_a_power_of_two(tmp_path: Path) -> None:
    path = written(tmp_path / "a.gguf", {"general.alignment": Value("u32", 33)}, [])
    with pytest.raises(CheckpointError, match="aligned to 33"):
        read_gguf(LocalFile(path))


@given(st.binary(max_size=400))
def test_no_bytes_do_more_than_raise(tmp_path_factory, tail: bytes) -> None:
    path = tmp_path_factory.mktemp("noise") / "a.gguf"
    path.write_bytes(struct.pack("<4sIQQ", b"GGUF", 3, 1, 2) + tail)
    with pytest.raises(CheckpointError):
        read_gguf(LocalFile(path))


@given(st.sampled_from(sorted(TYPES)), st.integers(1, 4), st.integers(1, 3))
def test_sizes_are_those_of_the_library(name: str, rows: int, blocks: int) -> None:
    from gguf import quant_shape_to_byte_shape

    if name.startswith("I") and name[1:].isdigit():
        return
    columns = TYPES[name].elements * blocks
    theirs = quant_shape_to_byte_shape((rows, columns), GGMLQuantizationType[name])
    assert stored_spec(name, (rows, columns)).nbytes == np.prod(theirs)
