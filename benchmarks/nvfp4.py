"""Measure NVFP4 quantization of a BF16 matrix against modelopt's NVFP4QTensor, in one process.

    python -m benchmarks.nvfp4 [--shape 4096 5120] [--threads 2] [--repeat 7]

Both get the same threads and the same ``scale_2``, they take turns, and must agree on every byte.
"""

from __future__ import annotations

import argparse
import statistics
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from modelopt.torch.quantization.qtensor import NVFP4QTensor
from numpy.typing import NDArray

from benchmarks.timing import seconds
from carnice_build.kernels.nvfp4 import amax, quantize_rows, weight_scale_2

ROWS_PER_TASK = 256

Bytes = NDArray[np.uint8]


class Ours:
    """The kernel over blocks of rows, on a pool of threads."""

    def __init__(self, weight: NDArray[np.uint16], scale_2: np.float32, threads: int) -> None:
        rows, cols = weight.shape
        self._weight = weight
        self._scale_2 = scale_2
        self._pool = ThreadPoolExecutor(threads)
        self.packed: Bytes = np.empty((rows, cols // 2), np.uint8)
        self.scales: Bytes = np.empty((rows, cols // 16), np.uint8)

    def __call__(self) -> tuple[Bytes, Bytes]:
        """Quantize the weight."""
        list(self._pool.map(self._one_task, range(0, len(self._weight), ROWS_PER_TASK)))
        return self.packed, self.scales

    def _one_task(self, start: int) -> None:
        part = slice(start, start + ROWS_PER_TASK)
        parts = self.packed[part], self.scales[part]
        quantize_rows(self._weight[part], "BF16", self._scale_2, *parts)


def modelopt(weight: torch.Tensor, scale_2: torch.Tensor) -> tuple[Bytes, Bytes]:
    """The same by modelopt."""
    quantized, scales, _ = NVFP4QTensor.quantize(weight, 16, None, scale_2)
    return quantized._quantized_data.numpy(), scales.view(torch.uint8).numpy()


def main() -> None:
    """Make a matrix, check that both agree, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", type=int, nargs=2, default=[4096, 5120])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    tensor = (torch.randn(arguments.shape) * 0.02).bfloat16()
    weight = tensor.view(torch.uint16).numpy()
    scale_2 = weight_scale_2(amax(weight, "BF16")[0])
    ours = Ours(weight, scale_2, arguments.threads)

    def theirs() -> tuple[Bytes, Bytes]:
        return modelopt(tensor, torch.tensor(scale_2))

    for mine, other in zip(ours(), theirs(), strict=True):
        np.testing.assert_array_equal(mine, other)
    pairs = [(seconds(ours), seconds(theirs)) for _ in range(arguments.repeat)]
    rates = [weight.nbytes / 1e9 / statistics.median(times) for times in zip(*pairs, strict=True)]
    shape = " x ".join(map(str, arguments.shape))
    print(f"NVFP4 of {shape} BF16 on {arguments.threads} threads, median of {arguments.repeat}:")
    print(f"  carnice-build   {rates[0]:6.2f} GB/s")
    print(f"  NVFP4QTensor    {rates[1]:6.3f} GB/s")
    print(f"  ratio           {rates[0] / rates[1]:6.1f}, goal 25")


if __name__ == "__main__":
    main()
