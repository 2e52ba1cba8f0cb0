"""Remotes in commands: which one, whether it answers, and what goes to and from it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from carnice_build.commands.options import Options
from carnice_build.errors import StoreError
from carnice_build.execute.events import Listener, Moved, Moving, Notice
from carnice_build.planning.planner import VariantPlan
from carnice_build.store.store import Store

# A build without a remote loads nothing of what follows.
if TYPE_CHECKING:
    from carnice_build.execute.fetching import Fetched
    from carnice_build.remote.config import RemoteConfig
    from carnice_build.remote.index import Index
    from carnice_build.remote.remote import Remote
    from carnice_build.remote.signing import Signer
    from carnice_build.remote.upload import Pushed


def remote_access(options: Options) -> RemoteAccess | None:
    """The remote that the options, the environment or `carnice.toml` name; None without one.

    StoreError when what they say is not valid, or cannot do what is asked.
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
    access = RemoteAccess(config, config.url, options.push or config.push, options.cache)
    if access.pushes:
        access.check_push()
    return access


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

    def check_push(self) -> None:
        """StoreError for a URL that cannot be opened, or without a key: before hours of work."""
        from carnice_build.remote.objects import Objects

        Objects(self.url).close()
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
        from carnice_build.remote.objects import RemoteFailure, shown

        try:
            with self.opened() as remote:
                return RemoteView(remote.name, remote.index, tuple(remote.complaints))
        except RemoteFailure as failure:
            return RemoteView(shown(self.url), None, (f"it {failure}",))

    def fetch(
        self, variants: Sequence[VariantPlan], store: Store, jobs: int, listen: Listener
    ) -> Fetched | None:
        """Take over what the remote has; None when it does not answer, which is told."""
        from carnice_build.execute.fetching import fetch
        from carnice_build.remote.objects import RemoteFailure, shown

        try:
            with self.opened() as remote:
                for complaint in remote.complaints:
                    listen(Notice(f"{remote.name}: {complaint}"))
                return fetch(variants, store, remote, jobs, listen)
        except RemoteFailure as failure:
            listen(Notice(f"{shown(self.url)}: the remote {failure}: going on without it"))
            return None

    def push(self, variants: Sequence[VariantPlan], store: Store, listen: Listener) -> Pushed:
        """Put what the remote lacks of these variants, which are built."""
        from carnice_build.execute.pushing import holdings
        from carnice_build.remote.objects import Objects
        from carnice_build.remote.upload import push

        bodies, files = holdings(variants, store)
        objects = Objects(self.url)
        try:
            return push(
                objects,
                bodies,
                files,
                self.signer(),
                lambda total: listen(Moving(f"pushing to {objects.name}", total)),
                lambda count: listen(Moved(count)),
            )
        finally:
            objects.close()
