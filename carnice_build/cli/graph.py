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


def graph(
    variants: Variants,
    recipes: Recipes = RECIPES,
    profile: Profile = "demo",
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
    """Show the action graph, folded by kind of module; Mermaid unless --svg is given."""
    from carnice_build.build.plan import plan_variants, survey_plan
    from carnice_build.report.graph_svg import svg as draw
    from carnice_build.report.graph_view import fold
    from carnice_build.report.graph_view import mermaid as write

    options = make_options(
        recipes=recipes, profile=profile, source=source, assignments=assignments, cache=cache
    )
    planned = plan_variants(variants, options)
    folded = fold(planned, survey_plan(planned, options))
    if svg is not None:
        title = f"{', '.join(variants)}: {len(planned.graph):,} actions"
        svg.write_text(draw(folded, title), encoding="utf-8")
    if mermaid is not None:
        mermaid.write_text(write(folded), encoding="utf-8")
    if svg is None and mermaid is None:
        typer.echo(write(folded), nl=False)
