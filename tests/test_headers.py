"""safetensors headers: what is read back, and every way in which one can lie."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from tiny import Tensor, read_safetensors, write_raw, write_safetensors

from carnice_build.checkpoint.header import (
    MAX_HEADER_BYTES,
    Header,
    encode_header,
    read_header,
)
from carnice_build.checkpoint.source import LocalFile
from carnice_build.dtypes import ITEM_SIZE, TensorSpec
from carnice_build.errors import CheckpointError

TWO = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def changed(**changes: Any) -> dict[str, Any]:
    """A header whose only tensor, `a`, has these fields changed."""
    return {"a": TWO | changes}


def header_of(path: Path) -> Header:
    return read_header(LocalFile(path))


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    """Names, types, shapes, places and metadata survive a round trip."""
    tensors = {
        "first": Tensor("BF16", (2, 3), bytes(12)),
        "empty": Tensor("F32", (0, 7), b""),
        "scalar": Tensor("U8", (), b"\x05"),
    }
    path = tmp_path / "a.safetensors"
    write_safetensors(path, tensors)
    header = header_of(path)

    assert header.metadata == {"format": "pt"}
    assert [(entry.name, entry.spec.dtype, entry.spec.shape) for entry in header.entries] == [
        ("first", "BF16", (2, 3)),
        ("empty", "F32", (0, 7)),
        ("scalar", "U8", ()),
    ]
    assert path.read_bytes()[header.entries[2].offset :] == b"\x05"


def test_the_library_reads_our_files(tmp_path: Path) -> None:
    """The safetensors library loads what we write."""
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    write_safetensors(tmp_path / "a.safetensors", {"a": Tensor("F32", (2, 3), values.tobytes())})

    np.testing.assert_array_equal(values, load_file(tmp_path / "a.safetensors")["a"])


def test_we_read_the_librarys_files(tmp_path: Path) -> None:
    """What the safetensors library writes has the same tensors for us."""
    path = tmp_path / "a.safetensors"
    save_file({"b": np.ones((3, 1), np.float16), "a": np.zeros(4, np.int64)}, path)
    found = {entry.name: entry for entry in header_of(path).entries}

    assert TensorSpec("F16", (3, 1)) == found["b"].spec
    assert TensorSpec("I64", (4,)) == found["a"].spec


def test_data_begins_at_a_multiple_of_eight() -> None:
    """Headers are padded, so that tensors can be mapped in place."""
    for size in range(1, 20):
        header = encode_header([("x" * size, TensorSpec("U8", (1,)))], {})

        assert 0 == len(header) % 8


NAMES = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=30)
SPECS = st.builds(
    TensorSpec,
    st.sampled_from(sorted(ITEM_SIZE)),
    st.lists(st.integers(0, 5), max_size=4).map(tuple),
)


@given(
    tensors=st.dictionaries(
        NAMES.filter(lambda name: name != "__metadata__" and "*" not in name), SPECS, max_size=8
    )
)
def test_any_layout_survives(tmp_path_factory: pytest.TempPathFactory, tensors: Any) -> None:
    """Any names, types and shapes are read back as they were written."""
    path = tmp_path_factory.getbasetemp() / "layout.safetensors"
    write_safetensors(
        path,
        {
            name: Tensor(spec.dtype, spec.shape, bytes(spec.nbytes))
            for name, spec in tensors.items()
        },
    )

    assert tensors == {entry.name: entry.spec for entry in header_of(path).entries}
    assert set(tensors) == set(read_safetensors(path))


LIES: dict[str, tuple[object, bytes, str]] = {
    "not JSON": (b"{'a': 1}", b"", "not valid JSON"),
    "not UTF-8": (b'{"\xff": {}}', b"", "not valid JSON"),
    "UTF-16": ('{"a":1}'.encode("utf-16"), b"", "not valid JSON"),
    "half a surrogate pair": (b'{"\\ud800": {}}', b"", "not valid JSON"),
    "nested 100,000 deep": (b'{"a":' + b"[" * 100_000, b"", "not valid JSON"),
    "an integer of 5,000 digits": (b'{"a":' + b"9" * 5000 + b"}", b"", "not valid JSON"),
    "NaN": (b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}', b"", "not valid JSON"),
    "infinity": (b'{"a":{"dtype":"F32","shape":[1e999],"data_offsets":[0,8]}}', b"", "not valid"),
    "a list": ([], b"", "not a JSON object"),
    "null": (None, b"", "not a JSON object"),
    "a tensor twice": (b'{"a":{},"a":{}}', b"", "names 'a' twice"),
    "a field twice": (b'{"a":{"dtype":"F32","dtype":"F64"}}', b"", "names 'dtype' twice"),
    "metadata that is a list": ({"__metadata__": []}, b"", "__metadata__ is not a map"),
    "metadata of numbers": ({"__metadata__": {"a": 1}}, b"", "__metadata__ is not a map"),
    "an entry that is a number": ({"a": 7}, b"", "'a' is malformed"),
    "an entry without shape": ({"a": {"dtype": "F32"}}, b"", "'a' is malformed"),
    "an entry with more": (changed(more=1), bytes(8), "'a' is malformed"),
    "an unknown dtype": (changed(dtype="F33"), bytes(8), "'F33'; did you mean 'F32'?"),
    "a dtype in lower case": (changed(dtype="bf16"), bytes(8), "unknown dtype 'bf16'"),
    "a dtype that is a list": (changed(dtype=["F32"]), bytes(8), "unknown dtype"),
    "a dtype that is null": (changed(dtype=None), bytes(8), "unknown dtype None"),
    "a negative size": (changed(shape=[-2]), bytes(8), "no valid shape"),
    "two negative sizes": (changed(shape=[-1, -2]), bytes(8), "no valid shape"),
    "a size that is true": (changed(shape=[True, 2]), bytes(8), "no valid shape"),
    "a size that is a float": (changed(shape=[2.0]), bytes(8), "no valid shape"),
    "a size that is text": (changed(shape=["2"]), bytes(8), "no valid shape"),
    "a shape that is a number": (changed(shape=2), bytes(8), "no valid shape"),
    "a shape of 17 axes": (changed(shape=[1] * 16 + [2]), bytes(8), "no valid shape"),
    "a size past 2**62": (changed(shape=[2**62]), bytes(8), "no valid shape"),
    "sizes whose product wraps to 0": (changed(shape=[2**32, 2**32]), bytes(8), "takes 8 bytes"),
    "sizes whose product wraps to 2": (changed(shape=[2**61 + 1, 2]), bytes(8), "takes 8 bytes"),
    "a shape too large for its bytes": (changed(shape=[3]), bytes(8), "needs 12"),
    "a negative offset": (changed(data_offsets=[-8, 0]), bytes(8), "no valid data_offsets"),
    "offsets that run backwards": (changed(data_offsets=[8, 0]), bytes(8), "ends before it begins"),
    "one offset": (changed(data_offsets=[0]), bytes(8), "no valid data_offsets"),
    "an offset that is a float": (changed(data_offsets=[0, 8.0]), bytes(8), "no valid data_offs"),
    "an offset that is false": (changed(data_offsets=[False, 8]), bytes(8), "no valid data_offs"),
    "offsets that overlap": ({"a": TWO, "b": TWO}, bytes(8), "'b' overlaps the one before it"),
    "offsets that overlap by one byte": (
        {"a": TWO, "b": {"dtype": "U8", "shape": [2], "data_offsets": [7, 9]}},
        bytes(9),
        "'b' overlaps the one before it",
    ),
    "a gap before the first tensor": (
        changed(data_offsets=[8, 16]),
        bytes(16),
        "8 bytes before tensor 'a' belong to no tensor",
    ),
    "a gap between": (
        {"a": TWO, "b": {"dtype": "U8", "shape": [1], "data_offsets": [9, 10]}},
        bytes(10),
        "1 bytes before tensor 'b' belong to no tensor",
    ),
    "bytes after the last": (changed(), bytes(11), "3 bytes after its last tensor"),
    "bytes but no tensor": ({}, bytes(11), "11 bytes after its last tensor"),
    "data cut short": (changed(), bytes(7), "is truncated"),
    "offsets far past the end": (
        changed(shape=[2**60], data_offsets=[0, 2**62 - 1]),
        bytes(8),
        "takes 4611686018427387903 bytes",
    ),
    "a name without characters": ({"": TWO}, bytes(8), "a name of 0 characters"),
    "a name of 257 characters": ({"x" * 257: TWO}, bytes(8), "a name of 257 characters"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lying_header_is_named(tmp_path: Path, lie: str) -> None:
    """The error names the file and what is wrong with it."""
    header, data, message = LIES[lie]
    path = tmp_path / "a.safetensors"
    write_raw(path, header, data)
    with pytest.raises(CheckpointError) as caught:
        header_of(path)

    assert str(path) == caught.value.where
    assert message in str(caught.value)


@pytest.mark.parametrize("size", [0, 1, 7])
def test_a_file_without_a_length_is_refused(tmp_path: Path, size: int) -> None:
    """Fewer than eight bytes are no safetensors file."""
    path = tmp_path / "a.safetensors"
    path.write_bytes(bytes(size))

    with pytest.raises(CheckpointError, match="too few for a safetensors file"):
        header_of(path)


@pytest.mark.parametrize("length", [3, 2**31, 2**63, 2**64 - 1])
def test_a_header_longer_than_the_file_is_refused(tmp_path: Path, length: int) -> None:
    """The length is compared with the file before anything is read or allocated."""
    path = tmp_path / "a.safetensors"
    write_raw(path, b"{}", length=length)

    with pytest.raises(CheckpointError, match=f"header has {length} bytes, but the file has 10"):
        header_of(path)


def test_a_header_over_100_mb_is_refused(tmp_path: Path) -> None:
    """A length within the file, but over the safetensors library's own limit, is not read."""
    path = tmp_path / "a.safetensors"
    write_raw(path, b"{}", length=MAX_HEADER_BYTES + 1)
    with path.open("r+b") as file:
        file.truncate(MAX_HEADER_BYTES + 100)

    with pytest.raises(CheckpointError, match="expected at most 100 MB"):
        header_of(path)
