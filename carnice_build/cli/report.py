"""`carnice report`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from carnice_build.cli.arguments import (
    CACHE,
    OUT,
    RECIPES,
    Cache,
    Jobs,
    Json,
    Out,
    Profile,
    Recipes,
    Source,
    complete_variant,
    make_options,
    print_json,
)


def report(
    variants: Annotated[
        list[str] | None,
        typer.Argument(
            help="Names of recipes; all that are built if none is given.",
            autocompletion=complete_variant,
        ),
    ] = None,
    recipes: Recipes = RECIPES,
    profile: Profile = None,
    source: Source = None,
    out: Out = OUT,
    cache: Cache = CACHE,
    jobs: Jobs = None,
    to: Annotated[
        Path | None,
        typer.Option(help="Folder of the report; OUT/report if not given.", metavar="DIR"),
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="First verify what was not verified as it is now.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Compare built variants on a page.

    One in HTML, and a table in Markdown: sizes, errors, checks.
    """
    from carnice_build.commands.report import built_variants, collect_report, unverified
    from carnice_build.report.report_files import write_report

    options = make_options(
        recipes=recipes, profile=profile, source=source, out=out, cache=cache, jobs=jobs
    )
    names = variants or built_variants(options)
    if verify:
        from carnice_build.commands.verify import verify_variants

        for name in unverified(names, options):
            verify_variants([name], options)
    found = collect_report(names, options)
    if as_json:
        print_json(asdict(found))
        return
    for path in write_report(found, to or out / "report"):
        typer.echo(path)
