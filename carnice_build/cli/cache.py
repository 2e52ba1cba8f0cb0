"""`carnice cache stats|gc|verify|push|pull`; keys are in `keys`."""

from __future__ import annotations

import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from carnice_build.cli import keys
from carnice_build.cli.arguments import (
    CACHE,
    RECIPES,
    Cache,
    Jobs,
    Json,
    Profile,
    Recipes,
    Remote,
    Set,
    Source,
    Stream,
    Variants,
    make_options,
    print_json,
)
from carnice_build.commands.options import Options
from carnice_build.errors import RecipeError, StoreError, printable
from carnice_build.units import format_size, parse_size, plural

app = typer.Typer(help="Look after the cache, and what of it is shared.", no_args_is_help=True)
app.add_typer(keys.app, name="keys")

_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


OfRemote = Annotated[
    str | None, typer.Option("--remote", help="Of this remote, not of the cache.", metavar="URL")
]


@app.command()
def stats(
    cache: Cache = CACHE,
    remote: OfRemote = None,
    recipes: Recipes = RECIPES,
    as_json: Json = False,
) -> None:
    """Show what the cache holds, or a remote."""
    from carnice_build.store import upkeep
    from carnice_build.store.store import Store

    if remote is not None:
        _remote_stats(make_options(recipes=recipes, cache=cache, remote=remote), as_json)
        return

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


def _remote_stats(options: Options, as_json: bool) -> None:
    from carnice_build.commands.remote import remote_stats

    found = remote_stats(options)
    if as_json:
        print_json(asdict(found))
        return
    typer.echo(f"{plural(found.packs, 'pack')}, {format_size(found.pack_bytes)}")
    typer.echo(f"{plural(found.blobs, 'blob')}, {format_size(found.blob_bytes)}")
    typer.echo(
        f"{found.believed} of {found.batches} batches believed, "
        f"{format_size(found.batch_bytes)}: {plural(found.actions, 'action')}, "
        f"{format_size(found.needed_bytes)} of packs and blobs"
    )
    typer.echo(f"variants: {printable(', '.join(found.variants)) or 'none'}")
    for notice in found.notices:
        typer.echo(printable(notice))


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
    remote: OfRemote = None,
    recipes: Recipes = RECIPES,
    as_json: Json = False,
) -> None:
    """Remove results that no built folder has files of; whoever needs them computes them again.

    From a remote, what was last pushed longer ago than --older-than.
    """
    from carnice_build.store import upkeep
    from carnice_build.store.store import Store

    age = _age(older_than) if older_than is not None else None
    size = _size(max_size) if max_size is not None else None
    if remote is not None:
        _remote_gc(make_options(recipes=recipes, cache=cache, remote=remote), age, size, as_json)
        return
    with Store(_existing(cache)) as store:
        removed = upkeep.collect(store, max_age=age, max_bytes=size)
    if as_json:
        print_json(asdict(removed))
        return
    typer.echo(f"removed {plural(removed.files, 'file')}, {format_size(removed.bytes)}")


def _remote_gc(options: Options, age: float | None, size: int | None, as_json: bool) -> None:
    from carnice_build.commands.remote import collect_remote

    if age is None or size is not None:
        raise RecipeError(
            "a remote is collected by age alone", where="--remote", expected="--older-than AGE"
        )
    removed = collect_remote(options, age)
    if as_json:
        print_json(asdict(removed))
        return
    typer.echo(f"removed {plural(removed.files, 'object')}, {format_size(removed.bytes)}")


@app.command()
def push(
    variants: Variants,
    recipes: Recipes = RECIPES,
    profile: Profile = None,
    source: Source = None,
    assignments: Set = None,
    cache: Cache = CACHE,
    remote: Remote = None,
    as_json: Json = False,
) -> None:
    """Put what was built of variants into the remote, as `build --push` does."""
    from rich.console import Console

    from carnice_build.commands.plan import plan_variants
    from carnice_build.commands.remote import push_variants
    from carnice_build.report.progress import progress_view

    options = make_options(
        recipes=recipes,
        profile=profile,
        source=source,
        assignments=assignments,
        cache=_existing(cache),
        remote=remote,
    )
    with progress_view(Console(stderr=True)) as view:
        pushed = push_variants(plan_variants(variants, options), options, view)
    if as_json:
        print_json(asdict(pushed))
        return
    typer.echo(
        f"pushed {plural(pushed.objects, 'object')}, {format_size(pushed.bytes)}; "
        f"{pushed.present} were there"
    )


@app.command()
def pull(
    variants: Variants,
    recipes: Recipes = RECIPES,
    profile: Profile = None,
    stream: Stream = False,
    source: Source = None,
    assignments: Set = None,
    cache: Cache = CACHE,
    jobs: Jobs = None,
    remote: Remote = None,
    as_json: Json = False,
) -> None:
    """Take what the remote has of variants into the cache, and build nothing."""
    from rich.console import Console

    from carnice_build.commands.plan import plan_variants
    from carnice_build.commands.remote import pull_variants
    from carnice_build.report.progress import progress_view

    options = make_options(
        recipes=recipes,
        profile=profile,
        stream=stream,
        source=source,
        assignments=assignments,
        cache=cache,
        jobs=jobs,
        remote=remote,
    )
    with progress_view(Console(stderr=True)) as view:
        pulled = pull_variants(plan_variants(variants, options), options, view)
    if as_json:
        print_json(asdict(pulled))
        return
    for item in pulled.variants:
        state = "complete" if item.complete else f"{plural(item.missing_actions, 'action')} to run"
        typer.echo(f"{item.variant}: {state}")
    typer.echo(f"fetched {plural(pulled.tensors, 'tensor')}, {format_size(pulled.bytes)}")


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
