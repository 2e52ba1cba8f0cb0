"""The tags of a template's source, with their places, so that parts of it can be replaced.

jinja2's own lexer drops white space and positions.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

_OPENING = re.compile(r"\{[{%#]")
_CODE = r"""(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|[^'"])*?"""
_TAG = re.compile(
    rf"\{{\#.*?\#\}}"
    rf"|\{{%[-+]?\s*raw\s*[-+]?%\}}.*?\{{%[-+]?\s*endraw\s*[-+]?%\}}"
    rf"|\{{%[-+]?(?P<statement>{_CODE})[-+]?%\}}"
    rf"|\{{\{{[-+]?(?P<output>{_CODE})[-+]?\}}\}}",
    re.DOTALL,
)
_LITERAL = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\"""", re.DOTALL)


@dataclass(frozen=True)
class Tag:
    """`source[start:end]`: a tag of kind "statement", "output" or, where nothing is run, ""."""

    start: int
    end: int
    kind: str
    code: str

    @property
    def keyword(self) -> str:
        """A statement's first word, "" for other tags."""
        return self.code.split(maxsplit=1)[0] if self.kind == "statement" and self.code else ""

    @property
    def literal(self) -> str | None:
        """The text that is put out, when it is one string literal and nothing else."""
        if self.kind != "output" or not _LITERAL.fullmatch(self.code):
            return None
        try:
            text = self.code[1:-1].encode("ascii", "backslashreplace").decode("unicode-escape")
            text.encode()
        except UnicodeError:
            return None
        return text


def tags_of(source: str) -> list[Tag]:
    """Every tag, in order, up to an opening that nothing closes."""
    tags: list[Tag] = []
    place = 0
    while opening := _OPENING.search(source, place):
        match = _TAG.match(source, opening.start())
        if match is None:
            break
        kind = match.lastgroup or ""
        code = match[kind].strip() if kind else ""
        tags.append(Tag(match.start(), match.end(), kind, code))
        place = match.end()
    return tags


def end_of(tags: Sequence[Tag], index: int) -> int:
    """The index of the tag that ends the block which `tags[index]` begins; -1 without one."""
    keyword, depth = tags[index].keyword, 0
    for place in range(index, len(tags)):
        depth += (tags[place].keyword == keyword) - (tags[place].keyword == f"end{keyword}")
        if not depth:
            return place
    return -1


_ESCAPES = str.maketrans({"\\": "\\\\", "'": "\\'", "\n": "\\n", "\r": "\\r", "\t": "\\t"})


def quoted(text: str) -> str:
    """`text` as a string literal of a template, on one line."""
    return f"'{text.translate(_ESCAPES)}'"
