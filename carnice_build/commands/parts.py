"""Building a part of some variants on one of several machines that meet in a remote."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from carnice_build.commands.build import check_sources, execute_locally
from carnice_build.commands.options import Options
from carnice_build.commands.plan import Plan, plan_variants
from carnice_build.commands.remote import RemoteAccess, required_access
from carnice_build.commands.rows import check_rows
from carnice_build.errors import RecipeError
from carnice_build.execute.events import Listener, Notice
from carnice_build.planning.status import survey
from carnice_build.store.files import io_errors_named
from carnice_build.store.store import Store

if TYPE_CHECKING:
    from carnice_build.commands.remote import Publish
    from carnice_build.execute.parts import Part


@dataclass(frozen=True)
class PartResult:
    """What a part's machine did: of its `actions` it ran `actions_run`, the others were done."""

    part: int
    parts: int
    actions: int
    actions_run: int
    read_bytes: int
    fetched_bytes: int
    pushed_bytes: int
    seconds: float


def part_of(text: str) -> Part:
    """The part that `text`, as 2/3, names; RecipeError when there is none such."""
    from carnice_build.execute.parts import Part

    number, slash, count = text.partition("/")
    digits = all(item.isascii() and item.isdigit() for item in (number, count))
    if not (slash and digits and 1 <= int(number) <= int(count)):
        raise RecipeError(f"{text!r} is no part", where="--part", expected="I/N, from 1/N to N/N")
    return Part(int(number), int(count))


def build_part(
    names: Sequence[str],
    part: Part,
    options: Options,
    listen: Listener = lambda event: None,
    publish: Publish | None = None,
) -> PartResult:
    """Do the work of one part, as far as nobody has done it, and push what came of it.

    No folder is made: a build without a part, anywhere, takes over what all parts pushed.
    With `publish`, that takes the batches, for another machine to sign.
    Raises StoreError without a remote to push to, and whatever a build raises.
    """
    start = time.perf_counter()
    access = required_access(options)
    if not access.pushes:
        raise RecipeError("a part is for others", where="--part", expected="--push with it")
    access.check_push(signs=publish is None)
    plan = plan_variants(names, options)
    check_rows(plan.variants)
    check_sources(plan.variants, options, listen)
    with Store(options.cache) as store, io_errors_named(store.root), store.in_use():
        return _build(plan, part, access, store, options, listen, publish, start)


def _build(
    plan: Plan,
    part: Part,
    access: RemoteAccess,
    store: Store,
    options: Options,
    listen: Listener,
    publish: Publish | None,
    start: float,
) -> PartResult:
    from carnice_build.execute.parts import members_of

    mine = members_of(part, plan.variants, plan.graph)
    fetched = access.fetch_inputs(plan.variants, mine, store, listen)
    status = fetched.status if fetched else survey(plan.variants, store)
    outcome = execute_locally(plan, status, store, options, listen, mine)
    if not mine:
        listen(Notice(f"{part} has nothing to do"))
    pushed = access.push(plan.variants, store, listen, partial=True, publish=publish)
    return PartResult(
        part=part.number,
        parts=part.count,
        actions=sum(action.identity in mine for action in plan.graph),
        actions_run=len(outcome.made),
        read_bytes=outcome.read_bytes,
        fetched_bytes=fetched.bytes if fetched else 0,
        pushed_bytes=pushed.bytes,
        seconds=time.perf_counter() - start,
    )
