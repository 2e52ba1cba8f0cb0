"""`carnice verify`."""

from __future__ import annotations

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
    Set,
    Source,
    Variants,
    make_options,
    print_json,
)


def verify(
    variants: Variants,
    recipes: Recipes = RECIPES,
    profile: Profile = None,
    source: Source = None,
    assignments: Set = None,
    out: Out = OUT,
    cache: Cache = CACHE,
    jobs: Jobs = None,
    run: Annotated[
        bool,
        typer.Option("--run/--no-run", help="Also load the models and run them, in minutes."),
    ] = True,
    text: Annotated[
        Path | None,
        typer.Option(
            help="Text that no model was calibrated on, to run them on; the demo profile has one.",
            metavar="FILE",
        ),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Most sequences to take from the text; 64, or 8 without a GPU, if not given.",
            metavar="N",
        ),
    ] = None,
    again: Annotated[
        bool, typer.Option("--again", help="Measure anew what was measured before.")
    ] = False,
    engine: Annotated[
        str | None,
        typer.Option(
            help="Also serve each folder with this engine and ask it: vllm, mlx-lm or llama.cpp.",
            metavar="NAME",
        ),
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(
            min=1, max=65535, help="Port of the engine; a free one if not given.", metavar="N"
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Check what was built; exits 1 if something is wrong.

    Files, structure, numbers against the source, and the running model.
    """
    if port is not None and engine is None:
        raise typer.BadParameter(
            "is that of an engine, and there is no --engine", param_hint="--port"
        )

    from rich.console import Console

    from carnice_build.commands.verify import VerifySettings, verify_variants
    from carnice_build.engines.check import EngineSettings
    from carnice_build.report.progress import CheckView
    from carnice_build.report.verify_table import check_lines, verify_json, verify_tables
    from carnice_build.verification.result import Check

    options = make_options(
        recipes=recipes,
        profile=profile,
        source=source,
        assignments=assignments,
        out=out,
        cache=cache,
        jobs=jobs,
    )
    console = Console(quiet=as_json, highlight=False, soft_wrap=True)

    with CheckView(Console(stderr=True)) as view:

        def listen(variant: str, check: Check) -> None:
            view.end()
            console.print(check_lines(variant, check))

        served = EngineSettings(engine, port) if engine else None
        settings = VerifySettings(run, text, samples, again=again, engine=served)
        result = verify_variants(variants, options, settings, listen, view.begin, view.step)
    if as_json:
        print_json(verify_json(result))
    for table in verify_tables(result):
        console.print(table)
    raise typer.Exit(0 if result.passed else 1)
