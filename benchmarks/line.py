"""Measure how fast a full-size checkpoint comes from a hub, and leaves quantized.

    python -m benchmarks.line [--repeat 3]

The hub is the test suite's own in a process beside ours, on the loopback device and on the same
cores: its headers are those of Carnice-V2-27b, 54.7 GB, and its bytes come from a pool in memory.
What is printed are seconds of the clock and of processors, ours and the hub's apart.
Needs 16 GB of disk.
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import os
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.checkpoints import DEMO, TEXT_FILES
from benchmarks.hub import CARNICE, VARIANT, fake_hub, sparse_checkpoint
from benchmarks.run import WORK, run, start_over

if TYPE_CHECKING:
    from fake_hub import Answer

POOL_BYTES = (64 << 20) + 4098
"""No multiple of a row's bytes, so that no two tensors are equal."""

_PIECE_BYTES = 1 << 20


class Pool:
    """Bytes of finite BF16 numbers, over and over."""

    def __init__(self) -> None:
        rng = np.random.default_rng(1)
        weights = rng.normal(0, 0.02, (POOL_BYTES + _PIECE_BYTES) // 2).astype(np.float32)
        self._bytes = (weights.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8).data

    def pieces(self, answer: Answer, limit: int) -> Iterator[bytes | memoryview]:
        """The body of an answer: a file's header is read, all behind it is the pool's."""
        if isinstance(answer.body, bytes):
            yield answer.body[:limit]
            return
        with answer.body.open("rb") as file:
            header = 8 + int.from_bytes(file.read(8), "little")
            if answer.body.suffix != ".safetensors" or answer.first < header:
                file.seek(answer.first)
                yield file.read(limit)
                return
        place, end = answer.first, answer.first + limit
        while place < end:
            count, start = min(_PIECE_BYTES, end - place), place % POOL_BYTES
            yield self._bytes[start : start + count]
            place += count


def serve(folder: Path, talk: Connection) -> None:
    """Be the hub until told to stop: tell where it is, then the seconds of processor it took."""
    with fake_hub() as hub:
        repo = hub.add(CARNICE, folder)
        names = [path.name for path in folder.glob("*.safetensors")]
        repo.hashes = {name: hashlib.sha256(name.encode()).hexdigest() for name in names}
        hub.pieces = Pool().pieces
        talk.send(hub.hub_url)
        while talk.recv():
            usage = resource.getrusage(resource.RUSAGE_SELF)
            talk.send((usage.ru_utime, usage.ru_stime))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=1)
    arguments = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=WORK) as scratch:
        folder = sparse_checkpoint(Path(scratch) / "sparse")
        for name in TEXT_FILES:
            if (DEMO / name).exists():
                shutil.copyfile(DEMO / name, folder / name)
        here, there = multiprocessing.Pipe()
        process = multiprocessing.Process(target=serve, args=(folder, there), daemon=True)
        process.start()
        os.environ.update(HF_ENDPOINT=here.recv(), HF_HUB_DISABLE_XET="1")
        os.environ.update(HF_HOME=str(Path(scratch) / "home"))
        for _ in range(arguments.repeat):
            start_over()
            measure(here)
        here.send(False)
        process.join()
    start_over()


def measure(hub: Connection) -> None:
    """Build once from an empty cache."""

    def spent() -> tuple[float, float]:
        hub.send(True)
        user, system = hub.recv()
        return user, system

    before = spent()
    start = os.times()
    began = time.perf_counter()
    command = [sys.executable, "-m", "carnice_build", "build", VARIANT, "--profile", "full"]
    run([*command, "--stream", "--out", str(WORK / "build"), "--cache", str(WORK / "cache")])
    seconds = time.perf_counter() - began
    ours = os.times()
    user, system = (b - a for a, b in zip(before, spent(), strict=True))
    mine = ours.children_user - start.children_user, ours.children_system - start.children_system
    print(
        f"{seconds:.1f} s; ours {mine[0]:.1f} s user and {mine[1]:.1f} s system, "
        f"the hub's {user:.1f} s and {system:.1f} s",
        flush=True,
    )


if __name__ == "__main__":
    main()
