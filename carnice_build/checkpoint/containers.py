"""The tensors of a file of either kind: safetensors or GGUF."""

from __future__ import annotations

from collections.abc import Iterable

from carnice_build.checkpoint.gguf_header import MAGIC, read_gguf
from carnice_build.checkpoint.gguf_header import SUFFIX as GGUF
from carnice_build.checkpoint.header import Entry, read_header
from carnice_build.tensors import Readable

SUFFIXES = (".safetensors", GGUF)
"""The ends of the names of files of tensors."""


STATISTICS = "imatrix.gguf"
"""The end of the name of a file that tells what weights were quantized by, and has none."""

PROJECTOR = "mmproj-"
"""The beginning of the name of a tower's GGUF file, as llama.cpp's programs know it."""


SOUND = "a."
"""The beginning of the names of its tensors that are of a tower for sound."""


def is_statistics(name: str) -> bool:
    """Whether a file is one of importance, which has no weights."""
    return name.endswith(STATISTICS)


def has_index(names: Iterable[str]) -> bool:
    """Whether a folder of these files of tensors has an index: libraries want none of GGUF."""
    return any(not name.endswith(GGUF) for name in names)


def read_entries(source: Readable) -> tuple[Entry, ...]:
    """The tensors of a file in the order of their bytes; CheckpointError as its reader raises.

    Its name or its first bytes say which kind it is, as a pack has no such name: no header of
    safetensors is as long as those would say.
    """
    return read_gguf(source).entries if _is_gguf(source) else read_header(source).entries


def _is_gguf(source: Readable) -> bool:
    if source.name.endswith(GGUF) or source.size < len(MAGIC):
        return source.name.endswith(GGUF)
    magic = bytearray(len(MAGIC))
    source.read_into(0, memoryview(magic))
    return magic == MAGIC
