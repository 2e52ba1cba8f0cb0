"""Arguments that several commands share, and how they become options."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from carnice_build.commands.options import DEFAULT_MEMORY, Options
from carnice_build.errors import RecipeError
from carnice_build.units import parse_size

RECIPES = Path("recipes")
CACHE = Path("cache")
OUT = Path("build")


def complete_variant(incomplete: str) -> list[str]:
    """Names of recipes that begin so, for the shell."""
    names = [path.stem for path in RECIPES.glob("*.yaml") if not path.name.startswith("_")]
    return sorted(name for name in names if name.startswith(incomplete))


Variants = Annotated[
    list[str],
    typer.Argument(
        help="Names of recipes, as `carnice list` shows them.", autocompletion=complete_variant
    ),
]
Recipes = Annotated[Path, typer.Option(help="Folder of the recipes.", metavar="DIR")]
Profile = Annotated[
    str | None,
    typer.Option(
        help="A section of RECIPES/_profiles.yaml, which says where each model is taken from, as "
        "demo or full; the first with all of a recipe's models if not given.",
        metavar="NAME",
    ),
]
Source = Annotated[
    list[str] | None,
    typer.Option(
        "--source",
        help="Take the recipe's source NAME (most have one, `body`) from a folder on this machine.",
        metavar="NAME=DIR",
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="Change a recipe's value, e.g. quantize.bits=5; KEY+=VALUE appends to a list.",
        metavar="KEY=VALUE",
    ),
]
Out = Annotated[
    Path, typer.Option(help="Where the model folders are, one a variant.", metavar="DIR")
]
Cache = Annotated[
    Path, typer.Option(help="Folder of the cache, which keeps what was computed.", metavar="DIR")
]
Jobs = Annotated[
    int | None,
    typer.Option(min=1, help="Worker threads; as many as cores if not given.", metavar="N"),
]
Memory = Annotated[
    str,
    typer.Option(
        help="Most memory that weights take while they are worked on, e.g. 4GB.", metavar="SIZE"
    ),
]
Devices = Annotated[
    str | None,
    typer.Option(
        help="GPUs that compute where a recipe says `calibration: {device: cuda}`, e.g. 0,1; all "
        "that there are if not given.",
        metavar="N,N",
    ),
]
Stream = Annotated[
    bool,
    typer.Option("--stream", help="Read weights on the hub without putting them on disk."),
]
Remote = Annotated[
    str | None,
    typer.Option(
        "--remote",
        help="Take results from, e.g., s3://BUCKET/PATH; carnice.toml or CARNICE_REMOTE if not "
        "given, and none if empty.",
        metavar="URL",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def make_options(
    *,
    recipes: Path,
    profile: str | None = None,
    stream: bool = False,
    source: list[str] | None = None,
    assignments: list[str] | None = None,
    out: Path = OUT,
    cache: Path = CACHE,
    jobs: int | None = None,
    memory: str = str(DEFAULT_MEMORY),
    devices: str | None = None,
    remote: str | None = None,
    push: bool = False,
) -> Options:
    """The options that the arguments mean; RecipeError for an argument that cannot be read."""
    fallback = Options()
    try:
        budget = parse_size(memory)
    except ValueError as error:
        raise RecipeError(str(error), where="--memory") from None
    return Options(
        recipes=recipes,
        profile=profile,
        stream=stream,
        sources=dict(_source(item) for item in source or ()),
        overrides=tuple(assignments or ()),
        out=out,
        cache=cache,
        jobs=jobs or fallback.jobs,
        memory=budget,
        devices=None if devices is None else _numbers(devices),
        remote=remote,
        push=push,
    )


def _source(text: str) -> tuple[str, Path]:
    name, separator, folder = text.partition("=")
    if not (name and separator and folder):
        raise RecipeError(f"{text!r} is not NAME=DIR", where="--source")
    return name, Path(folder)


def _numbers(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if len({*parts}) < len(parts) or not all(part.isascii() and part.isdigit() for part in parts):
        raise RecipeError(f"{text!r} are no GPUs", where="--devices", expected="such as 0 or 0,1")
    return tuple(map(int, parts))


def print_json(value: Any) -> None:
    """One JSON object on one line of standard output."""
    typer.echo(json.dumps(value, default=str))
