"""Launches that cannot work are refused before anything is built."""

from __future__ import annotations

from typing import Any

from carnice_build.errors import PlanError
from carnice_build.recipe.serve import ServeSpec
from carnice_build.serving.facts import ServingFacts
from carnice_build.serving.launches import Launch, resolve_launches, setting
from carnice_build.serving.memory import GIB, estimate, whole_number
from carnice_build.serving.profile import Condition, Rule


def plan_launches(spec: ServeSpec, facts: ServingFacts) -> tuple[Launch, ...]:
    """The launches of a recipe's section, each checked; PlanError with `at` below the section."""
    launches = resolve_launches(spec, facts)
    for launch in launches:
        check_launch(launch, facts)
    return launches


def check_launch(launch: Launch, facts: ServingFacts) -> None:
    """Raise PlanError when `launch` breaks a rule of its profile or asks for more than there is."""
    for rule in (*launch.engine.rules, *launch.profile.rules):
        if all(
            _holds(condition, setting(launch, key, facts)) for key, condition in rule.when.items()
        ):
            raise PlanError(
                f"the launch {launch.name!r} cannot work: {rule.reason}",
                expected=rule.instead,
                at=_blamed(launch, rule),
            )
    _check_size(launch, facts)


_COUNTS = (
    "max-num-seqs",
    "max-num-batched-tokens",
    "decode-context-parallel-size",
    "data-parallel-size",
    "speculative-config.num_speculative_tokens",
)
"""Options that the engine refuses below 1, beside those that are counted with."""


def _check_size(launch: Launch, facts: ServingFacts) -> None:
    for flag in _COUNTS:
        if flag.partition(".")[0] in launch.flags and setting(launch, flag, facts) is not None:
            whole_number(launch, flag, facts)
    memory = estimate(launch, facts)
    context = launch.engine.words.context
    if memory.tokens > facts.max_positions:
        raise PlanError(
            f"{context} {memory.tokens} is more than the model's {facts.max_positions}",
            at=launch.path("flags", context),
        )
    if launch.engine.words.parallel:
        _check_cards(launch, facts)
    if memory.budget is not None and memory.needed > memory.budget:
        raise PlanError(
            f"the launch {launch.name!r} needs {memory.kv_cache / GIB:.1f} GiB for "
            f"{memory.tokens} tokens and {memory.weights / GIB:.1f} GiB for weights, "
            f"and may use {memory.budget / GIB:.1f} GiB",
            expected=f"a smaller {context}, a cache of a smaller type, or more memory",
            at=launch.path("flags", context),
        )


def _check_cards(launch: Launch, facts: ServingFacts) -> None:
    """PlanError where the model cannot be split as the launch says, or over the cards it has."""
    parallel = whole_number(launch, "tensor-parallel-size", facts)
    stages = whole_number(launch, "pipeline-parallel-size", facts)
    replicas = whole_number(launch, "data-parallel-size", facts)
    if launch.hardware and parallel * stages * replicas > launch.hardware.cards:
        factors = {
            "tensor-parallel-size": parallel,
            "pipeline-parallel-size": stages,
            "data-parallel-size": replicas,
        }
        flag = next(name for name, number in factors.items() if number > 1)
        product = " x ".join(str(number) for number in factors.values() if number > 1)
        raise PlanError(
            f"{flag} {product} is more than the {launch.hardware.cards} cards",
            expected="that many cards in `hardware`",
            at=launch.path("flags", flag),
        )
    shared = whole_number(launch, "decode-context-parallel-size", facts)
    if parallel % shared:
        raise PlanError(
            f"the launch {launch.name!r} cannot work: decode-context-parallel-size {shared} does "
            f"not divide the tensor-parallel-size {parallel}",
            at=launch.path("flags", "decode-context-parallel-size"),
        )
    if stages > facts.sharding.layers:
        raise PlanError(
            f"the launch {launch.name!r} cannot work: pipeline-parallel-size {stages} is more than "
            f"the {facts.sharding.layers} decoder layers",
            at=launch.path("flags", "pipeline-parallel-size"),
        )
    split = {
        "experts": "enable-expert-parallel" not in launch.flags,
        "tower": "language-model-only" not in launch.flags
        and setting(launch, "mm-encoder-tp-mode", facts) != "data",
    }
    if refusal := facts.sharding.refusal(parallel, **split):
        possible = [str(number) for number in facts.sharding.possible(**split)]
        raise PlanError(
            f"the launch {launch.name!r} cannot work: tensor-parallel-size {parallel} {refusal}",
            expected=" or ".join(possible),
            at=launch.path("flags", "tensor-parallel-size"),
        )


def _blamed(launch: Launch, rule: Rule) -> tuple[str, ...]:
    """The first setting of the rule that the recipe changed, or the launch."""
    for key in rule.when:
        kind, _, name = key.partition(".")
        if kind == "env" and key in launch.changed:
            return launch.path("env", name)
        if kind in launch.changed:
            return launch.path("flags", kind)
    return launch.path()


def _holds(condition: Condition, value: Any) -> bool:
    if condition.lacks is not None:
        return value is None or condition.lacks not in str(value)
    if condition.missing:
        return value is None
    if value is None:
        return False
    if condition.one_of is not None:
        return str(value).casefold() in {str(item).casefold() for item in condition.one_of}
    if condition.at_least is not None:
        return any(number >= condition.at_least for number in _numbers(value))
    if condition.over is not None:
        return any(number > condition.over for number in _numbers(value))
    if isinstance(condition.equals, bool | str):
        return bool(value == condition.equals)
    return condition.equals in _numbers(value)


def _numbers(value: Any) -> list[float]:
    """The numbers in a setting, also where they were written as text."""
    numbers = []
    for item in value if isinstance(value, list) else [value]:
        try:
            numbers.append(float(item))
        except (TypeError, ValueError):
            continue
    return numbers
