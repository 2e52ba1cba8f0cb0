"""Standard streams that take whatever is printed, and whose errors say which they are."""

from __future__ import annotations

import io
import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

_NAMES = {1: ("stdout", "standard output"), 2: ("stderr", "standard error")}


class _Stream(io.FileIO):
    def __init__(self, number: int) -> None:
        super().__init__(number, "w", closefd=False)

    def write(self, content: ReadableBuffer) -> int:
        try:
            return super().write(content)
        except OSError as error:
            error.filename = _NAMES[self.fileno()][1]
            raise


def prepare_streams() -> None:
    """Put streams of our own in the place of Python's.

    Those that are closed lead nowhere: else the first files that are opened would take their
    numbers, and whatever a library prints would go into a shard.
    What a terminal has no character for is printed as an escape, and so are names that are no
    UTF-8.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # The lowest free number is this one.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    for number, (attribute, _) in _NAMES.items():
        old = getattr(sys, attribute)
        if isinstance(old, io.TextIOWrapper) and old.fileno() == number:
            new = io.TextIOWrapper(
                io.BufferedWriter(_Stream(number)),
                old.encoding,
                "backslashreplace",
                line_buffering=old.line_buffering,
                write_through=old.write_through,
            )
            setattr(sys, attribute, new)


def forget_unwritten() -> None:
    """Let what cannot be written go nowhere: Python would try it once more at its end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for number, (attribute, _) in _NAMES.items():
        stream = getattr(sys, attribute)
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            os.dup2(nowhere, number)
    os.close(nowhere)
