"""`carnice graph`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from carnice_build.cli.arguments import (
    CACHE,
    RECIPES,
    Cache,
    Profile,
    Recipes,
    Set,
    Source,
    Variants,
    make_options,
)
from carnice_build.cli.ending import named


def graph(
    variants: Variants,
    recipes: Recipes = RECIPES,
    profile: Profile = None,
    source: Source = None,
    assignments: Set = None,
    cache: Cache = CACHE,
    svg: Annotated[
        Path | None, typer.Option(help="Draw the graph into an SVG file.", metavar="FILE")
    ] = None,
    mermaid: Annotated[
        Path | None,
        typer.Option(help="Write Mermaid to a file, not to the screen.", metavar="FILE"),
    ] = None,
) -> None:
    """Draw what a build does, as text in Mermaid or as SVG.

    From sources through actions to shards, folded to fit a screen.
    """
    from carnice_build.commands.plan import plan_and_survey
    from carnice_build.report.graph_fold import fold
    from carnice_build.report.graph_mermaid import mermaid as write
    from carnice_build.report.graph_svg import svg as draw

    options = make_options(
        recipes=recipes, profile=profile, source=source, assignments=assignments, cache=cache
    )
    result = plan_and_survey(variants, options)
    folded = fold(result.plan, result.status)
    if svg is not None:
        title = f"{', '.join(variants)}: {len(result.plan.graph):,} actions"
        with named(svg):
            svg.write_text(draw(folded, title), encoding="utf-8")
    if mermaid is not None:
        with named(mermaid):
            mermaid.write_text(write(folded), encoding="utf-8")
    if svg is None and mermaid is None:
        typer.echo(write(folded), nl=False)
