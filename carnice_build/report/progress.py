"""Progress of a build: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import threading
import time
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from carnice_build.execute.events import (
    Advanced,
    Event,
    Moved,
    Moving,
    Notice,
    Packaged,
    Started,
    Stepped,
)
from carnice_build.units import format_size, plural
from carnice_build.verification.process import Step

_LINE_SECONDS = 5.0

_TELLING_STEPS = 8
"""Before so many steps nothing is said of what is left: the first ones compile and load."""

_STEPS_SECONDS = 600.0
"""Steps differ, so what is left follows from all that were made in this time."""


class ProgressView(Protocol):
    """Shows events; used as a context, and called with every event."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...

    def __call__(self, event: Event) -> None:
        """Show `event`."""


def progress_view(console: Console) -> ProgressView:
    """A bar when `console` is a terminal, plain lines when it is not."""
    return _Bar(console) if console.is_terminal else _Lines(console)


class _Bar:
    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=console,
        )
        self._task = self._progress.add_task("building", visible=False)
        self._moving: TaskID | None = None
        self._steps = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[memory]} in a worker"),
            speed_estimate_period=_STEPS_SECONDS,
        )
        self._calibrating = self._steps.add_task("calibrating", visible=False, memory="")
        self._live = Live(Group(self._progress, self._steps), console=console)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def __call__(self, event: Event) -> None:
        match event:
            case Started():
                self._progress.update(self._task, total=event.read_bytes, completed=0, visible=True)
                if event.steps:
                    self._steps.update(
                        self._calibrating, total=event.steps, completed=0, visible=True
                    )
            case Advanced():
                self._progress.advance(self._task, event.read_bytes)
            case Stepped():
                memory = format_size(event.memory)
                self._steps.update(self._calibrating, advance=1, memory=memory)
            case Moving():
                if self._moving is not None:
                    self._progress.remove_task(self._moving)
                self._moving = self._progress.add_task(
                    event.what, total=event.total, visible=event.total > 0
                )
            case Moved():
                if self._moving is not None:
                    self._progress.advance(self._moving, event.count)
            case Notice() | Packaged():
                self._live.console.print(describe(event), highlight=False, soft_wrap=True)
            case _:
                pass


class _Lines:
    def __init__(self, console: Console) -> None:
        self._console = console
        self._lock = threading.Lock()
        self._what = ""
        self._total = self._done = 0
        self._steps = self._stepped = 0
        self._start = self._last = self._last_step = self._first_step = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def __call__(self, event: Event) -> None:
        match event:
            case Started():
                self._steps, self._stepped = event.steps, 0
                self._begin("", event.read_bytes)
                self._last_step = self._start
                self._say(describe(event))
            case Advanced():
                self._advance(event.read_bytes)
            case Moving():
                self._begin(f"{event.what}: ", event.total)
                if event.total:
                    self._say(f"{event.what}: {format_size(event.total)}")
            case Moved():
                self._advance(event.count)
            case Stepped():
                self._step(event.memory)
            case Notice() | Packaged():
                self._say(describe(event))
            case _:
                pass

    def _say(self, text: str) -> None:
        self._console.print(text, highlight=False, soft_wrap=True, markup=False)

    def _begin(self, what: str, total: int) -> None:
        with self._lock:
            self._what, self._total, self._done = what, total, 0
            self._start = self._last = time.monotonic()

    def _advance(self, count: int) -> None:
        with self._lock:
            self._done += count
            now = time.monotonic()
            if now - self._last < _LINE_SECONDS:
                return
            self._last = now
            rate = self._done / max(now - self._start, 1e-9)
            left = max(0, self._total - self._done) / max(rate, 1e-9)
            text = (
                f"{self._what}{self._done / max(1, self._total):4.0%}  "
                f"{format_size(self._done)} of {format_size(self._total)}, "
                f"{format_size(rate)}/s, {left:.0f} s left"
            )
        self._say(text)

    def _step(self, memory: int) -> None:
        with self._lock:
            self._stepped += 1
            now = time.monotonic()
            if self._stepped == 1:
                self._first_step = now
            if now - self._last_step < _LINE_SECONDS:
                return
            self._last_step = now
            text = (
                f"calibrating: {self._stepped} of {self._steps} steps, "
                f"{format_size(memory)} in a worker"
            )
            if self._stepped >= _TELLING_STEPS:
                each = (now - self._first_step) / (self._stepped - 1)
                text += f", {max(0, each * (self._steps - self._stepped)):.0f} s left"
        self._say(text)


class CheckView:
    """Says which check of `carnice verify` runs: at once on a terminal, elsewhere if it goes on."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress: Progress | None = None
        self._text = ""
        self._timer: threading.Timer | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def begin(self, variant: str, check: str, done: int, total: int) -> None:
        """A check begins, before which so many of all were `done`."""
        text = f"{variant}  {check} ... ({done} of {total} checks done)"
        if not self._console.is_terminal:
            self._timer = threading.Timer(_LINE_SECONDS, self._say, [text])
            self._timer.daemon = True
            self._timer.start()
            return
        columns = TextColumn("{task.description}", markup=False), TimeElapsedColumn()
        self._progress = Progress(SpinnerColumn(), *columns, console=self._console, transient=True)
        self._text = text
        self._progress.add_task(text, total=None)
        self._progress.start()

    def step(self, step: Step) -> None:
        """Of the check that runs, so much is done; said on a terminal alone."""
        progress = self._progress
        if progress is not None:
            text = f"{self._text}  {step.done} of {step.total} {step.what}"
            progress.update(progress.task_ids[0], description=text)

    def end(self) -> None:
        """The check that runs, if there is one, is done."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _say(self, text: str) -> None:
        self._console.print(text, highlight=False, soft_wrap=True, markup=False)


def describe(event: Started | Notice | Packaged) -> str:
    """One line for a person."""
    if isinstance(event, Started):
        return (
            f"{plural(event.actions, 'action')}: reading {format_size(event.read_bytes)}, "
            f"writing {format_size(event.write_bytes)} in {plural(event.packs, 'shard')}"
        )
    if isinstance(event, Packaged):
        return f"{event.variant} is in {event.folder}"
    return event.text
