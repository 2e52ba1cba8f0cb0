"""Patterns over tensor and module names: globs, or regular expressions after `re:`.

Python's regular expressions can take time exponential in the length of a name.  A recipe or a
checkpoint may come from a stranger, so names have a longest length, and an expression whose
matcher could try too many ways of splitting such a name is refused when it is read.
"""

from __future__ import annotations

import fnmatch
import re
import time
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import TypeVar

from carnice_build.errors import PlanError
from carnice_build.recipe.backtracking import ways

T = TypeVar("T")

MAX_NAME = 256
"""Characters in the longest name that patterns are applied to; real ones have some 90."""

_MAX_PATTERN = 1_000
_MAX_WAYS = MAX_NAME**3 * 2**4
_MAX_SECONDS = 10.0


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
        if len(self._compiled) == 1:
            match = self._compiled[0].match
            return [name for name in in_time(names) if match(name)]
        return [name for name in in_time(names) if self.matches(name)]

    def __str__(self) -> str:
        return ", ".join(self.texts)


def expression(glob: str) -> str:
    """The pattern for what `glob` matches, as llm-compressor spells it; others stay."""
    if "*" not in glob or glob.startswith("re:"):
        return glob
    end = "" if glob.endswith("*") else "$"
    return f"re:{'.*'.join(map(re.escape, glob.split('*')))}{end}"


def in_time(names: Iterable[T]) -> Iterator[T]:
    """The same, one after another; PlanError when what is done with them takes far too long."""
    deadline = time.monotonic() + _MAX_SECONDS
    for name in names:
        if time.monotonic() > deadline:
            raise PlanError(f"the pattern takes more than {_MAX_SECONDS:.0f} s on these names")
        yield name


@lru_cache(maxsize=512)
def compile_pattern(text: str) -> re.Pattern[str]:
    """The compiled form of one pattern; ValueError when it is not valid or could run away."""
    if len(text) > _MAX_PATTERN:
        raise ValueError(f"{text!r} has more than {_MAX_PATTERN} characters")
    if not text.startswith("re:"):
        # A translated glob never tries a second way to match an inner `*`.
        return re.compile(fnmatch.translate(text))
    try:
        compiled = re.compile(text[3:])
        tried = ways(text[3:], MAX_NAME)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{text!r} is not a valid pattern: {error}") from None
    if tried > _MAX_WAYS:
        raise ValueError(
            f"{text!r} could take too long on some names; use fewer repetitions, none in another"
        )
    return compiled
