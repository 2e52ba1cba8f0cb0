"""How a run of the command line ends: with an exit code and, unless all went well, one sentence.

Errors of the system that nobody put into words nearer to where they happened are put here.
A fault of our own keeps its traceback, and says that it is one.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path
from types import FrameType
from typing import NoReturn

import typer

from carnice_build.cli.streams import forget_unwritten, prepare_streams
from carnice_build.errors import BuildError, CarniceError, StoreError

INTERRUPTED = 128 + signal.SIGINT
TERMINATED = 128 + signal.SIGTERM
_FAILED = 1

_STOPPED = {
    INTERRUPTED: "interrupted; what was finished is in the cache",
    TERMINATED: "terminated; what was finished is in the cache",
}

_BAD_PLACE = {
    errno.EACCES,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EPERM,
    errno.EROFS,
}
"""Errors of a file or folder that another one, named in its place, would not have."""


def prepare() -> None:
    """Make the streams safe to print to, and a polite kill an orderly end."""
    prepare_streams()
    main = threading.current_thread() is threading.main_thread()
    if main and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _terminate)


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Name the file in an error of the system, which does not when a write fails."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(TERMINATED)


def ending(work: Callable[[], object]) -> int:
    """Do `work`, and say how it ended if not well; returns the exit code."""
    try:
        return _ending(work)
    finally:
        forget_unwritten()


def _ending(work: Callable[[], object]) -> int:
    try:
        try:
            work()
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if code in _STOPPED:
            _say(_STOPPED[code])
        return code
    except KeyboardInterrupt:
        _say(_STOPPED[INTERRUPTED])
        return INTERRUPTED
    except BrokenPipeError:  # whoever read the output has seen enough
        return _FAILED
    except CarniceError as error:
        return _refuse(error)
    except OSError as error:
        return _refuse(_worded(error))
    except MemoryError:
        return _refuse(BuildError("there is not enough memory", expected="a smaller --memory"))
    except Exception:
        with suppress(OSError):
            traceback.print_exc()
        _say(f"this is a bug in carnice-build; please report it with the lines above{_tracker()}")
        return _FAILED
    return 0


def _refuse(error: CarniceError) -> int:
    _say(str(error))
    return error.exit_code


def _worded(error: OSError) -> CarniceError:
    """The system's error as one of ours: of the place that was named, or of the work there."""
    where = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else None
    what = error.strerror or str(error) or type(error).__name__
    return (StoreError if error.errno in _BAD_PLACE else BuildError)(what, where=where)


def _say(sentence: str) -> None:
    with suppress(OSError):
        typer.echo(f"carnice: {sentence}", err=True)


def _tracker() -> str:
    """Where the package says that its bugs go."""
    with suppress(PackageNotFoundError):
        for entry in metadata("carnice-build").get_all("Project-URL") or ():
            label, _, address = entry.partition(", ")
            if label.lower() in ("issues", "bugs", "bug tracker"):
                return f" to {address}"
    return ""
