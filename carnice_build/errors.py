"""The errors that carnice-build raises on purpose.

Each is raised where the facts are known and says where, what, what was expected and,
for a misspelt name, the nearest valid one.
Only the command line prints them.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class CarniceError(Exception):
    """Base of all expected errors; `exit_code` is what the command line exits with."""

    exit_code = 2

    def __init__(
        self,
        what: str,
        *,
        where: str | None = None,
        expected: str | None = None,
        nearest: str | None = None,
    ) -> None:
        self.what = what
        self.where = where
        self.expected = expected
        self.nearest = nearest
        super().__init__(self._sentence())

    def _sentence(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        if self.expected:
            text += f"; expected {self.expected}"
        if self.nearest:
            text += f"; did you mean {self.nearest!r}?"
        return text

    def __reduce__(self) -> tuple[object, ...]:
        """Keep the parts when an error crosses a process boundary."""
        return (_rebuild, (type(self), self.what, self.where, self.expected, self.nearest))


def _rebuild(
    kind: type[CarniceError],
    what: str,
    where: str | None,
    expected: str | None,
    nearest: str | None,
) -> CarniceError:
    return kind(what, where=where, expected=expected, nearest=nearest)


class RecipeError(CarniceError):
    """A recipe, profile or override is not valid."""


class CheckpointError(CarniceError):
    """A checkpoint's files are not what they claim to be, or a weight is not finite."""


class PlanError(CarniceError):
    """A valid recipe cannot work on these sources.

    `at` is the path, below the step or section that raises, of the entry that is to blame; the
    planner turns it into a place in the file.
    """

    def __init__(
        self,
        what: str,
        *,
        where: str | None = None,
        expected: str | None = None,
        nearest: str | None = None,
        at: tuple[str | int, ...] = (),
    ) -> None:
        self.at = at
        super().__init__(what, where=where, expected=expected, nearest=nearest)


class StoreError(CarniceError):
    """The cache or the output folder cannot be used."""

    exit_code = 1


class BackendError(CarniceError):
    """A quantization library failed or is not installed."""

    exit_code = 1


class BuildError(CarniceError):
    """The work of a valid build could not be finished, for want of disk space, say."""

    exit_code = 1


def nearest(name: str, valid: Iterable[str]) -> str | None:
    """The valid name closest in spelling to `name`, or None when none is close."""
    matches = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.5)
    return matches[0] if matches else None
