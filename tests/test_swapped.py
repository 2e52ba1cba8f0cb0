"""Rows and columns of heads that change places while they are read."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import Tensor, write_safetensors

from carnice_build.checkpoint.checkpoint import open_checkpoint
from carnice_build.checkpoint.swapped import swapped_columns, swapped_rows
from carnice_build.dtypes import TensorSpec
from carnice_build.errors import CheckpointError
from carnice_build.tensors import SourceTensor

ROWS, COLUMNS = 24, 12


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> SourceTensor:
    """A matrix [24, 12] of U16 with another number in each place."""
    folder = tmp_path_factory.mktemp("matrix")
    (folder / "config.json").write_text("{}")
    content = np.arange(ROWS * COLUMNS, dtype=np.uint16).tobytes()
    tensors = {"other": Tensor("U16", (4,), bytes(8)), "w": Tensor("U16", (ROWS, COLUMNS), content)}
    write_safetensors(folder / "model.safetensors", tensors)
    return open_checkpoint(folder).tensors["w"]


def numbers(tensor: SourceTensor) -> Any:
    """What the tensor holds, row by row."""
    assert tensor.file is not None
    content = bytearray(tensor.spec.nbytes)
    tensor.file.read_into(tensor.offset, memoryview(content))
    return np.frombuffer(content, np.uint16).reshape(tensor.spec.shape)


VALUES = np.arange(ROWS * COLUMNS, dtype=np.uint16).reshape(ROWS, COLUMNS)


@pytest.mark.parametrize(
    ("first", "second", "rows", "skip"), [(2, 3, 4, 0), (3, 2, 2, 12), (2, 2, 3, 12), (4, 6, 1, 0)]
)
def test_rows_of_one_block_change_places_behind_those_that_stay(
    matrix: SourceTensor, first: int, second: int, rows: int, skip: int
) -> None:
    """Blocks [first, second] become [second, first], as numpy's transposition makes them."""
    moved = VALUES[skip:].reshape(first, second, rows, COLUMNS).swapaxes(0, 1)
    expected = np.concatenate([VALUES[:skip], moved.reshape(-1, COLUMNS)])
    actual = swapped_rows(matrix, first, second, rows, skip)
    assert expected.tolist() == numbers(actual).tolist()


def test_rows_change_places_within_each_of_several_blocks(matrix: SourceTensor) -> None:
    """So the two halves of each head become pairs."""
    expected = VALUES.reshape(4, 2, 3, COLUMNS).swapaxes(1, 2).reshape(ROWS, COLUMNS)
    assert expected.tolist() == numbers(swapped_rows(matrix, 2, 3, 1)).tolist()


def test_columns_change_places_in_every_row(matrix: SourceTensor) -> None:
    """Blocks [2, 3] of two columns become [3, 2]."""
    expected = VALUES.reshape(ROWS, 2, 3, 2).swapaxes(1, 2).reshape(ROWS, COLUMNS)
    assert expected.tolist() == numbers(swapped_columns(matrix, 2, 3, 2)).tolist()


@given(st.data())
def test_any_range_of_bytes_is_that_of_the_whole(matrix: SourceTensor, data: st.DataObject) -> None:
    """Reading may begin and end within a number, wherever it comes from."""
    tensor = data.draw(
        st.sampled_from(
            [
                swapped_columns(matrix, 3, 2, 2),
                swapped_rows(matrix, 2, 3, 2),
                swapped_rows(matrix, 2, 12, 1),
            ]
        )
    )
    assert tensor.file is not None
    start = data.draw(st.integers(0, tensor.spec.nbytes))
    stop = data.draw(st.integers(start, tensor.spec.nbytes))
    content = bytearray(stop - start)
    tensor.file.read_into(tensor.offset + start, memoryview(content))
    assert numbers(tensor).tobytes()[start:stop] == bytes(content)


@pytest.mark.parametrize("index", [0, 1, 29, ROWS * COLUMNS - 1])
def test_an_element_is_found_where_it_is_in_the_checkpoint(
    matrix: SourceTensor, index: int
) -> None:
    """An error about a number names its place in the file."""
    for tensor in (swapped_columns(matrix, 3, 2, 2), swapped_rows(matrix, 2, 3, 2)):
        found, place = tensor.located(index)
        row = found.offset - matrix.offset
        assert numbers(tensor).reshape(-1)[index] == row // 2 + place


def test_nothing_moves_where_there_is_one_of_a_kind(matrix: SourceTensor) -> None:
    """As many value heads as key heads lie in one order."""
    assert matrix is swapped_rows(matrix, 1, 6, 4)
    assert matrix is swapped_columns(matrix, 6, 1, 2)


def test_tensors_without_bytes_differ_from_what_they_are_made_of() -> None:
    """In a plan from shapes alone, the two are no one tensor."""
    shape = SourceTensor("w", TensorSpec("BF16", (ROWS, COLUMNS)), None, 0)
    made = [swapped_rows(shape, 2, 3, 4), swapped_columns(shape, 2, 3, 2), shape]
    assert 3 == len({tensor.identity for tensor in made})


def test_what_is_no_blocks_is_refused(matrix: SourceTensor) -> None:
    """24 rows do not hold blocks of 10, nor 12 columns any of 5 or of none."""
    with pytest.raises(CheckpointError, match="24 rows are not 0 and blocks of 10"):
        swapped_rows(matrix, 2, 5, 1)
    for first, size in (5, 1), (0, 2):
        with pytest.raises(CheckpointError, match=f"12 columns are not blocks of {first * size}"):
            swapped_columns(matrix, 1, first, size)
    with pytest.raises(CheckpointError, match="24 rows are not 0 and blocks of 0"):
        swapped_rows(matrix, 4, 0, 1)
