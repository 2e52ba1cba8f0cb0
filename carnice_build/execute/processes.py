"""Worker processes, in which ops that bring a large library run on files."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context, parent_process
from multiprocessing.queues import SimpleQueue
from queue import Queue
from typing import Any, Self, cast

from carnice_build.errors import BackendError, CarniceError
from carnice_build.graph import ANY_GPU, Action, BadInput, NonFiniteValue, ProcessOp
from carnice_build.processor import visible_gpus
from carnice_build.system import peak_memory, wait_briefly
from carnice_build.tensor_file import TensorFile

_PAUSE = 1.0


class LocalRunner:
    """Processes on this machine, started when the first action needs one.

    What computes on a GPU has a process for each, which sees no other.
    """

    def __init__(
        self, count: int, stepped: Callable[[int], None], devices: Sequence[int] = (0,)
    ) -> None:
        """At most `count` at once on the processor, and one on each GPU of `devices`, by number.

        `stepped` is called, from another thread, with a worker's peak RSS after every step.
        """
        self._count = count
        self._stepped = stepped
        self._free: Queue[int] = Queue()
        for device in devices:
            self._free.put(device)
        self._pools: dict[int | None, ProcessPoolExecutor] = {}
        self._steps: SimpleQueue[int | None] | None = None
        self._listener: threading.Thread | None = None
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._steps is None:
            return
        for pool in self._pools.values():
            pool.shutdown(cancel_futures=True)
        assert self._listener is not None
        self._steps.put(None)
        self._listener.join()

    def run(
        self, action: Action, inputs: Sequence[TensorFile], outputs: Sequence[TensorFile]
    ) -> None:
        """See `Runner.run`."""
        try:
            with self._device(action) as device:
                pool = self._started(device)
                with _interrupts_held():
                    future = pool.submit(_work, action.op, action.params, inputs, outputs)
                future.result()
        except BrokenProcessPool:
            # After Ctrl-C, which reaches workers too, the main thread shall be the first to speak.
            time.sleep(_PAUSE)
            raise BackendError(
                f"the worker process for {action.op.name} died; out of memory?"
            ) from None

    @contextmanager
    def _device(self, action: Action) -> Iterator[int | None]:
        """The GPU that the action has to itself meanwhile, None for one that names its own."""
        if not action.wants_gpu:
            yield None
            return
        device = self._free.get()
        try:
            yield device
        finally:
            self._free.put(device)

    def _started(self, device: int | None) -> ProcessPoolExecutor:
        with self._lock:
            context = get_context("spawn")
            if self._steps is None:
                self._steps = context.SimpleQueue()
                self._listener = threading.Thread(target=self._listen, daemon=True)
                self._listener.start()
            if device not in self._pools:
                count = self._count if device is None else 1
                self._pools[device] = ProcessPoolExecutor(
                    count, context, initializer=_connect, initargs=(self._steps, device)
                )
            return self._pools[device]

    def _listen(self) -> None:
        assert self._steps is not None
        while (memory := self._steps.get()) is not None:
            self._stepped(memory)


_steps: SimpleQueue[int | None] | None = None
"""In a worker: where it tells of its steps."""

_device: int | None = None
"""In a worker: the number of the GPU that is its own."""


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Start no worker that Ctrl-C could reach before `_connect` says what it does there."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _connect(steps: SimpleQueue[int | None], device: int | None) -> None:
    global _steps, _device
    _steps, _device = steps, device
    if device is not None:
        _see_only(device)
    # That an optional library is missing is no news to whoever runs a build.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # On import it prints to standard output, which is the build's.
    os.environ.setdefault("LLM_COMPRESSOR_LOG_DISABLED", "true")
    wait_briefly()
    # Ctrl-C reaches workers, too: they go without a word, which is for the main process to say.
    # A build in the background, which ignores it, has workers that do.
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _see_only(device: int) -> None:
    """Hide all GPUs but one from CUDA, which counts those that it sees; before it is loaded."""
    # In the order in which the driver lists them, not the fastest first.
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    seen = visible_gpus()
    os.environ["CUDA_VISIBLE_DEVICES"] = seen[device] if device < len(seen) else str(device)


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
        if type(error).__name__ == "OutOfMemoryError":
            layer = f" of layer {params['layer']}" if "layer" in params else ""
            raise BackendError(
                f"{op.name}{layer} ran out of the memory of {_device_of(params)}: "
                f"{str(error).partition('. ')[0]}",
                expected="shorter samples (calibration.length), where AutoRound tunes a smaller "
                "quantize.tune.batch_size, or a GPU with more",
            ) from error
        raise BackendError(f"{op.name} failed: {type(error).__name__}: {error}") from error


def _device_of(params: Any) -> str:
    """What computes an action, by its own name for it or by the number of the only GPU seen."""
    device = params.get("device", "the GPU")
    return f"GPU {_device}" if device == ANY_GPU and _device is not None else str(device)


def _progress() -> None:
    assert _steps is not None
    _steps.put(peak_memory())
