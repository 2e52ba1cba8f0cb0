"""`carnice family`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from carnice_build.cli.arguments import RECIPES, Recipes, make_options
from carnice_build.errors import RecipeError

_SHOWN = 5


def family(
    model: Annotated[
        str | None,
        typer.Argument(help="A model type of transformers, or a config.json.", metavar="MODEL"),
    ] = None,
    recipes: Recipes = RECIPES,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Where to write; RECIPES/_families/TYPE.yaml, where it counts, if not given.",
            metavar="FILE",
        ),
    ] = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Let it count in the place of a table that ships.")
    ] = False,
    show: Annotated[bool, typer.Option("--list", help="Show the families with a table.")] = False,
) -> None:
    """Write the table of a model family that has none.

    A table says which tensors a model has and what they are, here as far as transformers tells.
    Needs the torch extra.
    """
    from carnice_build.commands.family import families, write_family

    options = make_options(recipes=recipes)
    if show:
        found = families()
        width = max(map(len, found))
        for name, origin in found.items():
            typer.echo(f"{name:{width}}  {origin}")
        return
    if model is None:
        raise RecipeError("lacks an argument", where="family", expected="MODEL")
    written = write_family(model, out, options, replace=replace)
    typer.echo(f"wrote {written.path}: {written.tensors} tensors of a small model")
    if written.replaces:
        typer.echo("  it counts from now on, not the table that ships for this type")
    for what in written.unknown:
        typer.echo(f"  not known: {what}")
    if written.differing:
        typer.echo(f"  {len(written.differing)} tensors do not come out, among them")
        for name in written.differing[:_SHOWN]:
            typer.echo(f"    {name}")
    typer.echo("  look at its comments before you rely on it")
    if out is not None:
        return
    folder = "" if recipes == RECIPES else f" --recipes {recipes}"
    typer.echo("next, for a recipe of such a model:")
    typer.echo(f"  carnice new NAME --from OWNER/MODEL|FOLDER --as PRESET{folder}")
