"""Remotes in commands: which one, whether it answers, and what goes to and from it."""

from __future__ import annotations

import os
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from carnice_build.commands.options import Options
from carnice_build.errors import BuildError, StoreError
from carnice_build.execute.events import Listener, Moved, Moving, Notice
from carnice_build.planning.planner import VariantPlan
from carnice_build.planning.status import BuildStatus, Status, survey
from carnice_build.store.store import Store

# A build without a remote loads nothing of what follows.
if TYPE_CHECKING:
    from carnice_build.commands.plan import Plan
    from carnice_build.execute.fetching import Fetched
    from carnice_build.remote.batches import Body
    from carnice_build.remote.config import RemoteConfig
    from carnice_build.remote.index import Index
    from carnice_build.remote.remote import Remote
    from carnice_build.remote.signing import Signer
    from carnice_build.remote.upkeep import RemoteStats, Removed
    from carnice_build.remote.upload import Pushed

    Publish = Callable[[Iterable[Body]], None]


def remote_access(options: Options) -> RemoteAccess | None:
    """The remote that the options, the environment or `carnice.toml` name; None without one.

    StoreError when what they say is not valid, or there is none to push to.
    """
    from carnice_build.remote.config import URL_VARIABLE, config_path, read_config

    asked = options.remote or os.environ.get(URL_VARIABLE)
    if not asked and not os.path.lexists(config_path(options.recipes)):
        if options.push:
            raise _nowhere()
        return None
    config = read_config(options.recipes, options.remote)
    if config.url is None:
        if options.push:
            raise _nowhere()
        return None
    return RemoteAccess(config, config.url, options.push or config.push, options.cache)


def _nowhere() -> StoreError:
    return StoreError("there is no remote", where="--push", expected="--remote URL")


@dataclass(frozen=True)
class RemoteView:
    """A remote in a plan: its URL, what it has if it answered, and what there is to say of it."""

    name: str
    index: Index | None
    notices: tuple[str, ...]


@dataclass(frozen=True)
class RemoteAccess:
    """A remote that is configured, and whether builds push to it; nobody has asked it yet."""

    config: RemoteConfig
    url: str
    pushes: bool
    cache: Path

    @property
    def name(self) -> str:
        """Its URL, without what may be secret in it."""
        from carnice_build.remote.drivers import shown

        return shown(self.url)

    def check_push(self, *, signs: bool = True) -> None:
        """StoreError for a URL that cannot be opened, or without a key: before hours of work."""
        from carnice_build.remote.objects import Objects

        Objects(self.url).close()
        if signs:
            self.signer()

    def signer(self) -> Signer:
        """Who signs what is pushed."""
        from carnice_build.remote.signing import read_key

        signer = read_key(self.config.key)
        if signer is None:
            raise StoreError(
                "there is no key to sign with",
                where=str(self.config.key),
                expected="`carnice cache keys new`, once",
            )
        return signer

    @contextmanager
    def opened(self) -> Iterator[Remote]:
        """The remote, asked what it has; RemoteFailure when it does not answer."""
        from carnice_build.remote.objects import Objects
        from carnice_build.remote.remote import Remote

        objects = Objects(self.url)
        try:
            yield Remote(objects, self.trusted(), self.cache)
        finally:
            objects.close()

    def trusted(self) -> dict[str, str]:
        """The public keys that are believed: those that are listed, and one's own."""
        from carnice_build.remote.signing import read_key

        own = read_key(self.config.key)
        return ({own.public: "this machine"} if own else {}) | self.config.trusted

    def look(self) -> RemoteView:
        """What the remote has, for a plan."""
        from carnice_build.remote.calls import RemoteFailure

        try:
            with self.opened() as remote:
                return RemoteView(remote.name, remote.index, tuple(remote.complaints))
        except RemoteFailure as failure:
            return RemoteView(self.name, None, (f"it {failure}",))

    def fetch(
        self, variants: Sequence[VariantPlan], store: Store, jobs: int, listen: Listener
    ) -> Fetched | None:
        """Take over what the remote has; None when it has nothing, or gives none, which is told."""
        from carnice_build.execute.fetching import fetch
        from carnice_build.remote.calls import RemoteFailure

        try:
            with self.opened() as remote:
                for complaint in remote.complaints:
                    listen(Notice(f"{remote.name}: {complaint}"))
                return fetch(variants, store, remote, jobs, listen) if remote.bodies else None
        except RemoteFailure as failure:
            listen(Notice(f"{self.name}: the remote {failure}: going on without it"))
            return None

    def fetch_inputs(
        self,
        variants: Sequence[VariantPlan],
        mine: Container[str],
        store: Store,
        listen: Listener,
    ) -> Fetched | None:
        """As `fetch`, of what actions of `mine` are given alone.

        What the remote has counts as done.
        """
        from carnice_build.execute.fetching import fetch_inputs
        from carnice_build.remote.calls import RemoteFailure

        try:
            with self.opened() as remote:
                if not remote.bodies:
                    return None
                return fetch_inputs(variants, mine, store, remote, listen)
        except RemoteFailure as failure:
            listen(Notice(f"{self.name}: the remote {failure}: going on without it"))
            return None

    def push(
        self,
        variants: Sequence[VariantPlan],
        store: Store,
        listen: Listener,
        *,
        partial: bool = False,
        publish: Publish | None = None,
    ) -> Pushed:
        """Put what the remote lacks of these variants, which are built, or `partial`ly so.

        With `publish`, that takes the batches in the place of a key of this machine.
        """
        from carnice_build.execute.pushing import holdings
        from carnice_build.remote.objects import Objects
        from carnice_build.remote.upload import push

        bodies, files = holdings(variants, store, partial=partial)
        objects = Objects(self.url)
        try:
            pushed = push(
                objects,
                bodies,
                files,
                None if publish else self.signer(),
                lambda total: listen(Moving(f"pushing to {objects.name}", total)),
                lambda count: listen(Moved(count)),
            )
            if publish:
                publish(bodies.values())
            return pushed
        finally:
            objects.close()

    def publish(self, bodies: Iterable[Body]) -> None:
        """Sign what other machines say of objects that they have put."""
        from carnice_build.remote.objects import Objects
        from carnice_build.remote.upload import publish

        objects = Objects(self.url)
        try:
            publish(objects, bodies, self.signer())
        finally:
            objects.close()


