"""What the nodes of a folded graph are called: by what tells them apart, and by nothing long."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from carnice_build.graph import Action

_WORDS = {"bits": "{} bits", "group_size": "g{}", "dtype": "{}", "add": "+ {:g}"}
"""Parameters that are always said, and how."""

_PLACE = "layer"
"""A parameter that says where an action stands, which is not what it does."""

_LONGEST = 20
"""Letters of a value that is said; a chat template or a list of names never is."""

_MOST_VALUES = 3

Telling = Mapping[str, frozenset[str]]
"""By the name of an op, the parameters in which its actions differ."""


def telling_parameters(actions: Iterable[Action]) -> Telling:
    """What tells actions of one op from each other, as far as it can be said shortly."""
    values: dict[str, dict[str, set[str]]] = {}
    for action in actions:
        known = values.setdefault(action.op.name, {})
        for key, value in _short_ones(action.params).items():
            known.setdefault(key, set()).add(value)
    return {
        name: frozenset(key for key, found in known.items() if len(found) > 1)
        for name, known in values.items()
    }


def describe_op(name: str, params: Mapping[str, Any], telling: frozenset[str]) -> str:
    """An op and its parameters as a person would say them: `mlx.quantize 4 bits g64 BF16`.

    Of the unusual parameters, only those in `telling` are said.
    """
    said = [text.format(params[key]) for key, text in _WORDS.items() if params.get(key) is not None]
    others = sorted(telling - _WORDS.keys())
    short = _short_ones(params)
    said += [f"{key}={short[key]}" for key in others if key in short]
    return " ".join([name, *said])


def describe_actions(actions: Sequence[Action], telling: Telling) -> str:
    """What actions of one node have in common, op by op."""
    ops: dict[str, list[Action]] = {}
    for action in actions:
        ops.setdefault(action.op.name, []).append(action)
    return " + ".join(
        describe_op(name, _common(members), telling[name]) for name, members in ops.items()
    )


def differences(actions: Sequence[Action], telling: Telling) -> list[str]:
    """How actions of one node differ, as in `kind: 48 linear, 16 full`."""
    lines = []
    for key in sorted({key for action in actions for key in telling[action.op.name]}):
        counts = Counter(
            value
            for action in actions
            if (value := _short_ones(action.params).get(key)) is not None
        )
        if 1 < len(counts) <= _MOST_VALUES:
            parts = (f"{count:,} {value}" for value, count in counts.items())
            lines.append(f"{key}: {', '.join(parts)}")
    return lines


def _common(actions: Sequence[Action]) -> dict[str, Any]:
    first = actions[0].params
    return {
        key: value
        for key, value in first.items()
        if all(action.params.get(key) == value for action in actions)
    }


def _short_ones(params: Mapping[str, Any]) -> dict[str, str]:
    """The parameters whose values fit into a label, in words."""
    return {
        key: text
        for key, value in params.items()
        if key != _PLACE
        and isinstance(value, str | int | float)
        and len(text := _word(value)) <= _LONGEST
    }


def _word(value: str | float) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
