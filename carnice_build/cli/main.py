"""`carnice`: arguments in, tables and JSON out; everything else is in the layers below."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from carnice_build import __version__
from carnice_build.build.options import DEFAULT_MEMORY, Options
from carnice_build.errors import CarniceError, RecipeError
from carnice_build.units import format_size, parse_size

INTERRUPTED = 130

app = typer.Typer(
    name="carnice",
    help="Build quantized variants of language models from YAML recipes.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Variants = Annotated[
    list[str], typer.Argument(help="Names of recipes, as `carnice list` shows them.")
]
Recipes = Annotated[Path, typer.Option(help="Folder of the recipes.", metavar="DIR")]
Profile = Annotated[str, typer.Option(help="Which checkpoints the recipes' models mean.")]
Source = Annotated[
    list[str] | None,
    typer.Option("--source", help="Take source NAME from a local checkpoint.", metavar="NAME=DIR"),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="Change a recipe's value, e.g. quantize.bits=5; KEY+=VALUE appends to a list.",
        metavar="KEY=VALUE",
    ),
]
Cache = Annotated[Path, typer.Option(help="Folder of the cache.", metavar="DIR")]
Jobs = Annotated[
    int | None, typer.Option(min=1, help="Worker threads; the number of cores if not given.")
]
Memory = Annotated[
    str, typer.Option(help="Buffers of all workers together, e.g. 4GB.", metavar="SIZE")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def _options(
    *,
    recipes: Path,
    profile: str = "demo",
    source: list[str] | None = None,
    assignments: list[str] | None = None,
    out: Path = Path("build"),
    cache: Path = Path("cache"),
    jobs: int | None = None,
    memory: str = str(DEFAULT_MEMORY),
) -> Options:
    fallback = Options()
    try:
        budget = parse_size(memory)
    except ValueError as error:
        raise RecipeError(str(error), where="--memory") from None
    return Options(
        recipes=recipes,
        profile=profile,
        sources=dict(_source(item) for item in source or ()),
        overrides=tuple(assignments or ()),
        out=out,
        cache=cache,
        jobs=jobs or fallback.jobs,
        memory=budget,
    )


def _source(text: str) -> tuple[str, Path]:
    name, separator, folder = text.partition("=")
    if not (name and separator and folder):
        raise RecipeError(f"{text!r} is not NAME=DIR", where="--source")
    return name, Path(folder)


@app.command()
def build(
    variants: Variants,
    recipes: Recipes = Path("recipes"),
    profile: Profile = "demo",
    source: Source = None,
    assignments: Set = None,
    out: Annotated[Path, typer.Option(help="Folder of the outputs.", metavar="DIR")] = Path(
        "build"
    ),
    cache: Cache = Path("cache"),
    jobs: Jobs = None,
    memory: Memory = "2GB",
    trace: Annotated[
        Path | None, typer.Option(help="Write a Chrome trace of the work.", metavar="FILE")
    ] = None,
    as_json: Json = False,
) -> None:
    """Build variants into OUT/<variant>, redoing only what changed."""
    from rich.console import Console

    from carnice_build.build.build import build_variants
    from carnice_build.execute.events import Event
    from carnice_build.report.progress import progress_view
    from carnice_build.report.trace import TraceRecorder

    options = _options(
        recipes=recipes,
        profile=profile,
        source=source,
        assignments=assignments,
        out=out,
        cache=cache,
        jobs=jobs,
        memory=memory,
    )
    recorder = TraceRecorder()
    with progress_view(Console(stderr=True)) as view:

        def listen(event: Event) -> None:
            view(event)
            recorder(event)

        report = build_variants(variants, options, listen)
    if trace is not None:
        recorder.write(trace)
    if as_json:
        _print_json(asdict(report))
        return
    for item in report.variants:
        state = "built" if item.packaged else "up to date"
        typer.echo(
            f"{item.variant}: {state}, {item.actions_run} actions run, {item.actions_reused} "
            f"reused, {format_size(item.size)}, {item.bits_per_weight:.2f} bits per weight"
        )
    typer.echo(
        f"read {format_size(report.read_bytes)}, wrote {format_size(report.written_bytes)} in "
        f"{report.seconds:.1f} s, peak memory {format_size(report.peak_memory)}"
    )


@app.command()
def plan(
    variants: Variants,
    recipes: Recipes = Path("recipes"),
    profile: Profile = "demo",
    source: Source = None,
    assignments: Set = None,
    cache: Cache = Path("cache"),
    jobs: Jobs = None,
    memory: Memory = "2GB",
    as_json: Json = False,
) -> None:
    """Show what a build would do and make; reads headers only."""
    from carnice_build.build.plan import plan_variants, survey_plan
    from carnice_build.report.plan_table import plan_json, plan_view

    options = _options(
        recipes=recipes,
        profile=profile,
        source=source,
        assignments=assignments,
        cache=cache,
        jobs=jobs,
        memory=memory,
    )
    planned = plan_variants(variants, options)
    status = survey_plan(planned, options)
    if as_json:
        _print_json(plan_json(planned, status, options.memory, options.jobs))
        return
    from rich.console import Console

    Console().print(plan_view(planned, status, options.memory, options.jobs))


@app.command(name="list")
def list_command(recipes: Recipes = Path("recipes"), as_json: Json = False) -> None:
    """Show the variants that the recipes declare."""
    from carnice_build.build.plan import list_variants

    found = list_variants(_options(recipes=recipes))
    if as_json:
        _print_json({recipe.variant: recipe.description for recipe in found})
        return
    width = max((len(recipe.variant) for recipe in found), default=0)
    for recipe in found:
        typer.echo(f"{recipe.variant:{width}}  {recipe.description}")


@app.command()
def schema() -> None:
    """Print the JSON Schema of recipes, for editors."""
    from carnice_build.recipe.schema import json_schema
    from carnice_build.transforms.vocabulary import vocabulary

    _print_json(json_schema(vocabulary()))


@app.command(hidden=True)
def extras(variants: Variants, recipes: Recipes = Path("recipes"), assignments: Set = None) -> None:
    """Print the optional dependencies that building these variants needs, joined by commas."""
    from carnice_build.build.plan import extras_of

    typer.echo(",".join(extras_of(variants, _options(recipes=recipes, assignments=assignments))))


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"carnice-build {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Build quantized variants of language models from YAML recipes."""


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2, default=str))


def run() -> None:
    """Entry point: expected errors become one line and an exit code, never a traceback."""
    try:
        app()
    except CarniceError as error:
        typer.echo(f"carnice: {error}", err=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        typer.echo("carnice: interrupted; what was finished is in the cache", err=True)
        sys.exit(INTERRUPTED)
