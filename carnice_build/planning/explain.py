"""Why an action runs: its key's fields now against those of the variant's last build.

The fields come from the walk that makes the key, so nothing can change a key unseen.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from carnice_build.formats.base import OP
from carnice_build.graph import Action, ActionOutput, TensorRef
from carnice_build.planning.planner import VariantPlan
from carnice_build.planning.status import BuildStatus, Status
from carnice_build.store.history import Facts

UNREAD = "not read yet"
UNMADE = "not made yet"

_MOST_SHOWN = 80


class FactsSink:
    """Collects the fields of a key instead of digesting them."""

    def __init__(self) -> None:
        self.facts: Facts = {}

    def field(self, name: str, value: str) -> None:
        """Keep one fact."""
        self.facts[name] = value


@dataclass(frozen=True)
class Reason:
    """Why `count` actions of one op are to run, or why changed ones need not."""

    op: str
    count: int
    status: Status
    cause: str
    where: str | None = None

    def __str__(self) -> str:
        by = f" by {self.where}" if self.where else ""
        found = ", found in the cache" if self.status is Status.CACHED else ""
        return f"{self.count} x {self.op}: {self.cause}{by}{found}"


def action_facts(action: Action, digest_of: Callable[[TensorRef], str | None]) -> Facts:
    """The fields of the action's key; the content of unknown inputs is `UNREAD` or `UNMADE`."""
    sink = FactsSink()
    action.describe(sink, [digest_of(ref) or _unknown(ref) for ref in action.inputs])
    return sink.facts


def _unknown(ref: TensorRef) -> str:
    return UNMADE if isinstance(ref.origin, ActionOutput) else UNREAD


def explain(
    variant: VariantPlan,
    status: BuildStatus,
    digest_of: Callable[[TensorRef], str | None],
    history: Mapping[str, Facts] | None,
) -> list[Reason]:
    """Grouped reasons for every action that runs, or whose key changed since the last build."""
    counts: Counter[tuple[str, Status, str, str | None]] = Counter()
    for label, action in variant.actions.items():
        state = status.actions.get(action.identity, Status.CACHED)
        now = action_facts(action, digest_of)
        before = history.get(label) if history is not None else None
        cause, parameter = _cause(now, before, known=history is not None)
        if cause is None and state is Status.CACHED:
            continue
        if cause is None:
            cause = "its result is no longer in the cache"
        where = _blame(variant, label, parameter)
        counts[(action.op.name, state, cause, where)] += 1
    return [
        Reason(op, count, state, cause, where)
        for (op, state, cause, where), count in counts.most_common()
    ]


def _cause(now: Facts, before: Facts | None, known: bool) -> tuple[str | None, str | None]:
    """The first difference in words, and the parameter, or `OP`, to blame when it is one."""
    if before is None:
        return ("new in this variant" if known else "never built here"), None
    for name in [*now, *(name for name in before if name not in now)]:
        old, new = before.get(name), now.get(name)
        if old == new:
            continue
        if name.startswith("input "):
            return _input_cause(name, old, new), None
        kind, _, parameter = name.partition(" ")
        shown = f"{parameter or name} {_short(old)} -> {_short(new)}"
        blamed = parameter if kind == "parameter" else None
        return shown, OP if name == OP else blamed
    return None, None


def _short(value: str | None) -> str:
    """A value as a line can hold it; a chat template, say, cannot be shown whole."""
    if value is None:
        return "unset"
    return value if len(value) <= _MOST_SHOWN else f"{value[:_MOST_SHOWN]}..."


def _input_cause(name: str, old: str | None, new: str | None) -> str | None:
    if new is not None and new.endswith(UNREAD):
        return "its source is another file, or was changed, and is to be read"
    if new is not None and new.endswith(UNMADE):
        return f"{name} is to be made again"
    if old is None or new is None:
        return f"{name} was added or left out"
    if old.rpartition(" ")[0] != new.rpartition(" ")[0]:
        return f"{name} has another type or shape"
    return f"the content of {name} changed"


def _blame(variant: VariantPlan, label: str, parameter: str | None) -> str | None:
    if parameter is None:
        return None
    path = variant.conversion.causes.get(label, {}).get(parameter)
    return variant.recipe.where("quantize", *path) if path is not None else None


def variant_facts(
    variant: VariantPlan, digest_of: Callable[[TensorRef], str | None]
) -> dict[str, Facts]:
    """The key fields of every action of the variant, by what it makes."""
    return {label: action_facts(action, digest_of) for label, action in variant.actions.items()}
