"""What a node of a Ray cluster does of a build: one part, by the code that does it at home.

A node has its own cache, below Ray's folder for the session, and meets the others in the remote.
"""

from __future__ import annotations

import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from carnice_build.commands.options import Options
from carnice_build.commands.parts import PartResult, build_part
from carnice_build.errors import CarniceError, CheckpointError, PlanError
from carnice_build.execute.events import Advanced, Event, Notice, Stepped
from carnice_build.execute.parts import Part
from carnice_build.extras import PACKAGE
from carnice_build.keys import library_version
from carnice_build.processor import gpus, vector_instructions
from carnice_build.remote.batches import Body
from carnice_build.remote.config import CONFIG
from carnice_build.store.locks import Taken, locked
from carnice_build.version import __version__

PROCESSOR, GPUS = "processor", "GPUs"
"""Facts of a machine that keys hold beside the versions of libraries."""

RECIPES = "recipes"
"""The folder of recipes in what travels to the nodes, beside `carnice.toml`."""

_OWN: Mapping[str, Callable[[], str]] = {
    PACKAGE: lambda: __version__,
    PROCESSOR: vector_instructions,
    GPUS: lambda: ", ".join(gpus()) or "none",
}

_REPORT_SECONDS = 0.5


@dataclass(frozen=True)
class Errand:
    """What is to be built, the same for all of its `parts`.

    `facts` are those that a node must share; `local` names what the variants need of the project's
    folder, which is `root` on every node.
    """

    variants: tuple[str, ...]
    parts: int
    options: Options
    facts: Mapping[str, str]
    root: Path
    local: tuple[str, ...]


@dataclass(frozen=True)
class Answer:
    """What came of a part on a node: a result, and what is to be signed of it; or an error.

    `node` is for people, `node_id` for Ray.
    """

    node: str
    node_id: str
    result: PartResult | None = None
    bodies: tuple[Body, ...] = ()
    error: CarniceError | None = None


@dataclass(frozen=True)
class Report:
    """How far a part is: bytes that are read, steps, a worker's memory, what there is to say."""

    read_bytes: int = 0
    steps: int = 0
    memory: int = 0
    notices: tuple[str, ...] = ()


class Board:
    """The last report of each part; an actor, where nodes write and the driver reads."""

    def __init__(self) -> None:
        self._reports: dict[int, Report] = {}

    def put(self, part: int, report: Report) -> None:
        """Note how far a part is; one that is begun again starts from nothing."""
        self._reports[part] = report

    def read(self) -> dict[int, Report]:
        """All of them."""
        return self._reports


def facts_of(names: Iterable[str]) -> dict[str, str]:
    """What this machine has of each name: a version, its processor, its GPUs."""
    return {name: _OWN[name]() if name in _OWN else library_version(name) for name in sorted(names)}


def do_part(errand: Errand, number: int, board: Any) -> Answer:
    """Do a part on this node; an error that is raised on purpose is part of the answer."""
    import ray

    context = ray.get_runtime_context()
    node_id = context.get_node_id()
    node = f"{socket.gethostname()}/{node_id[:6]}"
    session = Path(context.get_temp_dir()) / context.get_session_name()
    bodies: list[Body] = []
    try:
        _check(errand.facts)
        with (
            _own_folder(session / "carnice" / node_id) as folder,
            TemporaryDirectory(dir=folder) as project,
        ):
            options = options_here(errand, Path(project), folder / "cache")
            part, reporter = Part(number, errand.parts), _Reporter(board, number)
            result = build_part(errand.variants, part, options, reporter, bodies.extend)
    except CarniceError as error:
        return Answer(node, node_id, error=error)
    return Answer(node, node_id, result, tuple(bodies))


def _check(wanted: Mapping[str, str]) -> None:
    """PlanError unless this machine has what keys hold as the driver has it."""
    found = facts_of(wanted)
    for name, value in wanted.items():
        if found[name] != value:
            raise PlanError(
                f"this is {name} {found[name]}, and the machine that asks has {value}",
                expected="the same on all machines of a build",
            )


@contextmanager
def _own_folder(base: Path) -> Iterator[Path]:
    """A folder of this node that no other task has meanwhile: parts in one cache would wait."""
    with ExitStack() as held:
        for number in count():
            folder = base / str(number)
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            try:
                held.enter_context(locked(folder / "lock", wait=False))
            except Taken:
                continue
            yield folder
            return


def options_here(errand: Errand, project: Path, cache: Path) -> Options:
    """Those of the driver in a project of this node: what travelled, and links to what is here."""
    travelled = Path.cwd()
    shutil.copytree(travelled / RECIPES, project / RECIPES)
    shutil.copy(travelled / CONFIG, project / CONFIG)
    for name in errand.local:
        here = errand.root / name
        if not here.exists():
            raise CheckpointError(
                "is not on this node",
                where=str(here),
                expected="the same path on all nodes, or a profile that takes it from the hub",
            )
        if not (project / name).exists():
            (project / name).symlink_to(here)
    return replace(
        errand.options, recipes=project / RECIPES, cache=cache, out=cache.parent / "build"
    )


class _Reporter:
    """Sums up a part's events, and writes that on the board now and then."""

    def __init__(self, board: Any, part: int) -> None:
        self._board = board
        self._part = part
        self._report = Report()
        self._lock = threading.Lock()
        self._told = time.monotonic()
        board.put.remote(part, self._report)

    def __call__(self, event: Event) -> None:
        with self._lock:
            report = self._report
            match event:
                case Advanced():
                    report = replace(report, read_bytes=report.read_bytes + event.read_bytes)
                case Stepped():
                    report = replace(report, steps=report.steps + 1, memory=event.memory)
                case Notice():
                    report = replace(report, notices=(*report.notices, event.text))
                case _:
                    return
            self._report = report
            now = time.monotonic()
            if now - self._told >= _REPORT_SECONDS or isinstance(event, Notice):
                self._told = now
                # Nobody waits for it: a board that is gone costs a part nothing.
                self._board.put.remote(self._part, report)
