"""The process in which models run tells how far it is, and may die."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from carnice_build.errors import BackendError
from carnice_build.verification.process import Step, Worker, Workers, tell


def test_steps_come_out_of_the_process_and_no_thread_stays() -> None:
    """In their order, all of them before the block ends."""
    heard: list[Step] = []
    threads = set(threading.enumerate())
    with Worker(heard.append) as worker:
        for done in range(3):
            worker.call(tell, "names read", done + 1, 3)

    assert [Step("names read", done, 3) for done in (1, 2, 3)] == heard
    assert threads == set(threading.enumerate())


def test_a_process_that_died_is_followed_by_another() -> None:
    """Its call is an error, the next one runs."""
    with Worker() as worker:
        first = worker.call(os.getpid)
        with pytest.raises(BackendError, match="died"):
            worker.call(os._exit, 1)

        assert first != worker.call(os.getpid)


def work_long(done: str) -> None:
    """Say that a call runs, and much later make a file."""
    tell("calls begun", 1, 1)
    time.sleep(20)
    Path(done).touch()


def test_nobody_waits_for_a_call_that_is_interrupted(tmp_path: Path) -> None:
    """It ends with the block, be it an hour from its own end."""
    done = tmp_path / "done"

    def interrupt(step: Step) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    # Where tests run in the background of a shell, the signal is ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), Worker(interrupt) as worker:
            worker.call(work_long, str(done))
    finally:
        signal.signal(signal.SIGINT, before)

    assert not done.exists()


_KILLED = """
import os, sys
from carnice_build.verification.process import Worker
from test_worker import work_long
if __name__ == "__main__":
    with Worker(lambda step: os.kill(os.getpid(), 9)) as worker:
        worker.call(work_long, sys.argv[1])
"""


def test_a_process_does_not_outlive_the_one_that_was_killed(tmp_path: Path) -> None:
    """It has gone when standard output, which both have, is closed."""
    script = tmp_path / "killed.py"
    script.write_text(_KILLED)
    paths = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    finished = subprocess.run(
        [sys.executable, script, tmp_path / "done"],
        env=os.environ | {"PYTHONPATH": paths},
        stdout=subprocess.PIPE,
        timeout=100,
        check=False,
    )

    assert -signal.SIGKILL == finished.returncode
    assert not (tmp_path / "done").exists()


def test_a_library_keeps_its_process_until_another_is_asked_for() -> None:
    """So it is imported once for all variants, and no two hold memory."""
    with Workers() as workers:
        torch = [workers.of("torch").call(os.getpid) for _ in range(2)]
        mlx = workers.of("mlx_lm").call(os.getpid)
        with pytest.raises(ProcessLookupError):
            os.kill(torch[0], 0)

    assert 1 == len(set(torch))
    assert mlx not in torch


def test_whoever_is_no_worker_tells_nobody() -> None:
    """What runs in a worker can be called anywhere."""
    tell("layers", 1, 8)
