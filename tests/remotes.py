"""Caches that meet in a remote, and remotes that misbehave.

A plugin that the test modules name, because a second conftest.py would hide the first.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from conftest import Project

fsspec = pytest.importorskip("fsspec")
pytest.importorskip("cryptography")

from fsspec.implementations.local import LocalFileSystem  # noqa: E402

from carnice_build.commands.build import BuildResult, build_variants  # noqa: E402
from carnice_build.commands.options import Options  # noqa: E402
from carnice_build.execute.events import Event, Notice  # noqa: E402
from carnice_build.remote import calls  # noqa: E402
from carnice_build.remote.signing import Signer, new_key, read_key  # noqa: E402


@dataclass
class Behaviour:
    """What `odd://` does of the local folder that it shows; `calls` counts what it was asked.

    A hook gets what is asked (`connect`, `read`, `list`, `put`, `remove`) and the path, before.
    `changed` alters what a read gives.
    """

    hooks: list[Callable[[str, str], None]] = field(default_factory=list)
    changed: Callable[[str, bytes], bytes] = lambda path, content: content
    calls: Counter[str] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def asked(self, what: str, path: str) -> None:
        with self.lock:
            self.calls[what] += 1
        for hook in self.hooks:
            hook(what, path)


BEHAVIOUR = Behaviour()


class OddFiles(LocalFileSystem):  # type: ignore[misc]
    """A folder behind `odd://`, as its `BEHAVIOUR` wants it."""

    protocol = "odd"

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        BEHAVIOUR.asked("connect", "")

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(path).removeprefix("odd://")

    def cat_file(self, path: str, start: Any = None, end: Any = None, **options: Any) -> bytes:
        BEHAVIOUR.asked("read", path)
        return BEHAVIOUR.changed(path, super().cat_file(path, start=start, end=end, **options))

    def find(self, path: str, **options: Any) -> Any:
        BEHAVIOUR.asked("list", path)
        return super().find(path, **options)

    def pipe_file(self, path: str, value: bytes, **options: Any) -> None:
        BEHAVIOUR.asked("put", path)
        super().pipe_file(path, value, **options)

    def rm_file(self, path: str) -> None:
        BEHAVIOUR.asked("remove", path)
        super().rm_file(path)


fsspec.register_implementation("odd", OddFiles, clobber=True)


@pytest.fixture
def behaviour(monkeypatch: pytest.MonkeyPatch) -> Iterator[Behaviour]:
    """What `odd://` does, at first what it should; waits between attempts are short."""
    monkeypatch.setattr(calls, "FIRST_WAIT", 0.001)
    BEHAVIOUR.__dict__.update(Behaviour().__dict__)
    yield BEHAVIOUR
    BEHAVIOUR.__dict__.update(Behaviour().__dict__)


@dataclass(frozen=True)
class Team:
    """Machines of a project: a cache and an output folder each, and one remote for all."""

    project: Project
    folder: Path
    key: Path

    @property
    def url(self) -> str:
        """The remote."""
        return f"file://{self.folder}"

    @property
    def odd(self) -> str:
        """The same one, behind whatever `Behaviour` there is."""
        return f"odd://{self.folder}"

    @property
    def signer(self) -> Signer:
        """Whose key all machines have."""
        signer = read_key(self.key)
        assert signer is not None
        return signer

    def options(self, machine: str, **changes: Any) -> Options:
        """Those of a machine."""
        places = {"cache": self.project.root / machine / "cache"}
        places |= {"out": self.project.root / machine / "build"}
        return self.project.options(**({"remote": self.url} | places | changes))

    def build(self, machine: str, *variants: str, **changes: Any) -> Built:
        """Build variants (mlx-4bit if none is named) on a machine."""
        events: list[Event] = []
        result = build_variants(
            variants or ["mlx-4bit"], self.options(machine, **changes), events.append
        )
        return Built(result, [event.text for event in events if isinstance(event, Notice)])

    def output(self, machine: str) -> dict[str, bytes]:
        """Every file that a machine built."""
        root = self.project.root / machine / "build"
        return {
            str(path.relative_to(root)): path.read_bytes()
            for path in sorted(root.rglob("*"))
            if path.is_file() and not path.name.startswith(".")
        }

    def objects(self, folder: str) -> list[Path]:
        """The objects in a folder of the remote."""
        return sorted(path for path in (self.folder / folder).rglob("*") if path.is_file())


@dataclass(frozen=True)
class Built:
    """What a build did and said."""

    result: BuildResult
    notices: list[str]

    @property
    def counts(self) -> tuple[int, bool]:
        """Actions that were run, and whether anything was fetched."""
        return self.result.actions_run, self.result.fetched_bytes > 0


@pytest.fixture
def team(project: Project, monkeypatch: pytest.MonkeyPatch) -> Team:
    """Machines that share a key, a checkpoint and an empty remote."""
    monkeypatch.delenv("CARNICE_REMOTE", raising=False)
    monkeypatch.setenv("CARNICE_KEY", str(project.root / "keys" / "key.pem"))
    key = project.root / "keys" / "key.pem"
    new_key(key)
    return Team(project, project.root / "remote", key)


@pytest.fixture
def pushed(team: Team) -> Team:
    """The same, after machine `one` built mlx-4bit and pushed it."""
    team.build("one", push=True)
    return team


def refusing(
    what: str, error: Callable[[], Exception], part: str = ""
) -> Callable[[str, str], None]:
    """A hook that raises for one kind of call, on paths that hold `part`."""

    def hook(asked: str, path: str) -> None:
        if asked == what and part in path:
            raise error()

    return hook


def slow(what: str, seconds: float, part: str = "") -> Callable[[str, str], None]:
    """A hook that waits before one kind of call."""

    def hook(asked: str, path: str) -> None:
        if asked == what and part in path:
            time.sleep(seconds)

    return hook


class Answered(Exception):
    """An HTTP server's refusal, as drivers raise them."""

    def __init__(self, status: int) -> None:
        super().__init__(f"https://user:SECRET@bucket answered {status}")
        self.status = status


def full() -> OSError:
    """What a disk that is full answers."""
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
