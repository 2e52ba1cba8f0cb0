"""`carnice plan`."""

from __future__ import annotations

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
    result = plan_and_survey(variants, options)
    if as_json:
        print_json(plan_json(result, options.memory, options.jobs))
        return
    from rich.console import Console

    Console().print(plan_view(result, options.memory, options.jobs))
