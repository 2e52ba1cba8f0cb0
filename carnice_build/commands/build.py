"""Building: plan, execute, package."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from resource import RUSAGE_CHILDREN, RUSAGE_SELF
from typing import TYPE_CHECKING

from carnice_build.calibration.tokens import Tokens
from carnice_build.checkpoint.model_dtype import with_dtype
from carnice_build.commands.collector import no_collections
from carnice_build.commands.findings import figures_for_card
from carnice_build.commands.options import Options
from carnice_build.commands.plan import Plan, plan_variants
from carnice_build.commands.remote import RemoteAccess, remote_access
from carnice_build.commands.rows import check_rows
from carnice_build.errors import CheckpointError, PlanError, together
from carnice_build.execute.events import Listener, Notice, Packaged, Stepped
from carnice_build.formats.card import published_as
from carnice_build.formats.variant import Shard, Variant
from carnice_build.keys import library_version
from carnice_build.package.files import render_files
from carnice_build.package.folder import (
    assemble,
    check_place,
    check_writable,
    is_current,
    make_executable,
)
from carnice_build.planning.explain import variant_facts
from carnice_build.planning.packaged import packaged_template, parents
from carnice_build.planning.planner import VariantPlan
from carnice_build.planning.status import BuildStatus, Contents, survey
from carnice_build.plugins import failures_blamed
from carnice_build.processor import all_gpus
from carnice_build.store.files import io_errors_named
from carnice_build.store.history import BuildRecord, add_build, write_history
from carnice_build.store.store import Store
from carnice_build.system import peak_memory

if TYPE_CHECKING:
    from carnice_build.execute.session import Outcome


@dataclass(frozen=True)
class BuiltVariant:
    """What became of one variant.

    `actions_run` and `actions_reused` count the actions behind this variant alone; an action
    that several variants of one build share is counted with each.
    `seconds` is the time that workers spent on those that were run; `key` is the folder's.
    """

    variant: str
    folder: Path
    actions_run: int
    actions_reused: int
    size: int
    bits_per_weight: float
    packaged: bool
    seconds: float
    key: str


@dataclass(frozen=True)
class BuildResult:
    """What a build did in all; `seconds` is wall clock, `peak_memory` in bytes of RSS.

    `fetched_bytes` and `pushed_bytes` are those of tensors that came from a remote and went there.
    """

    variants: tuple[BuiltVariant, ...]
    actions_run: int
    actions_reused: int
    read_bytes: int
    written_bytes: int
    seconds: float
    peak_memory: int
    fetched_bytes: int = 0
    pushed_bytes: int = 0


def build_variants(
    names: Sequence[str],
    options: Options | None = None,
    listen: Listener = lambda event: None,
    access: RemoteAccess | None = None,
) -> BuildResult:
    """Build the named variants into `options.out`, reusing whatever the cache has.

    `listen` is called with every event of `execute.events`, from several threads.
    Without `access` to a remote, the options say whether there is one.

    Raises a CarniceError; whatever was finished until then stays in the cache.
    """
    start = time.perf_counter()
    options = options or Options()
    access = access or remote_access(options)
    if access is not None and access.pushes:
        access.check_push()
    plan = plan_variants(names, options)
    check_rows(plan.variants)
    check_sources(plan.variants, options, listen)
    with (
        Store(options.cache) as store,
        io_errors_named(store.root),
        store.in_use() as everywhere,
    ):
        if not everywhere:
            listen(
                Notice(
                    f"{store.root} is on a file system without locks: "
                    "builds on other machines must not use it meanwhile"
                )
            )
        return _build(plan, options, access, store, listen, start)


def check_sources(variants: Sequence[VariantPlan], options: Options, listen: Listener) -> None:
    """Raise PlanError for a source that has no weights, or that the build would write into.

    `listen` hears what a person may want to know of each variant before the build.
    """
    for variant in variants:
        _check_buildable(variant)
        for text in variant.notices:
            listen(Notice(f"{variant.name}: {text}"))
        sources = [Path(source.checkpoint.where) for source in variant.sources.values()]
        check_place(options.out / variant.name, sources)


def _check_buildable(variant: VariantPlan) -> None:
    for source in variant.sources.values():
        if not source.checkpoint.buildable:
            raise PlanError(
                "is a shape file: it can be planned, but has no weights to build from",
                where=source.checkpoint.where,
            )


def _check_files(variant: VariantPlan) -> None:
    """Raise CheckpointError unless the files that are copied are what they are called."""
    where = variant.body.where
    if variant.damaged_files:
        raise together(
            variant.damaged_files,
            lambda item: CheckpointError(item[1], where=f"{where}/{item[0]}"),
            "holds files that are not what they are called",
            where,
        )


def _build(
    plan: Plan,
    options: Options,
    access: RemoteAccess | None,
    store: Store,
    listen: Listener,
    start: float,
) -> BuildResult:
    with no_collections():
        status = survey(plan.variants, store)
    made: dict[str, float] = {}
    read_bytes = written_bytes = fetched_bytes = pushed_bytes = 0
    if status.pending and access is not None:
        fetched = access.fetch(plan.variants, store, options.jobs, listen)
        if fetched is not None:
            status = fetched.status
            read_bytes, fetched_bytes = fetched.read_bytes, fetched.bytes
    packs = dict(status.finished)
    if status.pending:
        for variant in plan.variants:
            check_writable(options.out / variant.name)
            _check_files(variant)
        outcome = execute_locally(plan, status, store, options, listen)
        packs = outcome.packs
        made = outcome.seconds
        read_bytes, written_bytes = read_bytes + outcome.read_bytes, outcome.written_bytes
    built = tuple(
        _package(variant, packs, made, options, store, listen) for variant in plan.variants
    )
    seconds = time.perf_counter() - start
    _remember(plan, built, made, store, seconds)
    if access is not None and access.pushes:
        pushed_bytes = access.push(plan.variants, store, listen).bytes
    return BuildResult(
        variants=built,
        actions_run=len(made),
        actions_reused=len(plan.graph) - len(made),
        read_bytes=read_bytes,
        written_bytes=written_bytes,
        seconds=seconds,
        peak_memory=max(map(peak_memory, (RUSAGE_SELF, RUSAGE_CHILDREN))),
        fetched_bytes=fetched_bytes,
        pushed_bytes=pushed_bytes,
    )


def execute_locally(
    plan: Plan,
    status: BuildStatus,
    store: Store,
    options: Options,
    listen: Listener,
    only: Container[str] | None = None,
) -> Outcome:
    """Do on this machine what the survey `status` says, or of it what `only` names."""
    # Numpy and networkx are needed from here on; a build with nothing to do never pays.
    from carnice_build.execute.executor import LocalExecutor
    from carnice_build.execute.processes import LocalRunner
    from carnice_build.execute.session import execute

    gpus = all_gpus() if options.devices is None else options.devices
    executor = LocalExecutor(options.jobs, options.memory, len(gpus))
    with LocalRunner(options.jobs, lambda memory: listen(Stepped(memory)), gpus) as runner:
        return execute(plan.variants, status, plan.graph, store, executor, runner, listen, only)


@no_collections()
def _package(
    variant: VariantPlan,
    packs: dict[str, str],
    made: Mapping[str, float],
    options: Options,
    store: Store,
    listen: Listener,
) -> BuiltVariant:
    shards = [_shard(variant, index, packs, store) for index in range(len(variant.packs))]
    described = describe(variant, shards, _figures(variant, store))
    folder = options.out / variant.name
    with failures_blamed(variant.format):
        known = partial(figures_for_card, options.cache, variant.name)
        rendered = render_files(described, variant.format, known)
    stale = not is_current(folder, rendered.key, shards)
    if stale:
        check_writable(folder)
        _check_files(variant)
        facts = variant_facts(variant, Contents(store).digest)
        write_history(store.root, variant.name, facts)
        with io_errors_named(options.out):
            assemble(folder, shards, rendered.files)
        listen(Packaged(variant.name, str(folder)))
    else:
        # Modes are in no digest, and some ways of copying a folder lose them.
        make_executable(folder, rendered.others)
    actions = _identities(variant)
    return BuiltVariant(
        variant=variant.name,
        folder=folder,
        actions_run=len(actions & made.keys()),
        actions_reused=len(actions - made.keys()),
        size=variant.weights_bytes,
        bits_per_weight=variant.bits_per_weight,
        packaged=stale,
        seconds=sum(made[identity] for identity in actions & made.keys()),
        key=rendered.key,
    )


def _remember(
    plan: Plan,
    built: Sequence[BuiltVariant],
    made: Mapping[str, float],
    store: Store,
    elapsed: float,
) -> None:
    """Note for `carnice report` what the build did for each variant for which it did something."""
    behind = [_identities(variant) for variant in plan.variants]
    needed = Counter(identity for identities in behind for identity in identities)
    for variant, item, identities in zip(plan.variants, built, behind, strict=True):
        if not (item.packaged or item.actions_run):
            continue
        record = BuildRecord(
            key=item.key,
            actions=len(identities),
            run=item.actions_run,
            shared=sum(needed[identity] > 1 for identity in identities & made.keys()),
            seconds=item.seconds,
            elapsed=elapsed,
            variants=len(built),
        )
        add_build(store.root, variant.name, record)


def _identities(variant: VariantPlan) -> set[str]:
    return {action.identity for action in variant.actions.values()}


def _shard(variant: VariantPlan, index: int, packs: dict[str, str], store: Store) -> Shard:
    layout = variant.packs[index]
    pack = packs[layout.identity]
    record = store.pack_record(pack)
    assert record is not None, "a pack that was just finished is gone"
    tensors = [
        (slot.tensor.name, slot.tensor.ref.spec, digest)
        for slot, digest in zip(layout.slots, record.digests, strict=True)
    ]
    return Shard(layout.name, pack, store.pack_path(pack), layout.size, tensors)


def _figures(variant: VariantPlan, store: Store) -> dict[str, list[float]]:
    contents = Contents(store)
    found = {}
    for name, ref in variant.conversion.figures.items():
        digest = contents.digest(ref)
        values = store.records.figure(digest) if digest else None
        if values is not None:
            found[name] = values
    return found


def describe(
    variant: VariantPlan, shards: Sequence[Shard], figures: Mapping[str, Sequence[float]]
) -> Variant:
    recipe, dtype = variant.recipe, variant.conversion.dtype
    calibrated = any(isinstance(action.op, Tokens) for action in variant.actions.values())
    libraries = {library for action in variant.actions.values() for library in action.op.libraries}
    return Variant(
        name=variant.name,
        description=recipe.description,
        recipe=recipe.tree.plain(),
        card=recipe.card,
        sources=variant.sources,
        body=recipe.body,
        config=with_dtype(variant.config, dtype) if dtype else variant.config,
        tools={library: library_version(library) for library in sorted(libraries)},
        quantized=variant.conversion.quantized,
        stated=variant.conversion.stated,
        ignored=variant.conversion.ignored,
        parameters=variant.conversion.parameters,
        shards=shards,
        copied=dict(variant.files),
        architecture=variant.architecture,
        serve=_serve_files(variant),
        launch=_launch(variant),
        parents=parents(variant),
        template=packaged_template(variant),
        figures=figures,
        calibration=recipe.calibration if calibrated else None,
        dataset=variant.dataset if calibrated else None,
    )


def _launch(variant: VariantPlan) -> str:
    if variant.serving is None:
        return ""
    from carnice_build.serving.render import first_launch

    model = published_as(variant.recipe.card, variant.name)
    return first_launch(variant.recipe.package.serve[0], variant.serving, model)


def _serve_files(variant: VariantPlan) -> dict[str, bytes]:
    if variant.serving is None:
        return {}
    from carnice_build.serving.render import serve_all

    return serve_all(variant.recipe.package.serve, variant.serving)
