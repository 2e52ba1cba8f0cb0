"""`carnice family`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from carnice_build.cli.arguments import RECIPES, Recipes, make_options

_SHOWN = 5


def family(
    model: Annotated[
        str, typer.Argument(help="A model type of transformers, or a config.json.", metavar="MODEL")
    ],
    recipes: Recipes = RECIPES,
    out: Annotated[
        Path | None, typer.Option(help="Where to write, if not beside the recipes.", metavar="FILE")
    ] = None,
) -> None:
    """Write a table of a model family, as far as transformers tells; needs the torch extra."""
    from carnice_build.commands.family import write_family

    written = write_family(model, out, make_options(recipes=recipes))
    typer.echo(f"wrote {written.path}: {written.tensors} tensors of a small model")
    for what in written.unknown:
        typer.echo(f"  not known: {what}")
    if written.differing:
        typer.echo(f"  {len(written.differing)} tensors do not come out, among them")
        for name in written.differing[:_SHOWN]:
            typer.echo(f"    {name}")
    typer.echo("  look at its comments before you rely on it")
