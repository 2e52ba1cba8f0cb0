"""What libraries answered to a plan's questions, as text: `cache/answers/<key>`.

Whoever reads one checks it, for anyone who can write to the cache can write nonsense.
An answer's modification time is when a plan last asked for it.
"""

from __future__ import annotations

import os
import zlib
from contextlib import suppress
from pathlib import Path

from carnice_build.store.files import open_regular, write_atomically

MAX_BYTES = 200_000_000
"""Of an answer, packed or not: that of the largest models known takes a few."""


def read_answer(root: Path, key: str) -> str | None:
    """The answer of this key; None when nobody asked before, or it is unreadable."""
    try:
        return _text(_path(root, key), asked=True)
    except (OSError, ValueError, zlib.error):
        return None


def write_answer(root: Path, key: str, text: str) -> None:
    """Remember an answer; one that cannot be written will be asked for again."""
    path = _path(root, key)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, zlib.compress(text.encode(), 1))
    except OSError:
        return


def is_damaged(path: Path) -> bool:
    """Whether the file of an answer is not what was written there."""
    try:
        _text(path, asked=False)
    except (OSError, ValueError, zlib.error):
        return True
    return False


def _text(path: Path, *, asked: bool) -> str:
    unpacker = zlib.decompressobj()
    text = unpacker.decompress(_content(path, asked=asked), MAX_BYTES).decode()
    if not unpacker.eof:
        # Which is where zlib's checksum stands.
        raise ValueError(f"{path} has no end")
    return text


def _content(path: Path, *, asked: bool) -> bytes:
    """The bytes of a file; OSError for anything else, and for one that is too large."""
    with open_regular(path) as file:
        if os.fstat(file.fileno()).st_size > MAX_BYTES:
            raise OSError(f"{path} is no answer")
        if asked:
            with suppress(OSError):  # it may be somebody else's cache
                os.utime(file.fileno())
        return file.read(MAX_BYTES)


def _path(root: Path, key: str) -> Path:
    return root / "answers" / key
