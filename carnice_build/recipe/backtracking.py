"""How many ways of matching a regular expression may try before it gives up on a name.

An upper bound from the expression alone, on the parse tree that `re` itself compiles from:
choices that stand beside each other multiply, and a choice inside a repetition counts anew in
every round, which is where exponential time comes from.
"""

from __future__ import annotations

from math import inf
from re import _constants as codes  # type: ignore[attr-defined]
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any

_REPEATS = (codes.MAX_REPEAT, codes.MIN_REPEAT)


def ways(regex: str, length: int) -> float:
    """A bound on the ways that `regex` can match from one position of a text of `length`."""
    return _ways(parser.parse(regex), length)


def _ways(items: Any, length: int) -> float:
    product = 1.0
    for code, argument in items:
        product *= _ways_of_one(code, argument, length)
    return product


def _ways_of_one(code: Any, argument: Any, length: int) -> float:
    if code in _REPEATS:
        least, most, body = argument
        inner = _ways(body, length)
        if inner > 1:
            return _power(inner, min(most, length))
        return float(min(most - least, length) + 1)
    if code is codes.POSSESSIVE_REPEAT:
        least, most, body = argument
        return _power(_ways(body, length), min(most, length))
    if code is codes.BRANCH:
        return _ways_of_branches(argument[1], length)
    if code is codes.SUBPATTERN:
        return _ways(argument[-1], length)
    if code is codes.ATOMIC_GROUP:
        return _ways(argument, length)
    if code in (codes.ASSERT, codes.ASSERT_NOT):
        return _ways(argument[1], length)
    if code is codes.GROUPREF_EXISTS:
        _, yes, no = argument
        return _ways(yes, length) + (_ways(no, length) if no else 1)
    return 1.0


def _ways_of_branches(branches: Any, length: int) -> float:
    counts = [_ways(branch, length) for branch in branches]
    # The first character decides: at most one branch can match at any place.
    return max(counts) if _told_apart(branches) else sum(counts)


def _told_apart(branches: Any) -> bool:
    starts = []
    for branch in branches:
        if not len(branch) or branch[0][0] is not codes.LITERAL:
            return False
        starts.append(chr(branch[0][1]).casefold())
    return len(set(starts)) == len(starts)


def _power(base: float, exponent: int) -> float:
    try:
        return base**exponent
    except OverflowError:
        return inf
