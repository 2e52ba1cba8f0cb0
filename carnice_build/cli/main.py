"""`carnice`: arguments in, tables and JSON out; everything else is in the layers below."""

from __future__ import annotations

import re
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from carnice_build.cli import cache
from carnice_build.cli.build import build
from carnice_build.cli.diff import diff
from carnice_build.cli.ending import ending, prepare
from carnice_build.cli.explain import explain
from carnice_build.cli.family import family
from carnice_build.cli.graph import graph
from carnice_build.cli.new import new
from carnice_build.cli.plan import plan
from carnice_build.cli.recipes import extras, list_variants, names, schema
from carnice_build.cli.report import report
from carnice_build.cli.verify import verify
from carnice_build.version import __version__


class Command(TyperCommand):
    """A command whose usage line spells its arguments as manuals do: NAME, [NAME], NAME..."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """The parts of the line."""
        return [
            re.sub(r"\{([^{}]*)\}", r"\1", piece).upper()
            for piece in super().collect_usage_pieces(ctx)
        ]


app = typer.Typer(
    name="carnice",
    help="Build quantized variants of language models from YAML recipes.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

for command in (new, build, plan, explain, verify, report, diff, graph, family):
    app.command(cls=Command)(command)
app.command(name="list", cls=Command)(list_variants)
app.command(cls=Command)(schema)
app.add_typer(cache.app, name="cache")
app.command(hidden=True)(extras)
app.command(hidden=True)(names)


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


def run() -> None:
    """Entry point: nothing leaves it but an exit code, as `ending` gives it."""
    prepare()
    sys.exit(ending(app))
