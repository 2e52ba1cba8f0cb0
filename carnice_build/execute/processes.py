"""Worker processes, in which ops that bring a large library run on files."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from multiprocessing.queues import SimpleQueue
from typing import Any, Self, cast

from carnice_build.errors import BackendError, CarniceError
from carnice_build.graph import Action, BadInput, NonFiniteValue, ProcessOp
from carnice_build.system import peak_memory, wait_briefly
from carnice_build.tensor_file import TensorFile

_PAUSE = 1.0


class LocalRunner:
    """A pool of processes on this machine, started when the first action needs one."""

    def __init__(self, count: int, stepped: Callable[[int], None]) -> None:
        """At most `count` at once.

        `stepped` is called, from another thread, with a worker's peak RSS after every step.
        """
        self._count = count
        self._stepped = stepped
        self._pool: ProcessPoolExecutor | None = None
        self._steps: SimpleQueue[int | None] | None = None
        self._listener: threading.Thread | None = None
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is None:
            return
        self._pool.shutdown(cancel_futures=True)
        assert self._steps is not None
        assert self._listener is not None
        self._steps.put(None)
        self._listener.join()

    def run(
        self, action: Action, inputs: Sequence[TensorFile], outputs: Sequence[TensorFile]
    ) -> None:
        """See `Runner.run`."""
        try:
            self._started().submit(_work, action.op, action.params, inputs, outputs).result()
        except BrokenProcessPool:
            # After Ctrl-C, which reaches workers too, the main thread shall be the first to speak.
            time.sleep(_PAUSE)
            raise BackendError(
                f"the worker process for {action.op.name} died; out of memory?"
            ) from None

    def _started(self) -> ProcessPoolExecutor:
        with self._lock:
            if self._pool is None:
                context = get_context("spawn")
                self._steps = context.SimpleQueue()
                self._listener = threading.Thread(target=self._listen, daemon=True)
                self._listener.start()
                self._pool = ProcessPoolExecutor(
                    self._count, context, initializer=_connect, initargs=(self._steps,)
                )
            return self._pool

    def _listen(self) -> None:
        assert self._steps is not None
        while (memory := self._steps.get()) is not None:
            self._stepped(memory)


_steps: SimpleQueue[int | None] | None = None
"""In a worker: where it tells of its steps."""


def _connect(steps: SimpleQueue[int | None]) -> None:
    global _steps
    _steps = steps
    # That an optional library is missing is no news to whoever runs a build.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # On import it prints to standard output, which is the build's.
    os.environ.setdefault("LLM_COMPRESSOR_LOG_DISABLED", "true")
    wait_briefly()
    # Ctrl-C reaches workers, too: they go without a word, which is for the main process to say.
    # A build in the background, which ignores it, has workers that do.
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """The pool ends its workers unless its process was killed; they would then wait forever."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(op: Any, params: Any, inputs: Any, outputs: Any) -> None:
    try:
        cast(ProcessOp, op).run(params, inputs, outputs, _progress)
    except (CarniceError, NonFiniteValue, BadInput, OSError, KeyboardInterrupt):
        raise
    except BaseException as error:  # a panic in Rust is no Exception
        raise BackendError(f"{op.name} failed: {type(error).__name__}: {error}") from error


def _progress() -> None:
    assert _steps is not None
    _steps.put(peak_memory())
