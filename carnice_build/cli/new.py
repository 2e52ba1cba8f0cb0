"""`carnice new`."""

from __future__ import annotations

from typing import Annotated

import typer

from carnice_build.cli.arguments import RECIPES, Json, Recipes, make_options, print_json
from carnice_build.errors import RecipeError
from carnice_build.extras import has_extra, pip_install
from carnice_build.units import format_size, plural


def complete_preset(incomplete: str) -> list[str]:
    """Names of presets that begin so, for the shell."""
    from carnice_build.recipe.presets import presets

    return [name for name in presets() if name.startswith(incomplete)]


def new(
    name: Annotated[
        str | None, typer.Argument(help="Name of the variant, and of its file.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--from", help="The model: on the hub, or a folder.", metavar="OWNER/MODEL|FOLDER"
        ),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            "--as",
            help="What it is to become; --list shows the presets.",
            metavar="PRESET",
            autocompletion=complete_preset,
        ),
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(
            help="What a calibrated preset learns from, in place of its own text on the hub.",
            metavar="FILE|FOLDER|OWNER/NAME",
        ),
    ] = None,
    show: Annotated[bool, typer.Option("--list", help="Show the presets.")] = False,
    recipes: Recipes = RECIPES,
    as_json: Json = False,
) -> None:
    """Write a recipe for a model, from a preset.

    Reads its config, headers and small files, and no weight.
    """
    from carnice_build.commands import new as command

    if show:
        _show(command.preset_descriptions(), as_json)
        return
    if name is None or model is None or preset is None:
        raise RecipeError("lacks an argument", where="new", expected="NAME --from ... --as ...")
    written = command.new_recipe(name, model, preset, make_options(recipes=recipes), dataset)
    size = sum(pack.size for pack in written.plan.packs)
    bits = written.plan.bits_per_weight
    profile = f" --profile {written.profile}" if written.profile else ""
    folder = "" if recipes == RECIPES else f" --recipes {recipes}"
    options = f"{folder}{profile}"
    commands = [f"carnice build {name}{options}", f"carnice verify {name}{options} --no-run"]
    lacking = [extra for extra in written.extras if not has_extra(extra)]
    if lacking:
        commands.insert(0, pip_install(",".join(lacking)))
    if as_json:
        facts = {"recipe": str(written.path), "found": list(written.found)}
        print_json({**facts, "size": size, "bits_per_weight": bits, "next": commands})
        return
    typer.echo(f"{written.path}: {model} as {preset}")
    for sentence in written.found:
        typer.echo(f"  {sentence}")
    shards = plural(len(written.plan.packs), "shard")
    typer.echo(f"  it will have {format_size(size)} in {shards}, {bits:.2f} bits per weight")
    typer.echo("next:")
    for line in commands:
        typer.echo(f"  {line}")


def _show(descriptions: dict[str, str], as_json: bool) -> None:
    if as_json:
        print_json(descriptions)
        return
    width = max(map(len, descriptions))
    for name, description in descriptions.items():
        typer.echo(f"{name:{width}}  {description}")