@dataclass(frozen=True)
class PulledVariant:
    """What a variant has after a pull: whether all of it, and actions that a build would run."""

    variant: str
    complete: bool
    missing_actions: int


@dataclass(frozen=True)
class PullResult:
    """What came: tensors and their bytes, and how far that gets each variant."""

    tensors: int
    bytes: int
    variants: tuple[PulledVariant, ...]


def required_access(options: Options) -> RemoteAccess:
    """The remote; StoreError when there is none."""
    access = remote_access(options)
    if access is None:
        raise StoreError("there is no remote", expected="--remote URL, or one in carnice.toml")
    return access


def push_variants(plan: Plan, options: Options, listen: Listener) -> Pushed:
    """Put into the remote what it lacks of variants that are built.

    Raises StoreError for one that is not, BuildError when the remote does not take it.
    """
    access = required_access(replace(options, push=True))
    access.check_push()
    with Store(options.cache) as store, store.in_use():
        return access.push(plan.variants, store, listen)


def pull_variants(plan: Plan, options: Options, listen: Listener) -> PullResult:
    """Take over what the remote has of these variants, and build nothing."""
    access = required_access(options)
    with Store(options.cache) as store, store.in_use():
        fetched = access.fetch(plan.variants, store, options.jobs, listen)
        status = fetched.status if fetched else survey(plan.variants, store)
        variants = tuple(_pulled(variant, status) for variant in plan.variants)
        tensors, count = (fetched.tensors, fetched.bytes) if fetched else (0, 0)
        return PullResult(tensors, count, variants)


def _pulled(variant: VariantPlan, status: BuildStatus) -> PulledVariant:
    actions = {action.identity for action in variant.actions.values()}
    missing = sum(status.actions.get(item, Status.CACHED) is not Status.CACHED for item in actions)
    complete = all(layout.identity in status.finished for layout in variant.packs)
    return PulledVariant(variant.name, complete, missing)


def remote_stats(options: Options) -> RemoteStats:
    """Count what the remote holds; BuildError when it does not answer."""
    from carnice_build.remote.calls import RemoteFailure
    from carnice_build.remote.upkeep import stats

    access = required_access(options)
    try:
        with access.opened() as remote:
            return stats(remote)
    except RemoteFailure as failure:
        raise BuildError(f"the remote {failure}", where=access.name) from None


def collect_remote(options: Options, max_age: float) -> Removed:
    """Remove from the remote what nobody pushed for so many seconds."""
    from carnice_build.remote.objects import Objects
    from carnice_build.remote.upkeep import collect

    objects = Objects(required_access(options).url)
    try:
        return collect(objects, max_age)
    finally:
        objects.close()
