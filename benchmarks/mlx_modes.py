"""Measure quantization of a BF16 matrix to MLX's modes against `mlx.core.quantize`, in one process.

    python -m benchmarks.mlx_modes [--shape 4096 5120] [--threads 2] [--repeat 7]

Ours gets that many threads, mlx what it takes on its CPU; they take turns, and must agree on every
byte.
"""

from __future__ import annotations

import argparse
import statistics
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from benchmarks.timing import seconds
from carnice_build.kernels import affine, mlx_floats

ROWS_PER_TASK = 256

Arrays = tuple[NDArray[Any], ...]


class Ours:
    """A kernel over blocks of rows, on a pool of threads."""

    def __init__(self, weight: NDArray[np.uint16], mode: str, pool: ThreadPoolExecutor) -> None:
        rows, cols = weight.shape
        self._weight = weight
        self._mode = mode
        self._pool = pool
        self.made: Arrays
        if mode == "affine":
            grids = (np.empty((rows, cols // 64), np.uint16) for _ in range(2))
            self.made = (np.empty((rows, cols // 8), np.uint32), *grids)
        else:
            found = mlx_floats.MODES[mode]
            packed = np.empty((rows, cols * found.bits // 32), np.uint32)
            self.made = packed, np.empty((rows, cols // found.group_size), np.uint8)

    def __call__(self) -> Arrays:
        """Quantize the weight."""
        list(self._pool.map(self._one_task, range(0, len(self._weight), ROWS_PER_TASK)))
        return self.made

    def _one_task(self, start: int) -> None:
        rows = slice(start, start + ROWS_PER_TASK)
        made: list[Any] = [array[rows] for array in self.made]
        if self._mode == "affine":
            affine.quantize_rows(self._weight[rows], "BF16", 4, 64, *made)
        else:
            mlx_floats.quantize_rows(self._weight[rows], "BF16", self._mode, *made)


def by_mlx(weight: mx.array, mode: str) -> Arrays:
    """The same by mlx."""
    made = mx.quantize(weight, mode=mode)
    mx.eval(made)
    return tuple(
        np.array(item.view(mx.uint16) if item.dtype == mx.bfloat16 else item) for item in made
    )


def main() -> None:
    """Make a matrix, check that both agree, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", type=int, nargs=2, default=[4096, 5120])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=7)
    arguments = parser.parse_args()
    mx.set_default_device(mx.cpu)
    drawn = np.random.default_rng(0).standard_normal(arguments.shape, np.float32) * 0.02
    theirs = mx.array(drawn).astype(mx.bfloat16)
    weight = np.array(theirs.view(mx.uint16))
    with ThreadPoolExecutor(arguments.threads) as pool:
        for mode in ("affine", *mlx_floats.MODES):
            ours = Ours(weight, mode, pool)
            for mine, other in zip(ours(), by_mlx(theirs, mode), strict=True):
                assert mine.tobytes() == other.tobytes()
            reference = partial(by_mlx, theirs, mode)
            turns = [(seconds(ours), seconds(reference)) for _ in range(arguments.repeat)]
            rates = [
                weight.nbytes / 1e9 / statistics.median(times) for times in zip(*turns, strict=True)
            ]
            ratio = statistics.median(other / mine for mine, other in turns)
            print(f"{mode:7} {rates[0]:6.2f} GB/s, mlx {rates[1]:6.3f} GB/s: {ratio:.0f}x")


if __name__ == "__main__":
    main()
