"""What a card tells of measurements: figures in words, which nothing in them can break."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Line:
    """A figure of the folder beside that of its source, which is empty where there is none."""

    what: str
    source: str
    found: str


@dataclass(frozen=True)
class Measured:
    """What `carnice verify` measured of a folder, and the commands that did.

    `text` is the name of the held-out text, empty where no line is about one.
    """

    lines: Sequence[Line]
    text: str
    commands: Sequence[str]


def plain(text: object) -> str:
    """`text` on one line of a page or in a cell of a table, where no character means anything."""
    line = " ".join(str(text).split())
    return "".join(_ESCAPES.get(letter, letter) for letter in line if letter.isprintable())


_ESCAPES = {"<": "&lt;", ">": "&gt;", "&": "&amp;"} | {
    letter: f"\\{letter}" for letter in "\\`*_{}[]|~#!$"
}


def command_line(command: str) -> str:
    """`command` on one line of a block of code, which it does not end."""
    return "".join(filter(str.isprintable, " ".join(command.split()))).replace("```", "")
