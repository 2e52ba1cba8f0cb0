"""`carnice cache stats|gc|verify`."""

from __future__ import annotations

import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from carnice_build.cli.arguments import CACHE, Cache, Json, print_json
from carnice_build.errors import RecipeError, StoreError
from carnice_build.units import format_size, parse_size, plural

app = typer.Typer(help="Look after the cache.", no_args_is_help=True)

_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


@app.command()
def stats(cache: Cache = CACHE, as_json: Json = False) -> None:
    """Show what the cache holds."""
    from carnice_build.store import upkeep
    from carnice_build.store.store import Store

    with Store(_existing(cache)) as store:
        found = upkeep.stats(store)
    if as_json:
        print_json(asdict(found))
        return
    typer.echo(f"{plural(found.packs, 'pack')}, {format_size(found.pack_bytes)}")
    typer.echo(
        f"  of them in build folders: {found.linked_packs}, {format_size(found.linked_bytes)}"
    )
    typer.echo(
        f"{plural(found.partial_packs, 'unfinished pack')}, {format_size(found.partial_bytes)}"
    )
    typer.echo(f"{plural(found.blobs, 'blob')}, {format_size(found.blob_bytes)}")
    typer.echo(
        f"{plural(found.actions, 'action')} remembered, "
        f"{format_size(found.record_bytes)} of records"
    )
    typer.echo(f"{plural(found.answers, 'answer')} of libraries, {format_size(found.answer_bytes)}")
    typer.echo(
        f"{plural(found.figures, 'figure')} of verifications, {format_size(found.figure_bytes)}"
    )


@app.command()
def gc(
    cache: Cache = CACHE,
    older_than: Annotated[
        str | None,
        typer.Option(
            help="Only what is older, e.g. 12h or 7d, and answers that no plan asked for since.",
            metavar="AGE",
        ),
    ] = None,
    max_size: Annotated[
        str | None, typer.Option(help="Only until the cache is this small.", metavar="SIZE")
    ] = None,
    as_json: Json = False,
) -> None:
    """Remove results that no built folder has files of; whoever needs them computes them again."""
    from carnice_build.store import upkeep
    from carnice_build.store.store import Store

    age = _age(older_than) if older_than is not None else None
    size = _size(max_size) if max_size is not None else None
    with Store(_existing(cache)) as store:
        removed = upkeep.collect(store, max_age=age, max_bytes=size)
    if as_json:
        print_json(asdict(removed))
        return
    typer.echo(f"removed {plural(removed.files, 'file')}, {format_size(removed.bytes)}")


@app.command()
def verify(cache: Cache = CACHE, as_json: Json = False) -> None:
    """Digest every pack again; what is damaged is named, and made good by the next build."""
    from carnice_build.store import upkeep
    from carnice_build.store.store import Store

    with Store(_existing(cache)) as store:
        damaged = upkeep.find_damage(store, lambda count: None)
    if as_json:
        print_json([asdict(item) for item in damaged])
    else:
        for item in damaged:
            what = ", ".join(item.tensors) or "not readable"
            typer.echo(f"{item.file}: damaged: {what}")
        typer.echo(plural(len(damaged), "damaged file"))
    if damaged:
        sys.exit(1)


def _existing(cache: Path) -> Path:
    if not cache.is_dir():
        raise StoreError("there is no cache", where=str(cache))
    return cache


def _age(text: str) -> float:
    match = re.fullmatch(r"(\d+)([smhd])", text)
    if not match:
        raise RecipeError(f"{text!r} is not an age such as 12h or 7d", where="--older-than")
    return float(int(match[1]) * _SECONDS[match[2]])


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise RecipeError(str(error), where="--max-size") from None
