"""`carnice build`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from carnice_build.cli.arguments import (
    CACHE,
    OUT,
    RECIPES,
    Cache,
    Devices,
    Jobs,
    Json,
    Memory,
    Out,
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
from carnice_build.cli.ending import named
from carnice_build.errors import RecipeError
from carnice_build.units import format_size, plural

if TYPE_CHECKING:
    from carnice_build.commands.build import BuildResult
    from carnice_build.commands.cluster import ClusterResult
    from carnice_build.commands.options import Options
    from carnice_build.commands.parts import PartResult
    from carnice_build.execute.events import Listener


def build(
    variants: Variants,
    recipes: Recipes = RECIPES,
    profile: Profile = None,
    stream: Stream = False,
    source: Source = None,
    assignments: Set = None,
    out: Out = OUT,
    cache: Cache = CACHE,
    jobs: Jobs = None,
    memory: Memory = "2GB",
    devices: Devices = None,
    remote: Remote = None,
    push: Annotated[
        bool, typer.Option("--push", help="Put into the remote what it lacks of these variants.")
    ] = False,
    part: Annotated[
        str | None,
        typer.Option(
            help="Do the I-th of N parts of the work and push it; a build without this, anywhere, "
            "makes the folders of what all parts pushed.",
            metavar="I/N",
        ),
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            help="Have parts of the work done by a Ray cluster, whose nodes push them: `auto` for "
            "the one of this machine, or an address.",
            metavar="ADDRESS",
        ),
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(
            help="Write what ran when, for chrome://tracing or ui.perfetto.dev.", metavar="FILE"
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Build variants into OUT/<variant>, redoing only what changed."""
    from rich.console import Console

    from carnice_build.execute.events import Event
    from carnice_build.report.progress import progress_view
    from carnice_build.report.trace import TraceRecorder

    options = make_options(
        recipes=recipes,
        profile=profile,
        stream=stream,
        source=source,
        assignments=assignments,
        out=out,
        cache=cache,
        jobs=jobs,
        memory=memory,
        devices=devices,
        remote=remote,
        push=push,
    )
    if trace is not None:
        _check_writable(trace)
    recorder = TraceRecorder()
    with progress_view(Console(stderr=True)) as view:

        def listen(event: Event) -> None:
            view(event)
            recorder(event)

        result = _build(variants, options, part, ray, listen)
    if trace is not None:
        with named(trace):
            recorder.write(trace)
    _tell(result, as_json=as_json)


def _build(
    variants: list[str],
    options: Options,
    part: str | None,
    ray: str | None,
    listen: Listener,
) -> BuildResult | PartResult | ClusterResult:
    """Build here, a part of it, or with a cluster, as is asked for."""
    if part is not None and ray is not None:
        raise RecipeError("a part is one machine's", where="--part", expected="no --ray with it")
    if part is not None:
        from carnice_build.commands.parts import build_part, part_of

        return build_part(variants, part_of(part), options, listen)
    if ray is not None:
        from carnice_build.commands.cluster import build_on_cluster

        return build_on_cluster(variants, ray, options, listen)
    from carnice_build.commands.build import build_variants

    return build_variants(variants, options, listen)


def _tell(result: BuildResult | PartResult | ClusterResult, *, as_json: bool) -> None:
    from carnice_build.commands.build import BuildResult
    from carnice_build.commands.parts import PartResult

    if as_json:
        print_json(asdict(result))
    elif isinstance(result, PartResult):
        _tell_part(result)
    elif isinstance(result, BuildResult):
        _tell_build(result)
    else:
        _tell_build(result.build)
        _tell_nodes(result)


def _tell_build(result: BuildResult) -> None:
    for item in result.variants:
        state = "built" if item.packaged else "up to date"
        typer.echo(
            f"{item.variant}: {state}, {plural(item.actions_run, 'action')} run, "
            f"{item.actions_reused} reused, {format_size(item.size)}, "
            f"{item.bits_per_weight:.2f} bits per weight"
        )
    typer.echo(
        f"read {format_size(result.read_bytes)}, wrote {format_size(result.written_bytes)} in "
        f"{result.seconds:.1f} s, peak memory {format_size(result.peak_memory)}"
    )
    if result.fetched_bytes or result.pushed_bytes:
        typer.echo(
            f"fetched {format_size(result.fetched_bytes)} from the remote, "
            f"pushed {format_size(result.pushed_bytes)}"
        )


def _tell_nodes(result: ClusterResult) -> None:
    if not result.parts:
        return
    run = sum(part.actions_run for part in result.parts)
    read = sum(part.read_bytes for part in result.parts)
    pushed = sum(part.pushed_bytes for part in result.parts)
    typer.echo(
        f"{plural(result.nodes, 'node')} did {plural(len(result.parts), 'part')} in "
        f"{result.seconds:.1f} s: {plural(run, 'action')} run, read {format_size(read)}, "
        f"pushed {format_size(pushed)}"
    )


def _tell_part(done: PartResult) -> None:
    typer.echo(
        f"part {done.part} of {done.parts}: {plural(done.actions_run, 'action')} run, "
        f"{done.actions - done.actions_run} done already"
    )
    typer.echo(
        f"read {format_size(done.read_bytes)}, fetched {format_size(done.fetched_bytes)}, "
        f"pushed {format_size(done.pushed_bytes)} in {done.seconds:.1f} s"
    )


def _check_writable(trace: Path) -> None:
    """Find out before the work whether its trace can be written; leaves what is there."""
    try:
        with trace.open("ab"):
            pass
    except OSError as error:
        raise RecipeError(
            f"cannot be written: {error.strerror}", where=f"--trace {trace}"
        ) from None
