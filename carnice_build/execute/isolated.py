"""Ops that bring a library of their own run in worker processes.

Tensors cross in a memory-mapped scratch file: inputs one after another, then room for outputs.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from carnice_build.checkpoint.dtypes import NUMPY_NAME, TensorSpec
from carnice_build.errors import BackendError
from carnice_build.graph import Action, Op, TensorData

_ALIGNMENT = 64


class Workers:
    """A pool of worker processes, started when the first isolated op comes."""

    def __init__(self, scratch: Path, count: int) -> None:
        self._scratch = scratch
        self._count = count
        self._pool: ProcessPoolExecutor | None = None
        self._lock = threading.Lock()

    def close(self) -> None:
        """End the processes."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def apply(self, action: Action, inputs: Sequence[TensorData]) -> list[TensorData]:
        """The outputs of `action`, made by its op in another process.

        Raises BackendError when the process died, and whatever the op raises.
        """
        specs = [TensorSpec(data.dtype, data.array.shape) for data in inputs]
        offsets, size = _places([*specs, *action.outputs])
        with tempfile.NamedTemporaryFile(dir=self._scratch, prefix="exchange-") as file:
            os.ftruncate(file.fileno(), max(1, size))
            with mmap.mmap(file.fileno(), max(1, size)) as memory:
                arrays = _arrays(memory, [*specs, *action.outputs], offsets)
                for data, array in zip(inputs, arrays, strict=False):
                    array[...] = data.array
                self._submit(action, file.name, specs)
                results = [
                    TensorData(spec.dtype, array.copy())
                    for spec, array in zip(action.outputs, arrays[len(specs) :], strict=True)
                ]
                # Views keep the mapping open.
                del arrays, array
        return results

    def _submit(self, action: Action, path: str, specs: Sequence[TensorSpec]) -> None:
        with self._lock:
            if self._pool is None:
                self._pool = ProcessPoolExecutor(self._count, mp_context=get_context("spawn"))
            pool = self._pool
        try:
            pool.submit(_apply, action.op, action.params, path, specs, action.outputs).result()
        except BrokenProcessPool:
            raise BackendError(f"the worker process for {action.op.name} died") from None


def _apply(
    op: Op,
    params: Mapping[str, Any],
    path: str,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
) -> None:
    specs = [*inputs, *outputs]
    offsets, _ = _places(specs)
    with Path(path).open("r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
        data = [
            TensorData(spec.dtype, array)
            for spec, array in zip(specs, _arrays(memory, specs, offsets), strict=True)
        ]
        op.apply(params, data[: len(inputs)], data[len(inputs) :])
        del data


def _places(specs: Sequence[TensorSpec]) -> tuple[list[int], int]:
    offsets, position = [], 0
    for spec in specs:
        offsets.append(position)
        position += -(-spec.nbytes // _ALIGNMENT) * _ALIGNMENT
    return offsets, position


def _arrays(
    memory: mmap.mmap, specs: Sequence[TensorSpec], offsets: Sequence[int]
) -> list[np.ndarray[Any, Any]]:
    return [
        np.frombuffer(memory, NUMPY_NAME[spec.dtype], spec.size, offset).reshape(spec.shape)
        for spec, offset in zip(specs, offsets, strict=True)
    ]
