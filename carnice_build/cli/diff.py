"""`carnice diff`."""

from __future__ import annotations

from typing import Annotated

import typer

from carnice_build.cli.arguments import OUT, RECIPES, Jobs, Json, Out, make_options, print_json

Folder = Annotated[str, typer.Argument(help="Name of a built variant, or a model folder.")]


def diff(
    a: Folder,
    b: Folder,
    out: Out = OUT,
    jobs: Jobs = None,
    every: Annotated[
        bool, typer.Option("--all", help="A line for each module, not one for all of a kind.")
    ] = False,
    values: Annotated[
        bool,
        typer.Option(
            "--values/--no-values",
            help="Read the weights that differ, to say how far apart they are.",
        ),
    ] = True,
    as_json: Json = False,
) -> None:
    """Compare two model folders of any format, module by module.

    Bits, sizes, and how far the numbers are apart.
    """
    from rich.console import Console

    from carnice_build.commands.diff import diff_folders, find_folder
    from carnice_build.report.diff_table import diff_json, diff_table

    options = make_options(recipes=RECIPES, out=out, jobs=jobs)
    found = diff_folders(find_folder(a, out), find_folder(b, out), options.jobs, values)
    if as_json:
        print_json(diff_json(found))
        return
    Console().print(diff_table(found, every))
