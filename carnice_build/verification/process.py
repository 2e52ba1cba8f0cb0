"""Models are run in a process of their own: one model in memory, and a crash is an answer."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from types import TracebackType
from typing import Any, TypeVar

from carnice_build.errors import BackendError, CarniceError

T = TypeVar("T")


def installed(library: str) -> bool:
    """True when `library` can be imported."""
    return importlib.util.find_spec(library) is not None


class Worker:
    """A fresh process while the block is open."""

    def __enter__(self) -> Worker:
        self._pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._pool.shutdown(cancel_futures=True)

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
            return self._pool.submit(_work, function, arguments).result()
        except BrokenProcessPool:
            raise BackendError("the process that ran the model died; out of memory?") from None


def _work(function: Callable[..., T], arguments: tuple[Any, ...]) -> T:
    # A folder must be complete in itself; nothing may be looked up on the hub.
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")
    try:
        return function(*arguments)
    except CarniceError:
        raise
    except Exception as error:
        # Whatever a library finds wrong with the folder is our result.
        raise BackendError(f"{type(error).__name__}: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:300]
