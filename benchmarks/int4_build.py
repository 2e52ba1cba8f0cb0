"""Measure INT4 by rounding to nearest against `llmcompressor.model_free_ptq`, in turn.

    python -m benchmarks.int4_build [--layers 4] [--rounds 2]

Both quantize the same linears of one 27B-shaped checkpoint to symmetric INT4 in groups of 128:
ours into auto-round's format, theirs (scheme W4A16) into pack-quantized. Both read from a warm
page cache, ours starts from an empty cache of its own, both may use every core, and every time is
wall clock of a whole process, start-up included. Only the ratios mean anything; on a machine that
others use, that of processor seconds means more than that of wall clock.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.checkpoints import make_checkpoint
from benchmarks.run import ROOT, WORK, Run, run, warm

PLACE = WORK / "int4-build"
"""Where both write; removed at the end."""

IGNORED = ("re:.*embed_tokens$", "lm_head", "re:.*conv1d$", "re:.*in_proj_[ab]$", "re:.*visual.*")
"""What a W4A16 of linears leaves alone, as `int4-rtn` does."""

THEIRS = """
import sys
from llmcompressor import model_free_ptq
source, target, workers, *ignored = sys.argv[1:]
model_free_ptq(source, target, scheme="W4A16", ignore=ignored, max_workers=int(workers))
"""


@dataclass(frozen=True)
class Measured:
    """A finished process, the processor seconds that it took, and what it wrote."""

    run: Run
    processor: float
    size: int

    def __str__(self) -> str:
        """All figures in a line."""
        return (
            f"{self.run.seconds:.2f} s, {self.processor:.2f} s of processor, "
            f"{self.run.peak / 1e9:.2f} GB RSS, {self.size:,} bytes"
        )


def measured(work: Callable[[], Run], output: Path) -> Measured:
    """Run a process; `output` is the folder that it writes its shards to."""
    before = children_seconds()
    finished = work()
    return Measured(finished, children_seconds() - before, output_bytes(output))


def children_seconds() -> float:
    """Processor seconds of all child processes that ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def build(source: Path) -> Run:
    """`carnice build int4-rtn` of the checkpoint as it is, into an empty cache."""
    shutil.rmtree(PLACE, ignore_errors=True)
    places = ["--cache", str(PLACE / "cache"), "--out", str(PLACE / "build")]
    options = ["--source", f"body={source}", "--set", "steps=[]", *places, "--json"]
    return run([sys.executable, "-m", "carnice_build", "build", "int4-rtn", *options])


def model_free(source: Path) -> Run:
    """The library's conversion with a worker for each core."""
    target = PLACE / "model-free"
    shutil.rmtree(target, ignore_errors=True)
    workers = str(os.cpu_count() or 1)
    return run([sys.executable, "-c", THEIRS, str(source), str(target), workers, *IGNORED])


def output_bytes(folder: Path) -> int:
    """Bytes of a folder's shards."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def one_round(source: Path) -> tuple[Measured, Measured]:
    """Both, one after the other; prints their sizes too: they did the same work."""
    warm(source)
    ours = measured(lambda: build(source), PLACE / "build" / "int4-rtn")
    # What the first one wrote may have pushed the source out of the page cache.
    warm(source)
    theirs = measured(lambda: model_free(source), PLACE / "model-free")
    print(f"carnice-build:  {ours}\nmodel_free_ptq: {theirs}", flush=True)
    print(
        f"ratio {theirs.run.seconds / ours.run.seconds:.1f}, "
        f"of processor seconds {theirs.processor / ours.processor:.1f}",
        flush=True,
    )
    return ours, theirs


def main() -> None:
    """Make the checkpoint, measure, print; the checkpoint stays for the next time."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    source = make_checkpoint(layers=arguments.layers)
    size = output_bytes(source)
    # The very first build compiles the kernels; that is not what is measured.
    build(ROOT / "demo" / "qwen3.6-27b")
    print(f"{arguments.layers} layers, {size / 1e9:.2f} GB, {os.cpu_count()} cores")
    rounds = [one_round(source) for _ in range(arguments.rounds)]
    ours, theirs = (min(item.run.seconds for item in each) for each in zip(*rounds, strict=True))
    print(f"fastest of each: {ours:.2f} s and {theirs:.2f} s, ratio {theirs / ours:.1f}, goal 10")
    shutil.rmtree(PLACE)


if __name__ == "__main__":
    main()
