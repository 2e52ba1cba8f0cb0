"""Two caches that meet in a remote: what the second one moves and computes, and what plans ask.

    python -m benchmarks.remote [VARIANT...] [--layers 4] [--url URL] [--actions 50000]

Without variants, mlx-4bit of a 27B-shaped checkpoint; with some, those of the demo.
Without a URL, the remote is a folder.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.checkpoints import make_checkpoint
from benchmarks.run import WORK, Run, run
from carnice_build.remote.batches import Body, PackEntry
from carnice_build.remote.objects import Objects
from carnice_build.remote.remote import Remote
from carnice_build.remote.signing import new_key, read_key
from carnice_build.remote.upload import push
from carnice_build.store.digests import digest_texts

OUTPUTS = 3
PACKED = 750
TENSOR_BYTES = 1_000


def digests_of(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of the outputs."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def build(machine: Path, url: str, names: Sequence[str], *more: str) -> Run:
    """A build with a machine's own cache."""
    places = ["--cache", str(machine / "cache"), "--out", str(machine / "build")]
    command = [sys.executable, "-m", "carnice_build", "build", *names, "--json", *places]
    return run([*command, "--remote", url, *more])


def measure_builds(table: Table, scratch: Path, url: str, names: list[str], layers: int) -> None:
    """The same variants on two machines, and what each of them did."""
    source = [] if names else ["--source", f"body={make_checkpoint(layers=layers)}"]
    for machine, more in (("one", ["--push"]), ("two", [])):
        done = build(scratch / machine, url, names or ["mlx-4bit"], *source, *more)
        report = json.loads(done.output)
        size = sum(item["size"] for item in report["variants"])
        row = [report["read_bytes"], report["fetched_bytes"], report["pushed_bytes"], size]
        table.add_row(
            machine,
            f"{done.seconds:.1f}",
            f"{done.processor:.1f}",
            str(report["actions_run"]),
            *(f"{count / 1e6:,.1f}" for count in row),
            f"{done.peak / 1e9:.2f}",
        )
    one, two = (digests_of(scratch / machine / "build") for machine in ("one", "two"))
    if one != two:
        sys.exit("the two machines have other bytes")


def digest(number: int) -> str:
    """One of many."""
    return hashlib.sha256(str(number).encode()).hexdigest()


def large_body(actions: int) -> Body:
    """What so many actions leave: three outputs each, in packs of 750."""
    made = {
        digest(-n): [digest(OUTPUTS * n + k) for k in range(OUTPUTS)] for n in range(1, actions + 1)
    }
    outputs = [item for digests in made.values() for item in digests]
    packs = {}
    for start in range(0, len(outputs), PACKED):
        digests = outputs[start : start + PACKED]
        sizes = [TENSOR_BYTES] * len(digests)
        entry = PackEntry(size=8 + sum(sizes), header=digest(0), digests=digests, sizes=sizes)
        packs[digest_texts([digest(0), *digests])] = entry
    return Body(variants=["large"], actions=made, packs=packs)


def measure_plans(table: Table, scratch: Path, actions: int) -> None:
    """What opening a remote that knows so many actions takes, the first time and again."""
    signer = read_key(Path(os.environ["CARNICE_KEY"]))
    assert signer is not None
    objects = Objects(f"file://{scratch / 'large'}")
    push(objects, {"large": large_body(actions)}, {}, signer, _ignore, _ignore)
    (batch,) = (scratch / "large" / "records").iterdir()
    for what in ("first", "again"):
        counted = Counted(objects.url)
        start = time.perf_counter()
        remote = Remote(counted, {signer.public: ""}, scratch / "cache")
        seconds = time.perf_counter() - start
        known = sum(
            remote.index.outputs(digest(-n), OUTPUTS) is not None for n in range(1, actions + 1)
        )
        table.add_row(
            what,
            f"{known:,}",
            str(counted.calls.total()),
            f"{batch.stat().st_size / 1e6:.1f}",
            f"{seconds:.2f}",
        )


def _ignore(count: int) -> None:
    return


class Counted(Objects):
    """Objects that count how often their driver is asked."""

    def __init__(self, url: str) -> None:
        self.calls: Counter[str] = Counter()
        super().__init__(url)

    def _listing(self, folder: str) -> object:
        self.calls["list"] += 1
        return super()._listing(folder)

    def _read(self, name: str, start: int, end: int) -> bytes:
        self.calls["read"] += 1
        return super()._read(name, start, end)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("variants", nargs="*")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--url")
    parser.add_argument("--actions", type=int, default=50_000)
    arguments = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    builds, plans = Table(title="two machines, one remote"), Table(title="plans with a remote")
    for heading in (
        "machine",
        "seconds",
        "processor",
        "actions run",
        "read MB",
        "fetched MB",
        "pushed MB",
        "output MB",
        "peak RSS GB",
    ):
        builds.add_column(heading, justify="right")
    for heading in ("plan", "actions known", "requests", "batch MB", "seconds"):
        plans.add_column(heading, justify="right")
    with tempfile.TemporaryDirectory(dir=WORK) as folder:
        scratch = Path(folder)
        os.environ["CARNICE_KEY"] = str(scratch / "key.pem")
        new_key(scratch / "key.pem")
        url = arguments.url or f"file://{scratch / 'remote'}"
        measure_builds(builds, scratch, url, arguments.variants, arguments.layers)
        measure_plans(plans, scratch, arguments.actions)
    for table in (builds, plans):
        Console(width=120).print(table)


if __name__ == "__main__":
    main()
