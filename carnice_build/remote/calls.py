"""Calls to a remote: tried again, and never waited for without end."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, TypeVar

PATIENCE = 30.0
"""Seconds in which a request has to be answered, beside the time that its bytes take."""

LEAST_RATE = 100_000
"""Bytes a second that each request has to bring, or the remote is too slow to be of use."""

ATTEMPTS = 4
FIRST_WAIT = 0.5
"""Seconds before the second attempt, twice as many before each further one."""

_FINAL = (401, 403, 407)
_ABSENT = (404, 410, 416)

T = TypeVar("T")


class RemoteFailure(Exception):
    """Something that a remote did not do; its text is a clause for people."""


class Missing(RemoteFailure):
    """There is no such object."""


class Refused(RemoteFailure):
    """The remote forbids it, or wants to know who asks."""


class GivenUp(RemoteFailure):
    """The remote is of no use any more: too slow, or failing one request after another."""


class Crew:
    """Threads for calls that may never return; the process does not wait for them at its end."""

    _member = threading.local()

    def __init__(self, width: int) -> None:
        self._width = width
        self._calls: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        self._threads = 0

    @classmethod
    def is_member(cls) -> bool:
        """Whether the current thread is one of them, whose calls are waited for already."""
        return getattr(cls._member, "here", False)

    def submit(self, call: Callable[[], T]) -> Future[T]:
        """Have a thread make a call."""
        if self._threads < self._width:
            self._threads += 1
            threading.Thread(target=self._work, name="carnice-remote", daemon=True).start()
        future: Future[T] = Future()
        self._calls.put((future, call))
        return future

    def close(self) -> None:
        """Let go of those that wait for calls."""
        for _ in range(self._threads):
            self._calls.put(None)

    def _work(self) -> None:
        self._member.here = True
        while (item := self._calls.get()) is not None:
            future, call = item
            try:
                future.set_result(call())
            except BaseException as error:
                future.set_exception(error)


def time_for(count: int) -> float:
    """Seconds in which a call that moves so many bytes has to end."""
    return PATIENCE + count / LEAST_RATE


def patiently(call: Callable[[], T]) -> T:
    """What `call` returns, called again after failures that may pass."""
    for attempt in range(ATTEMPTS):
        try:
            return call()
        except RemoteFailure:
            raise
        except Exception as error:
            failure = worded(error)
            if isinstance(failure, Refused | Missing) or attempt == ATTEMPTS - 1:
                raise failure from None
            time.sleep(FIRST_WAIT * 2**attempt)
    raise AssertionError("an attempt returns or raises")


def worded(error: Exception) -> RemoteFailure:
    """The error of a driver in our words: its own may hold addresses with keys in them."""
    kind = type(error).__name__
    if "Credential" in kind or "TokenNotFound" in kind:
        return Refused("wants credentials, and there are none here")
    status = _status(error)
    if isinstance(error, PermissionError) or status in _FINAL or "Authentication" in kind:
        return Refused("forbids it")
    if isinstance(error, FileNotFoundError) or status in _ABSENT:
        return Missing("lacks an object")
    if status:
        return RemoteFailure(f"answered {status}")
    if isinstance(error, OSError) and error.errno:
        return RemoteFailure(f"failed: {os.strerror(error.errno)}")
    return RemoteFailure(f"failed ({kind})")


def _status(error: Exception) -> int | None:
    """The HTTP status behind a driver's error, if it says so."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        found = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    else:
        found = getattr(response, "status_code", None) or getattr(error, "status", None)
    return found if type(found) is int else None
