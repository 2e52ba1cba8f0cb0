"""Commands about recipes alone: `list`, `schema`, and two for the Makefile."""

from __future__ import annotations

import typer

from carnice_build.cli.arguments import (
    RECIPES,
    Json,
    Profile,
    Recipes,
    Set,
    Variants,
    make_options,
    print_json,
)
from carnice_build.errors import CarniceError


def list_variants(recipes: Recipes = RECIPES, as_json: Json = False) -> None:
    """Show the variants that the recipes declare."""
    from carnice_build.commands import plan

    found = plan.list_variants(make_options(recipes=recipes), _warn)
    if as_json:
        print_json({recipe.variant: recipe.description for recipe in found})
        return
    width = max((len(recipe.variant) for recipe in found), default=0)
    for recipe in found:
        typer.echo(f"{recipe.variant:{width}}  {recipe.description}")


def _warn(error: CarniceError) -> None:
    """Tell of something that is left out."""
    typer.echo(f"carnice: left out: {error}", err=True)


def schema() -> None:
    """Print the JSON Schema of recipes, for editors."""
    from carnice_build.planning.vocabulary import usable_vocabulary
    from carnice_build.recipe.schema import json_schema

    usable, problems = usable_vocabulary()
    for problem in problems:
        _warn(problem)
    print_json(json_schema(usable))


def extras(variants: Variants, recipes: Recipes = RECIPES, assignments: Set = None) -> None:
    """Print the optional dependencies that building these variants needs, joined by commas."""
    from carnice_build.commands.plan import extras_of

    typer.echo(
        ",".join(extras_of(variants, make_options(recipes=recipes, assignments=assignments)))
    )


def names(recipes: Recipes = RECIPES, profile: Profile = None) -> None:
    """Print the names of all variants on one line; with a profile, those that it has."""
    from carnice_build.commands.plan import names_of

    typer.echo(" ".join(names_of(make_options(recipes=recipes, profile=profile))))
