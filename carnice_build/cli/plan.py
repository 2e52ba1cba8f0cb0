"""`carnice plan`."""

from __future__ import annotations

from typing import Annotated

import typer

from carnice_build.cli.arguments import (
    CACHE,
    RECIPES,
    Cache,
    Jobs,
    Json,
    Memory,
    Profile,
    Recipes,
    Remote,
    Set,
    Source,
    Variants,
    make_options,
    print_json,
)

MOST_NODES = 1000

Nodes = Annotated[
    int | None,
    typer.Option(
        "--nodes",
        min=1,
        max=MOST_NODES,
        help="Estimate what a build takes on so many machines, each with --jobs cores.",
        metavar="N",
    ),
]
Bandwidth = Annotated[
    str | None,
    typer.Option(
        help="What each of them receives in a second, and sends, e.g. 10Gbit/s.", metavar="RATE"
    ),
]
Price = Annotated[
    float | None, typer.Option(help="What one of them costs for an hour.", metavar="AMOUNT")
]


def plan(
    variants: Variants,
    recipes: Recipes = RECIPES,
    profile: Profile = None,
    source: Source = None,
    assignments: Set = None,
    cache: Cache = CACHE,
    jobs: Jobs = None,
    memory: Memory = "2GB",
    remote: Remote = None,
    nodes: Nodes = None,
    bandwidth: Bandwidth = None,
    price: Price = None,
    as_json: Json = False,
) -> None:
    """Show what a build would do, and sizes; reads no weight."""
    from carnice_build.commands.plan import plan_and_survey
    from carnice_build.report.plan_table import plan_json, plan_view

    options = make_options(
        recipes=recipes,
        profile=profile,
        source=source,
        assignments=assignments,
        cache=cache,
        jobs=jobs,
        memory=memory,
        remote=remote,
    )
    wanted = (nodes, bandwidth, price)
    machines = None
    if any(item is not None for item in wanted):
        from carnice_build.commands.estimate import estimate_plan, machines_of
        from carnice_build.report.estimate_table import estimate_json, estimate_view

        machines = machines_of(*wanted, options)
    result = plan_and_survey(variants, options)
    if as_json:
        found = plan_json(result, options.memory, options.jobs)
        if machines:
            found["estimate"] = estimate_json(estimate_plan(result, machines))
        print_json(found)
        return
    from rich.console import Console

    Console().print(plan_view(result, options.memory, options.jobs))
    if machines:
        Console().print(estimate_view(estimate_plan(result, machines)))
