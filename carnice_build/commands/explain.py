"""Explaining: why a build would run what it would run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from carnice_build.commands.options import Options
from carnice_build.commands.plan import plan_variants
from carnice_build.planning.explain import Reason, explain
from carnice_build.planning.status import Contents, Status, survey
from carnice_build.store.history import read_history
from carnice_build.store.store import Store


@dataclass(frozen=True)
class Explanation:
    """For one variant: how many actions are in each state, and the reasons, commonest first."""

    variant: str
    counts: dict[Status, int]
    reasons: tuple[Reason, ...]


def explain_variants(names: Sequence[str], options: Options) -> list[Explanation]:
    """Compare what the named variants' actions are now with what their last builds did."""
    plan = plan_variants(names, options)
    with Store(options.cache) as store:
        contents = Contents(store)
        explanations = []
        for variant in plan.variants:
            status = survey([variant], store)
            history = read_history(store.root, variant.name)
            reasons = explain(variant, status, contents.digest, history)
            # No remote is asked here, so that nothing is said of one.
            states: list[Status] = [state for state in Status if state is not Status.REMOTE]
            counts = {state: status.count(state) for state in states}
            explanations.append(Explanation(variant.name, counts, tuple(reasons)))
        return explanations
