"""What a check says."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class Outcome(StrEnum):
    """How a check ended; a skipped one says nothing about the folder."""

    PASSED = "passed"
    FAILED = "failed"
    SKIPPED = "skipped"


@dataclass(frozen=True)
class Check:
    """One check of one folder: a line for a person, what is wrong, and its figures as JSON."""

    name: str
    outcome: Outcome
    summary: str
    problems: Sequence[str] = ()
    details: Mapping[str, Any] = field(default_factory=dict)
    measured: str = ""
    """The day, as 2026-11-25, on which it was made; empty when that is now."""


def judged(
    name: str, problems: Sequence[str], summary: str, details: Mapping[str, Any] | None = None
) -> Check:
    """A check that passed when there are no problems; `summary` says what was looked at."""
    outcome = Outcome.FAILED if problems else Outcome.PASSED
    return Check(name, outcome, summary, tuple(problems), details or {})


def count_error(count: int, of: int) -> float:
    """The standard error of `count` things of `of`, as a count, if they are independent.

    Half the score interval at one standard deviation (Wilson, JASA 22, 1927), which unlike that of
    the binomial's variance is not zero where all or none are counted; 0 of none.
    """
    if not of:
        return 0.0
    share = count / of
    return math.sqrt(share * (1 - share) / of + 0.25 / of**2) / (1 + 1 / of) * of


def skipped(name: str, why: str) -> Check:
    """A check that was not made."""
    return Check(name, Outcome.SKIPPED, why)
