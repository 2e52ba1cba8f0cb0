"""The samples of a calibration: their tokens, and rows of tables for these."""

from __future__ import annotations

from typing import Any

from carnice_build.errors import CheckpointError
from carnice_build.tensor_file import TensorFile

PADDING = -1
"""Behind the tokens of a sample that is shorter than the longest it may be."""


def too_few(there: int, wanted: int, where: str) -> CheckpointError:
    """The error for a text that gives fewer samples than are wanted."""
    return CheckpointError(
        f"gives {there} samples", where=where, expected=f"{wanted}, or fewer `samples`"
    )


def samples(tokens: TensorFile) -> list[Any]:
    """The rows of a tensor of tokens, each without its padding."""
    return [row[row != PADDING] for row in tokens.read()]


def table_rows(table: TensorFile, tokens: Any) -> Any:
    """The row of `table` for each of `tokens`; CheckpointError for one that has none."""
    if tokens.max() >= table.spec.shape[0]:
        raise CheckpointError(
            f"token {tokens.max()} has no row in {table.name or 'the embedding'}",
            where="tokenizer.json",
            expected=f"at most {table.spec.shape[0] - 1}",
        )
    return table.gather(tokens)
