"""`carnice explain`."""

from __future__ import annotations

from dataclasses import asdict

import typer

from carnice_build.cli.arguments import (
    CACHE,
    RECIPES,
    Cache,
    Json,
    Profile,
    Recipes,
    Set,
    Source,
    Variants,
    make_options,
    print_json,
)


def explain(
    variants: Variants,
    recipes: Recipes = RECIPES,
    profile: Profile = None,
    source: Source = None,
    assignments: Set = None,
    cache: Cache = CACHE,
    as_json: Json = False,
) -> None:
    """Say what a build would run, and what changed since the last one.

    An action is one piece of work, such as the quantization of one module.
    """
    from carnice_build.commands.explain import explain_variants

    options = make_options(
        recipes=recipes, profile=profile, source=source, assignments=assignments, cache=cache
    )
    explanations = explain_variants(variants, options)
    if as_json:
        print_json([asdict(explanation) for explanation in explanations])
        return
    for explanation in explanations:
        counts = ", ".join(f"{count} {state}" for state, count in explanation.counts.items())
        typer.echo(f"{explanation.variant}: {counts}")
        for reason in explanation.reasons:
            typer.echo(f"  {reason}")
        if not explanation.reasons:
            typer.echo("  nothing changed")
