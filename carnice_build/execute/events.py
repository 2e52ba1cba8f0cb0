"""What a running build tells those who watch it; the executor knows no screen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Started:
    """Work begins: source bytes to read, bytes to write, actions, packs, steps of long work."""

    read_bytes: int
    write_bytes: int
    actions: int
    packs: int
    steps: int


@dataclass(frozen=True, slots=True)
class Advanced:
    """More source bytes are done."""

    read_bytes: int


@dataclass(frozen=True, slots=True)
class Stepped:
    """A step of long work is done in another process, which has held up to `memory` bytes."""

    memory: int


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of work: what, in which worker thread, when (seconds of `time.perf_counter`)."""

    name: str
    category: str
    thread: int
    start: float
    end: float
    read_bytes: int


@dataclass(frozen=True, slots=True)
class Notice:
    """Something a person may want to know: waiting for another build, a damaged pack."""

    text: str


@dataclass(frozen=True, slots=True)
class Packaged:
    """A variant's folder is complete."""

    variant: str
    folder: str


@dataclass(frozen=True, slots=True)
class Moving:
    """Bytes begin to be moved: what happens to them, and how many."""

    what: str
    total: int


@dataclass(frozen=True, slots=True)
class Moved:
    """More of these bytes are through."""

    count: int


Event = Started | Advanced | Stepped | Span | Notice | Packaged | Moving | Moved
Listener = Callable[[Event], None]
