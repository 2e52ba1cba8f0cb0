"""Models are run in a process of their own: one model in memory, and a crash is an answer."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from threading import Thread
from types import TracebackType
from typing import Any, Self, TypeVar

from carnice_build.errors import BackendError, CarniceError
from carnice_build.system import wait_briefly

T = TypeVar("T")


@dataclass(frozen=True)
class Step:
    """How far a call is: `done` of `total` of `what`, as in "24 answers"."""

    what: str
    done: int
    total: int


Told = Callable[[Step], None]


def installed(library: str) -> bool:
    """True when `library` can be imported."""
    return importlib.util.find_spec(library) is not None


class Worker:
    """A process while the block is open, started by the first call; anew if it dies."""

    def __init__(self, told: Told = lambda step: None) -> None:
        """`told` hears, from another thread, of each step of a call; see `tell`."""
        self._told = told
        self._pool: ProcessPoolExecutor | None = None
        self._listener: Thread | None = None
        self._line: Connection | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None and self._line is not None:
            # Nobody waits for the rest of a call that may take an hour.
            with suppress(OSError):
                self._line.send(None)
        self._end()

    def call(self, function: Callable[..., T], *arguments: Any) -> T:
        """What `function`, one of a module's, gives in the process.

        BackendError with whatever it raises, and when the process dies.
        """
        try:
            return self.ask(function, *arguments)
        except CarniceError as error:
            raise BackendError(str(error)) from None

    def ask(self, function: Callable[..., T], *arguments: Any) -> T:
        """As `call`, for what is no run of a model: errors of ours stay what they are."""
        try:
            if self._pool is None:
                return self._started(function, arguments)
            return self._pool.submit(_work, function, arguments).result()
        except BrokenProcessPool:
            self._end()
            raise BackendError("the process that ran the model died; out of memory?") from None

    def _started(self, function: Callable[..., T], arguments: tuple[Any, ...]) -> T:
        context = get_context("spawn")
        self._line, other = context.Pipe()
        # The process begins with the first call, which hands it the other end.
        with other:
            pool = ProcessPoolExecutor(
                1, mp_context=context, initializer=_prepare, initargs=(other,)
            )
            self._pool = pool
            found = pool.submit(_work, function, arguments)
        self._listener = Thread(target=_listen, args=(self._line, self._told), daemon=True)
        self._listener.start()
        return found.result()

    def _end(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        if self._listener is not None:
            self._listener.join()
        self._pool = self._listener = self._line = None


class Workers:
    """The process that runs models while the block is open, for one library after the other.

    Whatever a library keeps is there for the next model; when another library's turn comes, the
    process ends, so that no two hold memory.
    """

    def __init__(self, told: Told = lambda step: None) -> None:
        """`told` is that of `Worker`."""
        self._told = told
        self._library = ""
        self._worker = Worker(told)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._worker.__exit__(kind, error, trace)

    def of(self, library: str) -> Worker:
        """The process in which `library` is imported."""
        if library != self._library:
            self._worker.__exit__(None, None, None)
            self._library, self._worker = library, Worker(self._told)
        return self._worker


_told: Connection | None = None
"""In a worker: where it tells of its steps."""


def tell(what: str, done: int, total: int) -> None:
    """Say how far the function is that runs in a worker; elsewhere, nothing."""
    if _told is not None:
        _told.send(Step(what, done, total))


def _listen(line: Connection, told: Told) -> None:
    """Until the process has ended, with which its end is closed."""
    with line:
        while True:
            try:
                step = line.recv()
            except (EOFError, OSError):
                return
            told(step)


def _prepare(line: Connection) -> None:
    global _told
    _told = line
    Thread(target=_end_when_told, args=(line,), daemon=True).start()
    # A folder must be complete in itself; nothing may be looked up on the hub.
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")
    wait_briefly()


def _end_when_told(line: Connection) -> None:
    """At once, and also when the process that waits for us was killed: its end is closed then."""
    with suppress(EOFError, OSError):
        line.recv()
    os._exit(1)


def _work(function: Callable[..., T], arguments: tuple[Any, ...]) -> T:
    try:
        return function(*arguments)
    except CarniceError:
        raise
    except Exception as error:
        # Whatever a library finds wrong with the folder is our result.
        raise BackendError(f"{type(error).__name__}: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:300]
