"""What every attack is held to: bounded time and memory, and nothing touched but cache and build.

A plugin that the test modules name, because a second conftest.py would hide the first.
"""

from __future__ import annotations

import os
import resource
import signal
import sqlite3
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from conftest import Finished, Project

SECONDS = 15
BYTES = 2 * 2**30

Attack = Callable[..., Finished]
State = dict[str, tuple[int, int, int, str]]


def state_of(root: Path, spared: tuple[Path, ...]) -> State:
    """Everything below `root` but `spared`: mode, size, time and target; follows no link."""
    found: State = {}
    for folder, folders, files in os.walk(root):
        here = Path(folder)
        folders[:] = [name for name in folders if here / name not in spared]
        for path in (here / name for name in (*folders, *files)):
            stat = path.lstat()
            target = str(path.readlink()) if path.is_symlink() else ""
            is_folder = path.is_dir() and not target
            time_ns = 0 if is_folder else stat.st_mtime_ns
            found[str(path)] = (stat.st_mode, 0 if is_folder else stat.st_size, time_ns, target)
    return found


@contextmanager
def limits(seconds: float) -> Iterator[None]:
    """At most 2 GB more of address space, where the system keeps that limit, and some seconds."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise AssertionError(f"still busy after {seconds} s")

    old = resource.getrlimit(resource.RLIMIT_AS)
    if sys.platform == "linux":
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + BYTES, old[1]))
    handler = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, old)


@pytest.fixture
def attack(project: Project, carnice: Callable[..., Finished]) -> Attack:
    """`attack("build", "mlx-4bit")`: as `carnice`, within `limits`, and everything else intact."""

    def run(*arguments: object, seconds: float = SECONDS) -> Finished:
        root, spared = project.root.parent, (project.cache, project.out)
        before = state_of(root, spared)
        with limits(seconds):
            finished = carnice(*arguments)

        assert before == state_of(root, spared), "something outside of cache and build changed"
        assert "Traceback" not in finished.err
        return finished

    return run


def check_named(finished: Finished, *parts: str, code: int | None = 2) -> None:
    """The last thing said is printable and holds `parts`, and its exit code (None: 1 or 2).

    It is one line, or a headline and an indented line for each of several problems.
    """
    _, found, said = f"\n{finished.err}".rpartition("\ncarnice: ")
    _, *problems = said.splitlines()

    assert found
    assert all(line.startswith("  ") for line in problems)
    assert said.replace("\n", "").isprintable()
    assert len(said) < 3_000
    for part in parts:
        assert part in f"carnice: {said}"
    assert finished.code in ((1, 2) if code is None else (code,))


class RawRecords:
    """The action cache's database, for writing what `Records` never would."""

    def __init__(self, project: Project) -> None:
        self._path = project.cache / "records" / "cache.db"

    def run(self, statement: str, *values: Any) -> list[Any]:
        """Rows of a statement."""
        with closing(sqlite3.connect(self._path)) as database, database:
            return database.execute(statement, values).fetchall()


def differing(expected: dict[str, bytes], actual: dict[str, bytes]) -> list[str]:
    """Names whose bytes differ, or that only one of the two has."""
    return sorted(
        name for name in expected.keys() | actual.keys() if expected.get(name) != actual.get(name)
    )
