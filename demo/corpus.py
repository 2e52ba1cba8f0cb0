"""Text of the running interpreter's own standard library: sources and the `pydoc` topics."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data import topics

SKIPPED_FOLDERS = frozenset(
    {"site-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "__pycache__"}
)
HELD_OUT_BYTES = 280_000
HELD_OUT_FILE_BYTES = range(4_000, 40_000)


@dataclass(frozen=True, slots=True)
class Document:
    """One file or topic: where it comes from and its text."""

    name: str
    text: str


def stdlib_documents() -> Iterator[Document]:
    """Every readable source file of the standard library, then every `pydoc` topic, by name."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if SKIPPED_FOLDERS.isdisjoint(path.relative_to(root).parts):
            try:
                yield Document(name, path.read_text(encoding="utf-8"))
            except UnicodeDecodeError:
                continue
    for topic, text in sorted(topics.topics.items()):
        yield Document(f"topic {topic}", text)


def split_held_out(documents: list[Document]) -> tuple[list[Document], list[Document]]:
    """Documents to train on, and some `HELD_OUT_BYTES` of others, drawn by their name's hash."""
    held: list[Document] = []
    size = 0
    for document in sorted(documents, key=_name_digest):
        length = len(document.text.encode())
        if size < HELD_OUT_BYTES and length in HELD_OUT_FILE_BYTES:
            held.append(document)
            size += length
    names = {document.name for document in held}
    return [document for document in documents if document.name not in names], held


def _name_digest(document: Document) -> str:
    return hashlib.sha256(document.name.encode()).hexdigest()
