"""What is said while a build or a check runs."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from carnice_build.execute.events import Moved, Moving, Started, Stepped
from carnice_build.report import progress
from carnice_build.verification.process import Step


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        """In the place of `time.monotonic`."""
        return self.now


def test_a_first_step_says_nothing_of_those_that_follow(monkeypatch: pytest.MonkeyPatch) -> None:
    """It loads and compiles; later ones tell what is left by what they took themselves."""
    clock, file = Clock(), io.StringIO()
    monkeypatch.setattr(progress, "time", clock)
    started = Started(actions=1, read_bytes=0, write_bytes=0, packs=1, steps=384)
    with progress.progress_view(Console(file=file, width=200)) as view:
        view(started)
        clock.now += 66
        view(Stepped(10**9))
        for _ in range(20):
            clock.now += 6
            view(Stepped(10**9))
    lines = [line for line in file.getvalue().splitlines() if line.startswith("calibrating")]

    assert "calibrating: 1 of 384 steps, 1 GB in a worker" == lines[0]
    assert not any("left" in line for line in lines[:7])
    assert all(line.endswith(f", {6 * (384 - 8 - i)} s left") for i, line in enumerate(lines[7:]))


def test_a_check_that_runs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """At once on a terminal, until it is done; elsewhere in a line, where it takes a while."""
    plain, terminal = io.StringIO(), io.StringIO()
    for file, seconds in ((plain, 60.0), (plain, 0.0), (terminal, 60.0)):
        monkeypatch.setattr(progress, "_LINE_SECONDS", seconds)
        console = Console(file=file, width=80, force_terminal=file is terminal)
        with progress.CheckView(console) as view:
            view.begin("int4[a]", "fidelity", 7, 24)
            view.step(Step("names read", 12, 240))
            while file is plain and not seconds and not plain.getvalue():
                pass
            view.end()

    assert "int4[a]  fidelity ... (7 of 24 checks done)\n" == plain.getvalue()
    assert "int4[a]  fidelity ... (7 of 24 checks done)" in terminal.getvalue()
    assert "12 of 240 names read" in terminal.getvalue()


def test_bytes_that_are_moved_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """What happens to them, how many, and now and then how far that is; of none, nothing."""
    clock, file, terminal = Clock(), io.StringIO(), io.StringIO()
    monkeypatch.setattr(progress, "time", clock)
    for console in (
        Console(file=file, width=200),
        Console(file=terminal, width=200, force_terminal=True),
    ):
        with progress.progress_view(console) as view:
            view(Moving("pushing to x", 0))
            view(Moving("fetching from x", 4_000_000))
            clock.now += 10
            view(Moved(1_000_000))

    assert [
        "fetching from x: 4 MB",
        "fetching from x:  25%  1 MB of 4 MB, 100 kB/s, 30 s left",
    ] == file.getvalue().splitlines()
    assert "fetching from x" in terminal.getvalue()
    assert "pushing" not in terminal.getvalue()
