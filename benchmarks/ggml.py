"""Measure quantization of a BF16 matrix to ggml's types against `ggml_quantize_chunk`.

    python -m benchmarks.ggml [--shape 256 4096] [--threads 1 2] [--repeat 7] [--types Q4_K ...]

Both run in one process, on the same threads, each of which quantizes a matrix; they take turns,
and must agree on every byte.  Figures are GB of BF16 a second and a thread, of the median run, and
the median of the ratios of two runs that followed one another; only ratios mean anything.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from benchmarks.timing import seconds
from carnice_build.backends.ggml import quantize_with_ggml
from carnice_build.kernels.ggml import QUANTIZERS, quantize

GOALS = {
    ("Q2_K", False): 10,
    ("Q2_K", True): 10,
    ("Q3_K", False): 3,
    ("Q3_K", True): 7,
    ("Q4_K", False): 10,
    ("Q4_K", True): 10,
    ("Q5_K", False): 10,
    ("Q5_K", True): 10,
    ("Q6_K", False): 7,
    ("Q6_K", True): 7,
}
"""How many times as fast as ggml, by type and whether columns have an importance."""

Importance = NDArray[np.float32] | None


def cases(types: list[str], importance: NDArray[np.float32]) -> Iterator[tuple[str, Importance]]:
    """Each type without and, where it has regard of it, with importance."""
    for name in types:
        yield name, None
        if QUANTIZERS[name].weighted is not None:
            yield name, importance


def turns(
    pool: ThreadPoolExecutor, threads: int, work: list[Callable[[], Any]], repeat: int
) -> list[tuple[float, ...]]:
    """Seconds of each piece of work, done by all threads at once, time and again."""

    def by_all(one: Callable[[], Any]) -> None:
        list(pool.map(lambda _: one(), range(threads)))

    return [
        tuple(seconds(lambda one=one: by_all(one)) for one in work)  # type: ignore[misc]
        for _ in range(repeat)
    ]


def main() -> None:
    """Make a matrix, check that both agree, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", type=int, nargs=2, default=[256, 4096])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--types", nargs="+", default=list(QUANTIZERS))
    options = parser.parse_args()
    draw = np.random.default_rng(0)
    drawn = draw.standard_normal(options.shape, np.float32) * np.float32(0.02)
    weight = (drawn.view(np.uint32) >> 16).astype(np.uint16)
    importance = draw.chisquare(1, options.shape[1]).astype(np.float32)
    table = Table(title=f"GB/s of BF16 a thread, {options.shape[0]} by {options.shape[1]}")
    for heading in ("type", "importance", "threads", "ours", "ggml", "ratio", "goal"):
        table.add_column(heading)
    for name, given in cases(options.types, importance):
        mine, theirs = quantize(name, weight, given), quantize_with_ggml(name, weight, given)
        assert mine[0].tobytes() == theirs[0].tobytes(), name
        work = [
            lambda name=name, given=given: quantize(name, weight, given),
            lambda name=name, given=given: quantize_with_ggml(name, weight, given),
        ]
        for threads in options.threads:
            with ThreadPoolExecutor(threads) as pool:
                found = turns(pool, threads, work, options.repeat)
            rates = [
                weight.nbytes / 1e9 / statistics.median(times) for times in zip(*found, strict=True)
            ]
            ratio = statistics.median(other / own for own, other in found)
            goal = GOALS.get((name, given is not None))
            table.add_row(
                name,
                "" if given is None else "yes",
                str(threads),
                *(f"{rate:.3f}" for rate in rates),
                f"{ratio:.1f}x",
                f"{goal}x" if goal else "",
            )
    Console(width=90).print(table)


if __name__ == "__main__":
    main()
