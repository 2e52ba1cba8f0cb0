"""The code blocks of a page of the documentation, as files that a reader would write of them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from conftest import REPOSITORY

DOCS = REPOSITORY / "docs"


def shown(page: str | Path) -> str:
    """The text of `docs/<page>`, or of a page that lies elsewhere by its path."""
    return (DOCS / page).read_text(encoding="utf-8")


def code_blocks(page: str | Path) -> Iterator[tuple[str, str]]:
    """The language of each code block of `docs/<page>`, and what is in it, in their order."""
    yield from re.findall(r"^```(\w*)\n(.*?)^```$", shown(page), re.MULTILINE | re.DOTALL)


def files_of(page: str | Path, language: str) -> dict[str, str]:
    """The files that blocks of a language make, by the path in the comment on their first line.

    Several blocks of one path are one file.
    """
    files: dict[str, str] = {}
    for found, block in code_blocks(page):
        named = re.match(r"# (\S+\.\w+)\n", block)
        if found == language and named:
            before = files.get(named[1], "")
            files[named[1]] = f"{before}\n\n{block[named.end() :]}" if before else block
    return files


def write_files(page: str | Path, language: str, folder: Path) -> None:
    """Write the files of a page below `folder`."""
    for name, text in files_of(page, language).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
