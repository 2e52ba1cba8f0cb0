"""Patterns over tensor and module names: globs, or regular expressions after `re:`."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable
from functools import lru_cache


class Patterns:
    """One pattern or several; a name matches when any of them does.

    A glob's `*` also crosses dots, and a glob covers the whole name.
    """

    def __init__(self, patterns: str | Iterable[str]) -> None:
        self.texts = (patterns,) if isinstance(patterns, str) else tuple(patterns)
        self._compiled = [compile_pattern(text) for text in self.texts]

    def matches(self, name: str) -> bool:
        """True when any pattern matches `name`."""
        return any(pattern.match(name) for pattern in self._compiled)

    def select(self, names: Iterable[str]) -> list[str]:
        """The matching names, in their order."""
        return [name for name in names if self.matches(name)]

    def __str__(self) -> str:
        return ", ".join(self.texts)


@lru_cache(maxsize=512)
def compile_pattern(text: str) -> re.Pattern[str]:
    """The compiled form of one pattern; ValueError when it is not valid."""
    try:
        return re.compile(text[3:] if text.startswith("re:") else fnmatch.translate(text))
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{text!r} is not a valid pattern: {error}") from None
