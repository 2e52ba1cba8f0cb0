"""The errors that carnice-build raises on purpose.

Each is raised where the facts are known and says where, what, what was expected and,
for a misspelt name, the nearest valid one.
What is wrong in several places is told at once: a headline, then each problem on a line of its own.
Only the command line prints them.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from typing import TypeVar

T = TypeVar("T")
E = TypeVar("E", bound="CarniceError")

MOST_LISTED = 5
"""Problems of one kind that an error tells; of any more it says how many."""

_MOST_SHOWN = 400
_MOST_COMPARED = 5_000


class CarniceError(Exception):
    """Base of all expected errors; `exit_code` is what the command line exits with.

    `problems` are lines below the sentence, one for each thing that is wrong; see `together`.
    """

    exit_code = 2

    def __init__(
        self,
        what: str,
        *,
        where: str | None = None,
        expected: str | None = None,
        nearest: str | None = None,
        problems: Sequence[str] = (),
    ) -> None:
        self.what = what
        self.where = where
        self.expected = expected
        self.nearest = nearest
        self.problems = tuple(problems)
        super().__init__("\n  ".join([self.sentence(), *map(_shown, self.problems)]))

    def sentence(self, said: str | None = None) -> str:
        """The error on one line, without its place where that was `said` above."""
        text = _shown(self.what)
        if self.where and self.where != said:
            text = f"{_shown(self.where)}: {text}"
        if self.expected:
            text += f"; expected {_shown(self.expected)}"
        if self.nearest:
            text += f"; did you mean {_shown(repr(self.nearest))}?"
        return text

    def __reduce__(self) -> tuple[object, ...]:
        """Keep the parts when an error crosses a process boundary."""
        parts = (self.what, self.where, self.expected, self.nearest, self.problems)
        return (_rebuild, (type(self), *parts))


def _rebuild(
    kind: type[CarniceError],
    what: str,
    where: str | None,
    expected: str | None,
    nearest: str | None,
    problems: tuple[str, ...],
) -> CarniceError:
    return kind(what, where=where, expected=expected, nearest=nearest, problems=problems)


class RecipeError(CarniceError):
    """A recipe, profile, override or family table is not valid."""


class CheckpointError(CarniceError):
    """A checkpoint's files are not what they claim to be, or a weight is not finite."""

    def of_entry(self, key: str, where: str | None = None) -> PlanError:
        """The error of a file that the entry `key` of a recipe names, which is at `where`."""
        what = f"{key}: {self.where}: {self.what}" if self.where else f"{key}: {self.what}"
        return PlanError(
            what,
            where=where,
            expected=self.expected,
            nearest=self.nearest,
            problems=self.problems,
        )


class PlanError(CarniceError):
    """A valid recipe cannot work on these sources.

    `at` is the path, below the step or section that raises, of the entry that is to blame; the
    planner turns it into a place in the file.
    `unfit` are all modules that a format would quantize and cannot, each with why not.
    """

    def __init__(
        self,
        what: str,
        *,
        where: str | None = None,
        expected: str | None = None,
        nearest: str | None = None,
        problems: Sequence[str] = (),
        at: tuple[str | int, ...] = (),
        unfit: Mapping[str, str] | None = None,
    ) -> None:
        self.at = at
        self.unfit = unfit or {}
        super().__init__(what, where=where, expected=expected, nearest=nearest, problems=problems)

    def revised(
        self,
        *,
        what: str | None = None,
        where: str | None = None,
        at: tuple[str | int, ...] | None = None,
    ) -> PlanError:
        """The same error, with what is given in place of its own: whoever raised it knew less."""
        return PlanError(
            what or self.what,
            where=where or self.where,
            expected=self.expected,
            nearest=self.nearest,
            problems=self.problems,
            at=self.at if at is None else at,
            unfit=self.unfit,
        )


class StoreError(CarniceError):
    """The cache or the output folder cannot be used."""


class BackendError(CarniceError):
    """A quantization library failed or is not installed."""

    exit_code = 1


class EngineError(CarniceError):
    """A serving engine is not installed, does not start, or answers what is no answer."""


class PluginError(CarniceError):
    """A step or format of another package cannot be used, or failed."""

    exit_code = 1


class BuildError(CarniceError):
    """The work of a valid build could not be finished, for want of disk space, say."""

    exit_code = 1


def _shown(text: str) -> str:
    """`text` on one line of bounded length, whatever a file put into it."""
    if len(text) > _MOST_SHOWN:
        half = _MOST_SHOWN // 2
        text = f"{text[:half]}...{text[-half:]}"
    return printable(text)


def printable(text: str) -> str:
    """`text` with escapes in the place of characters that could drive a terminal."""
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )


def together(items: Sequence[T], error: Callable[[T], E], what: str, where: str) -> E:
    """What `error` makes of the one item; for several, a headline with a line for each.

    The headline says `where` and `what`.  Only items that are shown are asked about, so `error`
    may be slow.
    """
    errors = [error(item) for item in items[:MOST_LISTED]]
    if len(items) == 1:
        return errors[0]
    lines = [item.sentence(where) for item in errors]
    if more := len(items) - len(lines):
        lines.append(f"and {more} more")
    return type(errors[0])(what, where=where, problems=lines)


def nearest(name: str, valid: Iterable[str]) -> str | None:
    """The valid name closest in spelling to `name`, or None when none is close."""
    return next(iter(near(name, valid, 1)), None)


def near(name: str, valid: Iterable[str], most: int) -> list[str]:
    """The valid names that are close in spelling to `name`, the closest first."""
    candidates = [item for item in islice(valid, _MOST_COMPARED) if len(item) <= _MOST_SHOWN]
    name = name[:_MOST_SHOWN]
    if same := [item for item in candidates if item != name and item.lower() == name.lower()]:
        return same[:most]
    alike = difflib.get_close_matches(name, candidates, n=most, cutoff=0.5)
    # Names half alike are a guess, unless one says more than the other.
    close = set(difflib.get_close_matches(name, alike, n=most, cutoff=0.6))
    return [item for item in alike if item in close or name in item or item in name]
