"""Measure plans and builds from a hub on this machine against the same build from disk.

    python -m benchmarks.hub [--layers 4]

The hub is the test suite's own (`tests/hub/fake_hub.py`): it speaks the real one's interface on the
loopback device, so the times say what the streaming costs, not what a network does.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.checkpoints import make_checkpoint
from benchmarks.run import ROOT, WORK, Run, run, start_over, warm

sys.path.insert(0, str(ROOT / "tests" / "hub"))
from fake_hub import CARNICE, FakeHub, fake_hub

VARIANT = "mlx-4bit"
SHAPES = ROOT / "benchmarks" / "shapes" / "carnice-v2-27b.json"


def carnice(hub: FakeHub, home: Path, *arguments: str) -> Run:
    """Run `carnice` with this hub as its hub and `home` as the place of the hub's cache."""
    os.environ.update(HF_ENDPOINT=hub.hub_url, HF_HOME=str(home), HF_HUB_DISABLE_XET="1")
    command = [sys.executable, "-m", "carnice_build", *arguments, "--json"]
    return run([*command, "--cache", str(WORK / "cache")])


def watched(folders: list[Path], work: Callable[[], Run]) -> tuple[Run, int]:
    """The result of `work`, and the most bytes that `folders` held meanwhile."""
    peak = 0
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.1):
            peak = max(peak, _bytes_in(folders))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        result = work()
    finally:
        done.set()
        thread.join()
    return result, max(peak, _bytes_in(folders))


def _bytes_in(folders: list[Path]) -> int:
    """Bytes of disk below `folders`, a file with several links once."""
    blocks: dict[int, int] = {}
    for folder in folders:
        for path in folder.rglob("*"):
            try:
                stat = path.lstat()
            except FileNotFoundError:  # renamed while we looked
                continue
            blocks[stat.st_ino] = stat.st_blocks * 512
    return sum(blocks.values())


def sparse_checkpoint(folder: Path) -> Path:
    """The full-size checkpoint as true headers over empty files, which take no disk."""
    from carnice_build.checkpoint.checkpoint import INDEX_NAME
    from carnice_build.checkpoint.header import encode_header
    from carnice_build.dtypes import TensorSpec

    shapes = json.loads(SHAPES.read_text())
    tensors = [
        (name, TensorSpec(dtype, tuple(shape)))
        for name, (dtype, shape) in shapes["tensors"].items()
    ]
    folder.mkdir(parents=True)
    weight_map: dict[str, str] = {}
    count = 12
    for index in range(count):
        name = f"model-{index + 1:05}-of-{count:05}.safetensors"
        part = tensors[index::count]
        header = encode_header(part, {"format": "pt"})
        with (folder / name).open("wb") as file:
            file.write(header)
            file.truncate(len(header) + sum(spec.nbytes for _, spec in part))
        weight_map |= {tensor: name for tensor, _ in part}
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(shapes["config"]))
    (folder / "tokenizer.json").write_text("{}")  # missed where it is not there, but never read
    return folder


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=4)
    arguments = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    source = make_checkpoint(layers=arguments.layers)
    table = Table(title="carnice-build from a hub on this machine")
    for heading in ("what", "seconds", "fetched", "peak disk / output", "peak RSS"):
        table.add_column(heading)
    with tempfile.TemporaryDirectory(dir=WORK) as scratch, fake_hub() as hub:
        measure_plan(table, hub, Path(scratch))
        measure_builds(table, hub, Path(scratch), source)
    start_over()
    Console(width=100).print(table)


def measure_plan(table: Table, hub: FakeHub, scratch: Path) -> None:
    """A first and a second plan of the full-size model."""
    repo = hub.add(CARNICE, sparse_checkpoint(scratch / "sparse"))
    # Nobody reads the empty weights, so any content id does.
    shards = repo.folder.glob("*.safetensors")
    repo.hashes = {path.name: hashlib.sha256(path.name.encode()).hexdigest() for path in shards}
    for name in ("plan at full size, first", "plan at full size, again"):
        hub.forget()
        start_over()
        result = carnice(hub, scratch / "home", "plan", VARIANT, "--profile", "full")
        fetched = f"{hub.bytes_sent / 1e6:.2f} MB"
        table.add_row(name, f"{result.seconds:.2f}", fetched, "", f"{result.peak / 1e9:.2f} GB")


def measure_builds(table: Table, hub: FakeHub, scratch: Path, source: Path) -> None:
    """The same build from disk, streamed, and downloaded."""
    repo = hub.add(CARNICE, source)
    for path in source.iterdir():
        repo.content_id(path.name)  # not while a build is measured
    warm(source)
    home = scratch / "home2"
    ways = {
        "build from disk": ["--source", f"body={source}"],
        "build --stream": ["--profile", "full", "--stream"],
        "build after download": ["--profile", "full"],
    }
    for name, options in ways.items():
        start_over()
        shutil.rmtree(home, ignore_errors=True)
        hub.forget()
        out = WORK / "build"
        command = ["build", VARIANT, *options, "--out", str(out)]
        result, peak = watched(
            [WORK / "cache", out, home], lambda command=command: carnice(hub, home, *command)
        )
        output = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
        table.add_row(
            name,
            f"{result.seconds:.2f}",
            f"{hub.bytes_sent / 1e9:.2f} GB",
            f"{peak / output:.3f}",
            f"{result.peak / 1e9:.2f} GB",
        )
        time.sleep(1)


if __name__ == "__main__":
    main()
