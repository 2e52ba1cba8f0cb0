"""The errors that carnice-build raises on purpose.

Each is raised where the facts are known and says where, what, what was expected and,
for a misspelt name, the nearest valid one.
Only the command line prints them.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from itertools import islice

_MOST_SHOWN = 400
_MOST_COMPARED = 5_000


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
        text = f"{_shown(self.where)}: {_shown(self.what)}" if self.where else _shown(self.what)
        if self.expected:
            text += f"; expected {_shown(self.expected)}"
        if self.nearest:
            text += f"; did you mean {_shown(repr(self.nearest))}?"
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


class BackendError(CarniceError):
    """A quantization library failed or is not installed."""

    exit_code = 1


class PluginError(CarniceError):
    """A step or format of another package cannot be used, or failed."""

    exit_code = 1


class BuildError(CarniceError):
    """The work of a valid build could not be finished, for want of disk space, say."""

    exit_code = 1


def _shown(text: str) -> str:
    """`text` on one line of bounded length, whatever a file put into it.

    Control characters, which could drive a terminal, appear as escapes.
    """
    if len(text) > _MOST_SHOWN:
        half = _MOST_SHOWN // 2
        text = f"{text[:half]}...{text[-half:]}"
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )


def nearest(name: str, valid: Iterable[str]) -> str | None:
    """The valid name closest in spelling to `name`, or None when none is close."""
    candidates = [item for item in islice(valid, _MOST_COMPARED) if len(item) <= _MOST_SHOWN]
    matches = difflib.get_close_matches(name[:_MOST_SHOWN], candidates, n=1, cutoff=0.5)
    return matches[0] if matches else None
